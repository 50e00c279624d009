"""Freed memory stays with Hardy's own programs."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys

import pytest

from hardy import allocator, cli

REPEATED = """
import ctypes, resource, torch
from hardy.allocator import keep_freed_memory

for option in (-1, -3):  # by itself glibc changes both in the course of a program, more or less by chance
    ctypes.CDLL(None).mallopt(option, 1 << 20)

def work():
    blocks = [torch.ones(1 << 19) for _ in range(10)]

if {kept}:
    keep_freed_memory()
for _ in range(3):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's allocator")
def test_work_of_20_mb_fetches_its_memory_once() -> None:
    """It has 5,120 pages, without the setting ten times."""
    faults = {}
    for kept in (True, False):
        done = subprocess.run([sys.executable, "-c", REPEATED.format(kept=kept)], capture_output=True, text=True, check=True)
        faults[kept] = int(done.stdout)
    assert faults[True] < 500 < faults[False]


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: object) -> object:
        return object()

    monkeypatch.setattr(ctypes, "CDLL", missing)
    allocator.keep_freed_memory()


def test_the_command_line_keeps_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: called.append(True))
    monkeypatch.setattr(cli, "app", lambda: None)
    cli.main()
    assert called == [True]
