"""What attacks cost with and without state-adversarial training: the same configuration twice, the strongest of five attacks.

    python -m benchmarks.robustness configs/cartpole_novel.yaml [--seeds 5] [--epsilon 0.1] [--attack 0.2] [section.key=value]

The seeds are members of one population without exchange. Two processes may share the work (``--only plain``, ``--only
adversarial``): each adds its arm to the saved result of the same work.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.learning import RESULTS, RunSettings, interval
from hardy.adversary import ATTACKS, Attack
from hardy.config import load_settings
from hardy.robustness import attacked_returns
from hardy.trainer import Trainer

ARMS = ("plain", "adversarial")


def trained(settings: RunSettings, seeds: int) -> Trainer:
    """``seeds`` members, trained to the end."""
    trainer = Trainer(settings, seeds=[settings.seed + index for index in range(seeds)])
    told = time.monotonic()
    while trainer.timesteps < settings.total_timesteps:
        metrics = trainer.iterate(settings.total_timesteps)
        if time.monotonic() - told > 60:
            told = time.monotonic()
            scores = " ".join(f"{score:.0f}" for score in metrics["rollout/ep_rew_mean"])
            print(f"{trainer.timesteps:,} steps, returns {scores}", flush=True)
    return trainer


def measure(trainer: Trainer, epsilon: float, episodes: int) -> dict[str, Any]:
    """Natural and attacked means of every seed, and the mean of each seed under the attack that is strongest for it."""
    found = {"natural": trainer.evaluate(episodes).mean(1)}
    found |= {name: attacked_returns(trainer, Attack(name), epsilon, episodes).mean(1) for name in ATTACKS}
    found["strongest"] = np.min([found[name] for name in ATTACKS], axis=0)
    summary = {
        name: {"mean": float(v.mean()), "interval": interval(v, np.mean), "seeds": v.tolist()} for name, v in found.items()
    }
    return {**summary, "attacked_over_natural": float(found["strongest"].mean() / found["natural"].mean())}


def main() -> None:
    """Measure both, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epsilon", type=float, default=0.1, help="radius of the training")
    parser.add_argument("--attack", type=float, action="append", help="radius of the attacks (may be repeated); as --epsilon")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--only", choices=ARMS, help="train this one alone")
    parser.add_argument("--out", help="name of the result; by default that of the configuration")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    given = parser.parse_intermixed_args()
    result: dict[str, Any] = {
        "config": given.config.stem, "epsilon": given.epsilon, "seeds": given.seeds, "episodes": given.episodes,
        "overrides": given.overrides,
    }  # fmt: skip
    for name in [given.only] if given.only else ARMS:
        radius = given.epsilon if name == "adversarial" else 0.0
        settings = load_settings(RunSettings, given.config, [*given.overrides, f"adversary.epsilon={radius}"])
        trainer, result[name] = trained(settings, given.seeds), {}
        for attacked in given.attack or [given.epsilon]:
            found = result[name][f"{attacked:g}"] = measure(trainer, attacked, given.episodes)
            for attack in ("natural", *ATTACKS, "strongest"):
                low, high = found[attack]["interval"]
                print(f"{name:12} {attacked:5} {attack:10} {found[attack]['mean']:8.1f} ({low:.1f} to {high:.1f})", flush=True)
    path = RESULTS / f"robustness_{given.out or given.config.stem}.json"
    saved = json.loads(path.read_text()) if path.exists() else {}
    if all(saved.get(key) == result[key] for key in result if key not in ARMS):
        result = saved | result
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
