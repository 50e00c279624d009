"""What exchange is worth: learning rates drawn over four decades, with and without population-based training.

Each seed is a population of eight whose members draw ``optimizer.lr`` log-uniformly from 1e-5 to 1e-1. The same draws are
trained once with exchange and once as eight independent runs. A population's result is the evaluation of the member that scored
best last, in other episodes than those of the score.

    python -m benchmarks.population [--seeds 10] [--first 0] [--out NAME] [section.key=value ...]

Several processes may share the seeds (``--first``); ``--merge NAME NAME ...`` puts their results together.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.learning import RESULTS
from hardy.config import load_settings
from hardy.evolution import Evolution
from hardy.settings import RunSettings
from hardy.trainer import Trainer

CONFIG = Path(__file__).parents[1] / "configs" / "cartpole_novel.yaml"
LEARNING_RATES = "pbt.hyperparams={optimizer.lr: {low: 0.00001, high: 0.1}}"
FIXED = ["population.size=8", "pbt.interval=10_000", "pbt.min_gap=1.0", LEARNING_RATES]
SOLVED = 475.0


def measure(overrides: list[str], seed: int, exchange: bool) -> dict[str, Any]:
    """Train one population to the end and evaluate every member."""
    settings = load_settings(RunSettings, CONFIG, [*FIXED, *overrides, f"seed={seed}", f"pbt.exchange={str(exchange).lower()}"])
    began = time.monotonic()
    trainer = Trainer(settings)
    evolution = Evolution(trainer)
    drawn = evolution.start()
    in_exchanges = 0.0
    while trainer.timesteps < settings.total_timesteps:
        evolution.watch(trainer.iterate(settings.total_timesteps))
        if evolution.due(settings.total_timesteps):
            paused = time.monotonic()
            evolution.exchange()
            in_exchanges += time.monotonic() - paused
    final = evolution.finish()
    chosen = settings.evaluation
    returns = trainer.evaluate(chosen.episodes, deterministic=chosen.deterministic).mean(1)
    return {
        "seed": seed,
        "exchange": exchange,
        "steps": trainer.timesteps,
        "drawn": [record.after["optimizer.lr"] for record in drawn],
        "final": [record.after["optimizer.lr"] for record in final],
        "return_of_each_member": [round(float(value), 2) for value in returns],
        "best_member": evolution.best_member,
        "return": round(float(returns[evolution.best_member]), 2),
        "exploits": evolution.exploits,
        "seconds": time.monotonic() - began,
        "share_in_exchanges": in_exchanges / (time.monotonic() - began),
    }


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Both arms side by side."""
    arms = {}
    for exchange in (True, False):
        chosen = [run for run in runs if run["exchange"] is exchange]
        best = np.array([run["return"] for run in chosen])
        members = np.concatenate([run["return_of_each_member"] for run in chosen])
        arms["population" if exchange else "independent"] = {
            "seeds": len(chosen),
            "seeds_at_475": int((best >= SOLVED).sum()),
            "best_of_each_seed": best.tolist(),
            "share_of_members_at_475": float((members >= SOLVED).mean()),
            "mean_of_all_members": float(members.mean()),
        }
    return arms


def main() -> None:
    """Parse the command line, measure or merge, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--out", default="population")
    parser.add_argument("--merge", nargs="+", metavar="NAME", help="results to put together instead of measuring")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    given = parser.parse_intermixed_args()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{given.out}.json"
    runs: list[dict[str, Any]] = []
    if given.merge:
        for name in given.merge:
            runs += json.loads((RESULTS / f"{name}.json").read_text())["runs"]
        _save(path, runs)
    else:
        for seed in range(given.first, given.first + given.seeds):
            for exchange in (True, False):
                runs.append(measure(given.overrides, seed, exchange))
                print(json.dumps(runs[-1]), flush=True)
            _save(path, runs)
    print(json.dumps(summarise(runs), indent=2))


def _save(path: Path, runs: list[dict[str, Any]]) -> None:
    document = {
        "env": "CartPoleNoVel-v1",
        "fixed": FIXED,
        **summarise(runs),
        "processor": platform.machine(),
        "torch": torch.__version__,
        "runs": runs,
    }
    path.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
