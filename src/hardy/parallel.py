"""Threads for the kernels: each worker runs whole kernel calls with one intra-op thread.

Two Python threads, one kernel each, use two cores better than two intra-op threads inside one kernel, because a step of a
recurrence is too small to split; the interpreter lock is released inside the kernel.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")
MOST_THREADS = 1024
"""More are taken for a slip of the user's."""


CGROUP = Path("/sys/fs/cgroup")


def available_cores() -> int:
    """Cores this process may use; in a container fewer than the machine has: a set of cores, or a share of their time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _share_of_time())))


def _share_of_time() -> float:
    """Seconds of processor time that the container may take in a second; infinite where there is no limit."""
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # second and first version of cgroups
        try:
            quota, period = " ".join((CGROUP / name).read_text() for name in files).split()
            return int(quota) / int(period) if int(quota) > 0 else math.inf
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return math.inf


class WorkerPool:
    """Runs independent tasks on ``threads`` threads; with one thread, or one task, in the caller's."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._executor: ThreadPoolExecutor | None = None
        if threads > 1:
            self._executor = ThreadPoolExecutor(
                threads, thread_name_prefix="hardy", initializer=torch.set_num_threads, initargs=(1,)
            )

    def map(self, function: Callable[[int], Result], count: int) -> Sequence[Result]:
        """``[function(0), ..., function(count - 1)]``, in order; an exception of any of them is raised here."""
        if self._executor is None or count == 1:
            return [function(index) for index in range(count)]
        return list(self._executor.map(function, range(count)))


_pool = WorkerPool(1)


def set_threads(threads: int, *, recurrent: bool = True) -> None:
    """Use ``threads`` threads from now on: those of the recurrent kernels, or PyTorch's own.

    Not both: PyTorch's idle threads would spin on the very cores that the recurrent kernels need.

    Args:
        recurrent: there are kernels that use threads of their own (see `hardy.nn.recurrent.own_threads`).

    Raises:
        ValueError: ``threads`` is below 1.
    """
    global _pool
    if threads < 1:
        raise ValueError(f"threads = {threads}: must be at least 1")
    torch.set_num_threads(1 if recurrent else threads)
    if threads != _pool.threads:
        _pool = WorkerPool(threads)


def pool() -> WorkerPool:
    """The process's worker pool."""
    return _pool
