"""The machine: what it is, how fast it multiplies matrices, and how much of it other programs take."""

from __future__ import annotations

import os
import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch

from hardy.bench.results import Machine
from hardy.checkpoint import package_version
from hardy.nn import compiled as recurrence
from hardy.optim import compiled as optimizer
from hardy.parallel import available_cores

SQUARE = 1024
"""Rows and columns of the matrices whose product is the yardstick: large enough for the full speed of the cores."""
MIB = 2**20


def describe() -> Machine:
    """This machine and the versions of what runs on it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    versions = {"python": platform.python_version()}
    versions |= {name: package_version(name) for name in ("hardy", "torch", "numpy", "gymnasium")}
    return Machine(
        processor=models[0] if models else platform.processor() or platform.machine(),
        cores=available_cores(),
        memory_mib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // MIB,
        system=platform.platform(),
        compiled=recurrence.available() and optimizer.available(),
        versions=versions,
    )


def matrix_product(threads: int) -> Callable[[], object]:
    """A function that multiplies two square float32 matrices on so many threads; `product_flop` operations a call."""
    left, right = torch.randn(2, SQUARE, SQUARE, generator=torch.Generator().manual_seed(0))
    out = torch.empty_like(left)

    def multiply() -> None:
        torch.set_num_threads(threads)
        torch.mm(left, right, out=out)

    return multiply


def product_flop() -> float:
    """Floating-point operations of one call of `matrix_product`: a multiplication and an addition for each entry and row."""
    return 2.0 * SQUARE**3


def limit(gflops: float, weights: int, epochs: int) -> float:
    """Environment steps per second that no training of a network can exceed where matrices multiply at ``gflops``.

    Every weight costs one multiplication and one addition a rollout step and three times that a step and epoch of training
    (forward, gradient of the inputs, gradient of the weights): ``(2 + 6 epochs) W`` operations, 26 W with four epochs.
    """
    return 1e9 * gflops / ((2 + 6 * epochs) * weights)


class OthersLoad:
    """Processor time that other programs take, from its making on, by Linux's account of the machine."""

    def __init__(self) -> None:
        self._began, self._busy, self._own = time.monotonic(), _busy_seconds(), _own_seconds()

    def share(self) -> float | None:
        """Share of all cores' time; children count as own once they have ended. ``None`` where the system does not say."""
        now, elapsed = _busy_seconds(), time.monotonic() - self._began
        if now is None or self._busy is None or elapsed <= 0:
            return None
        others = now - self._busy - (_own_seconds() - self._own)
        return min(max(others / (elapsed * (os.cpu_count() or 1)), 0.0), 1.0)


def _busy_seconds() -> float | None:
    """Time that the cores were not idle, all together, since the machine started."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    ticks = [int(number) for number in stat.read_text().splitlines()[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # without idle and waiting for a disk


def _own_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
