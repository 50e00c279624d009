"""Time of one optimizer step: Hardy's beside `torch.optim.AdamW` and beside the published UPGD written as a plain loop.

All take turns, one step each, again and again in one process, so that a machine that slows down slows all. What counts is the
median over rounds, and the ratio of medians to `AdamW(foreach=True)` and `AdamW(fused=True)`.

    python -m benchmarks.optimizer [--out NAME] [--threads 1] [--repeats 5] [--rounds 40] [--clock wall]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import hardy
from benchmarks.throughput import RESULTS, ROOT, machine
from hardy import UPGD, UPGDW, AdaptiveUPGD
from hardy.config import tunables
from hardy.optim import OptimizerSettings, PopulationOptimizer, VGSSettings, compiled
from hardy.parallel import set_threads
from hardy.population import MemberGenerators, expand

SIZES = {
    "978k": {"1": (784, 600), "2": (600, 600), "3": (600, 240), "4": (240, 10)},
    "133k": {"encoder": (128, 3), "core.ih": (512, 128), "core.hh": (512, 128), "actor": (2, 128), "critic": (1, 128)},
}
"""Of matrices, by name; each has a bias too. The second is the network of `benchmarks.throughput`."""

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.thread_time}


class PublishedUPGD(torch.optim.Optimizer):
    """UPGD (Elsayed & Mahmood 2024, Algorithm 1) parameter by parameter, one operation after the other, noise by `randn`."""

    def __init__(self, params: Any, lr: float = 1e-5, decay: float = 0.001, beta: float = 0.999, sigma: float = 0.001) -> None:
        super().__init__(params, {"lr": lr, "decay": decay, "beta": beta, "sigma": sigma})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        largest = torch.tensor(-torch.inf)
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["step"], state["utility"] = 0, torch.zeros_like(p)
                state["step"] += 1
                state["utility"].mul_(group["beta"]).add_(-p.grad * p, alpha=1 - group["beta"])
                largest = torch.maximum(largest, state["utility"].max())
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                corrected = state["utility"] / (1 - group["beta"] ** state["step"])
                gate = 1 - torch.sigmoid(corrected / largest)
                noise = torch.randn_like(p) * group["sigma"]
                p.mul_(1 - group["lr"] * group["decay"]).add_((p.grad + noise) * gate, alpha=-2 * group["lr"])


def shapes(size: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a network's tensors."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in SIZES[size].items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return found


def ordinary(make: Callable[[list[nn.Parameter]], Any], size: str) -> Callable[[], object]:
    """The step of an optimizer of one model."""
    parameters = [nn.Parameter(0.05 * torch.randn(shape)) for shape in shapes(size).values()]
    for parameter in parameters:
        parameter.grad = 0.01 * torch.randn_like(parameter)
    step: Callable[[], object] = make(parameters).step
    return step


def population(members: int, size: str) -> Callable[[], object]:
    """The step inside `DistributionalPPO` with its default settings: AdaptiveUPGD, clip, VGS and noise."""
    settings, vgs = OptimizerSettings(), VGSSettings()
    weights = {name: 0.05 * torch.randn(members, *shape) for name, shape in shapes(size).items()}
    gradients = {name: 0.01 * torch.randn_like(weight) for name, weight in weights.items()}
    optimizer = PopulationOptimizer({name: weight.shape for name, weight in weights.items()}, settings, vgs)
    numbers = {f"optimizer.{k}": v for k, v in tunables(settings).items()} | {f"vgs.{k}": v for k, v in tunables(vgs).items()}
    hyper: dict[str, Tensor] = {name: expand(value, members) for name, value in numbers.items()}
    state, noise = optimizer.init(weights), MemberGenerators(range(members), "noise")
    everyone = torch.ones(members, dtype=torch.bool)
    return lambda: optimizer.step_(weights, gradients, state, hyper, noise, everyone)


def candidates(size: str) -> dict[str, Callable[[], object]]:
    """What is compared, by name."""
    return {
        "AdamW(foreach=True)": ordinary(lambda p: torch.optim.AdamW(p, foreach=True), size),
        "AdamW(fused=True)": ordinary(lambda p: torch.optim.AdamW(p, fused=True), size),
        "published UPGD, loop": ordinary(PublishedUPGD, size),
        "UPGD": ordinary(UPGD, size),
        "UPGD, sigma=0": ordinary(lambda p: UPGD(p, sigma=0.0), size),
        "UPGDW": ordinary(UPGDW, size),
        "AdaptiveUPGD": ordinary(AdaptiveUPGD, size),
        "AdaptiveUPGD, clip, VGS": population(1, size),
        "AdaptiveUPGD, clip, VGS, 8 members": population(8, size),
    }


def measure(size: str, repeats: int, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Milliseconds of each candidate: the median of each repeat, and over repeats."""
    steps = candidates(size)
    medians: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(rounds):
            for name, step in steps.items():
                step()  # brings its own weights into the caches again
                began = clock()
                step()
                times[name].append(1e3 * (clock() - began))
        for name, values in times.items():
            medians[name].append(statistics.median(values))
    overall = {name: statistics.median(values) for name, values in medians.items()}
    return {
        "size": size,
        "weights": sum(torch.Size(shape).numel() for shape in shapes(size).values()),
        "milliseconds": overall,
        "repeats": medians,
        "ratio_to_foreach": {name: value / overall["AdamW(foreach=True)"] for name, value in overall.items()},
        "ratio_to_fused": {name: value / overall["AdamW(fused=True)"] for name, value in overall.items()},
    }


def report(row: dict[str, Any]) -> None:
    """Print one line for each candidate."""
    print(f"\n{row['weights']} weights, milliseconds a step (lowest to highest repeat), times AdamW foreach and fused")
    for name, value in row["milliseconds"].items():
        lowest, highest = min(row["repeats"][name]), max(row["repeats"][name])
        foreach, fused = row["ratio_to_foreach"][name], row["ratio_to_fused"][name]
        print(f"{name:36s}{value:8.3f} ({lowest:.3f} to {highest:.3f}){foreach:8.2f}{fused:8.2f}")


def main() -> None:
    """Read the arguments, measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="optimizer", help="name of the JSON file under benchmarks/results/ (optimizer)")
    parser.add_argument("--threads", type=int, default=1, help="threads (1)")
    parser.add_argument("--repeats", type=int, default=5, help="repeats, over whose medians the median is taken (5)")
    parser.add_argument("--rounds", type=int, default=40, help="steps of each candidate in a repeat (40)")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: of one thread, where others use the machine (wall)"
    )
    arguments = parser.parse_args()
    if arguments.clock == "cpu" and arguments.threads > 1:
        parser.error(
            f"--clock cpu --threads {arguments.threads}: the processor's time is taken of one thread; use --clock wall"
        )
    set_threads(arguments.threads, recurrent=False)
    torch.manual_seed(0)
    host = {**machine(), "compiled": compiled.available(), "threads": arguments.threads, "clock": arguments.clock}
    host["versions"] = {"python": platform.python_version(), "torch": torch.__version__, "hardy": hardy.__version__}
    print(f"{host['processor']}, {host['cores']} cores, {host['system']}, {arguments.threads} threads, {host['versions']}")
    rows = []
    for size in SIZES:
        rows.append(measure(size, arguments.repeats, arguments.rounds, CLOCKS[arguments.clock]))
        report(rows[-1])
    path = RESULTS / f"{arguments.out}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": host, "rows": rows}, indent=2) + "\n")
    print(f"saved {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
