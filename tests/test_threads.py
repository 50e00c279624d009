"""Threads: how many there are by default, and that their number changes no result."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from small_runs import EVERYTHING, assert_same, snapshot, tiny, trainer

from hardy import parallel
from hardy.nn import compiled, compiled_step
from hardy.optim import compiled as compiled_optimizer
from hardy.parallel import available_cores, pool, set_threads


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A process that may run on seven cores, in a container whose limits a test writes here."""
    monkeypatch.setattr(parallel, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)), raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 7),
        ({"cpu.max": "max 100000"}, 7),
        ({"cpu.max": "200000 100000"}, 2),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "5000 100000"}, 1),
        ({"cpu.max": "900000 100000"}, 7),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 7),
        ({"cpu.max": ""}, 7),
    ],
)
def test_a_containers_share_of_time_limits_the_cores(cgroup: Path, files: dict[str, str], cores: int) -> None:
    for name, text in files.items():
        (cgroup / name).parent.mkdir(exist_ok=True)
        (cgroup / name).write_text(text + "\n")
    assert available_cores() == cores


def test_by_default_a_run_takes_the_cores_there_are(cgroup: Path) -> None:
    trainer(tiny(threads=None), [1])
    assert pool().threads == 7
    set_threads(1)


if compiled.available():

    @pytest.mark.parametrize("seeds", [[3], [3, 4, 5]])
    def test_the_number_of_threads_changes_no_bit_of_a_training(seeds: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
        for module in (compiled, compiled_step, compiled_optimizer):
            monkeypatch.setattr(module, "SMALLEST_PART", 1)  # a thread for all that can be done apart
        found = []
        for threads in (1, 2, 3):
            run = trainer(tiny(EVERYTHING, threads=threads, policy={"layer_norm": False}), seeds, torch.float32)
            for _ in range(3):
                run.iterate(1000)
            found.append(snapshot(run.state))
        set_threads(1)
        for other in found[1:]:
            assert_same(other, found[0])
