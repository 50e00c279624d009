"""What a population costs: wall time of P members over that of one, in one run, all of them with N environments each.

The work is that of `benchmarks.throughput` (linear 128, LSTM 128, 132,867 weights a member), rollout and update. The sizes take
turns, several times over; medians count. Exchanges come on top: see the share that `benchmarks.population` reports.

    python -m benchmarks.population_cost [--members 1 2 4 8] [--envs 8] [--threads 2] [--repeats 5] [--out NAME]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch

from benchmarks.throughput import RESULTS, Work, machine
from hardy.config import settings_from_dict
from hardy.settings import RunSettings
from hardy.trainer import Trainer

ITERATIONS = 6
LONG = 10**7


def make(members: int, num_envs: int, threads: int) -> Trainer:
    """A population on the common work, warmed up."""
    settings = settings_from_dict(
        RunSettings,
        {
            "threads": threads,
            "env": {"id": "CartPoleNoVel-v1", "num_envs": num_envs},
            "policy": {"encoder": [Work.hidden], "memory_size": Work.hidden},
            "critic": {"quantiles": 1},
            "ppo": {"n_steps": Work.num_steps, "n_epochs": Work.epochs, "n_minibatches": Work.minibatches},
            "optimizer": {"lr": Work.learning_rate},
            "population": {"size": members},
        },
    )
    trainer = Trainer(settings)
    trainer.iterate(LONG)
    return trainer


def iteration(trainer: Trainer) -> float:
    """Seconds of one iteration, the mean of a few."""
    began = time.perf_counter()
    for _ in range(ITERATIONS):
        trainer.iterate(LONG)
    return (time.perf_counter() - began) / ITERATIONS


def main() -> None:
    """Read the arguments, measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--envs", type=int, default=8, help="environments of each member (8)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", default="population_cost")
    given = parser.parse_args()
    sizes = sorted({1, *given.members})
    populations = {size: make(size, given.envs, given.threads) for size in sizes}
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(given.repeats):
        for size in sizes:
            seconds[size].append(iteration(populations[size]))
    one = statistics.median(seconds[1])
    steps = given.envs * Work.num_steps
    rows: list[dict[str, Any]] = []
    for size in sizes:
        median = statistics.median(seconds[size])
        ratios = [mine / single for mine, single in zip(seconds[size], seconds[1], strict=True)]
        rows.append(
            {
                "members": size,
                "seconds_per_iteration": median,
                "steps_per_second_in_all": size * steps / median,
                "cost": median / one,
                "lowest": min(ratios),
                "highest": max(ratios),
            }
        )
        print(
            f"P = {size:3d}: {median * 1000:7.0f} ms, {size * steps / median:8,.0f} steps/s in all, "
            f"cost {median / one:.2f} x one ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    document = {
        "machine": machine(),
        "torch": torch.__version__,
        "threads": given.threads,
        "num_envs": given.envs,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{given.out}.json").write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
