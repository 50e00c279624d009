"""How well a configuration learns: several seeds, one program, the final evaluation of each, with an interval.

The seeds are members of one population without exchange, which equals as many single runs (tests/test_population_training.py).

    python -m benchmarks.learning configs/cartpole_novel.yaml [--seeds 10] [--out NAME] [section.key=value ...]
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
from scipy import stats

from hardy.config import load_settings
from hardy.settings import RunSettings
from hardy.trainer import Trainer, mean_over_members

RESULTS = Path(__file__).parent / "results"


def interquartile_mean(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean of the middle half (Agarwal et al. 2021, section 4.3)."""
    return np.asarray(stats.trim_mean(values, 0.25, axis=axis))


def interval(values: np.ndarray, statistic: Any) -> tuple[float, float]:
    """95 % percentile bootstrap interval over seeds; the value itself where all seeds agree."""
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    found = stats.bootstrap((values,), statistic, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    return float(found.low), float(found.high)


def measure(settings: RunSettings, seeds: int, *, progress: bool = True) -> dict[str, Any]:
    """Train ``seeds`` members to the end and evaluate each.

    ``while_training`` is the mean over the whole run of the return of the last 100 episodes: how early a configuration learns.
    """
    trainer = Trainer(settings, seeds=[settings.seed + index for index in range(seeds)])
    began = told = time.monotonic()
    curve = []
    while trainer.timesteps < settings.total_timesteps:
        metrics = trainer.iterate(settings.total_timesteps)
        curve.append(metrics["rollout/ep_rew_mean"].numpy())
        if progress and time.monotonic() - told > 20:
            told = time.monotonic()
            print(f"{trainer.timesteps:,} steps, return {mean_over_members(metrics)['rollout/ep_rew_mean']:.1f}", flush=True)
    seconds = time.monotonic() - began
    returns = trainer.evaluate(settings.evaluation.episodes, deterministic=settings.evaluation.deterministic)
    means = returns.mean(1)
    while_training = np.nanmean(curve, axis=0)
    return {
        "env": settings.env.id,
        "steps": trainer.timesteps,
        "episodes": returns.shape[1],
        "seeds": trainer.seeds,
        "mean_of_each_seed": [round(float(mean), 2) for mean in means],
        "interquartile_mean": float(interquartile_mean(means)),
        "interquartile_mean_interval": interval(means, interquartile_mean),
        "mean": float(means.mean()),
        "mean_interval": interval(means, np.mean),
        "while_training": float(while_training.mean()),
        "while_training_interval": interval(while_training, np.mean),
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "torch": torch.__version__,
    }


def main() -> None:
    """Parse the command line, measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", help="name of the result; by default that of the configuration")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    given = parser.parse_intermixed_args()
    result = measure(load_settings(RunSettings, given.config, given.overrides), given.seeds)
    result["overrides"] = given.overrides
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{given.out or given.config.stem}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
