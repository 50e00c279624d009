"""Training speed where environments and networks share a device.

The work: velocity-masked CartPole, linear 128 and LSTM 128, unroll 128, 4 epochs of 4 minibatches, float32, AdaptiveUPGD, VGS
and normalised observations and rewards. What counts is environment steps per second, all members together, over whole
iterations, rollout and update together; the first iterations warm up.

    python -m benchmarks.device [--device cuda|cpu] [--population 1 32] [--envs 2048] [--iterations 20] [--out NAME]

Without a graphics card it says so and ends, unless ``--device cpu`` asks for the processor, with a small size by default.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.throughput import RESULTS, machine, positive
from hardy.bench.work import LONG, common_settings
from hardy.trainer import Trainer

WARMUP = 4
"""Iterations that are not measured: every function is captured in them."""
SMALL = {"population": [1, 2], "envs": 16, "iterations": 2}
LARGE = {"population": [1, 32], "envs": 2048, "iterations": 20}


def measure(device: str, population: int, envs: int, iterations: int) -> dict[str, Any]:
    """Median speed of single iterations, with the fastest and the slowest."""
    settings = common_settings(num_envs=envs, population=population, backend="torch", device=device)
    trainer = Trainer(settings)
    steps = population * trainer.steps_per_iteration
    speeds = []
    for iteration in range(WARMUP + iterations):
        began = time.perf_counter()
        trainer.iterate(LONG)  # ends with the metrics on the host, so everything before has been done
        if iteration >= WARMUP:
            speeds.append(steps / (time.perf_counter() - began))
    return {
        "population": population,
        "envs": envs,
        "steps_per_second": statistics.median(speeds),
        "lowest": min(speeds),
        "highest": max(speeds),
        "peak_memory": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    }


def main() -> None:
    """Read the arguments, measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--population", type=positive, nargs="+", help="members P")
    parser.add_argument("--envs", type=positive, help="environments N of each")
    parser.add_argument("--iterations", type=positive, help="that are measured")
    parser.add_argument("--out", help="name of a JSON file under benchmarks/results/; without it nothing is saved")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no GPU: this machine has no CUDA device that PyTorch can use (--device cpu measures the processor)")
        return
    sizes: dict[str, Any] = {**(LARGE if arguments.device == "cuda" else SMALL)}
    sizes |= {name: getattr(arguments, name) for name in sizes if getattr(arguments, name) is not None}
    host = {
        **machine(),
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    print(", ".join(f"{name} {value}" for name, value in host.items()))
    rows = []
    for population in sizes["population"]:
        row = measure(arguments.device, population, sizes["envs"], sizes["iterations"])
        rows.append(row)
        print(
            "P = {population:3d}, N = {envs}: {steps_per_second:.0f} steps/s ({lowest:.0f} to {highest:.0f})".format(**row),
            flush=True,
        )
    if arguments.out:
        path = RESULTS / f"{Path(arguments.out).stem}.json"
        path.write_text(json.dumps({"machine": host, "rows": rows}, indent=2) + "\n")
        print(f"saved {path.name}")


if __name__ == "__main__":
    main()
