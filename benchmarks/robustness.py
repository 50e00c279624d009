"""What attacks cost with and without state-adversarial training: the same configuration twice, the strongest of five attacks.

    python -m benchmarks.robustness configs/cartpole_novel.yaml [--seeds 5] [--epsilon 0.1] [--out NAME] [section.key=value ...]

The seeds are members of one population without exchange; ``--epsilon`` is the radius of the training and of the attacks.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.learning import RESULTS, RunSettings, interval
from hardy.adversary import ATTACKS, Attack
from hardy.config import load_settings
from hardy.robustness import attacked_returns
from hardy.trainer import Trainer


def trained(settings: RunSettings, seeds: int) -> Trainer:
    """``seeds`` members, trained to the end."""
    trainer = Trainer(settings, seeds=[settings.seed + index for index in range(seeds)])
    while trainer.timesteps < settings.total_timesteps:
        trainer.iterate(settings.total_timesteps)
    return trainer


def measure(settings: RunSettings, seeds: int, epsilon: float, episodes: int) -> dict[str, Any]:
    """Natural and attacked means of every seed, and the mean of each seed under the attack that is strongest for it."""
    trainer = trained(settings, seeds)
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
    parser.add_argument("--epsilon", type=float, default=0.1)
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--out", help="name of the result; by default that of the configuration")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    given = parser.parse_intermixed_args()
    result: dict[str, Any] = {"config": given.config.stem, "epsilon": given.epsilon, "overrides": given.overrides}
    for name, radius in (("plain", 0.0), ("adversarial", given.epsilon)):
        settings = load_settings(RunSettings, given.config, [*given.overrides, f"adversary.epsilon={radius}"])
        result[name] = measure(settings, given.seeds, given.epsilon, given.episodes)
        for attack in ("natural", *ATTACKS, "strongest"):
            low, high = result[name][attack]["interval"]
            print(f"{name:12} {attack:10} {result[name][attack]['mean']:8.1f} ({low:.1f} to {high:.1f})", flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"robustness_{given.out or given.config.stem}.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
