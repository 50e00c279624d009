"""The measurement of training on a device, on the processor."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import device


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(device, "RESULTS", tmp_path)
    monkeypatch.setattr(device, "WARMUP", 1)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["device", *arguments])
    device.main()


def test_it_measures_what_was_asked_for(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ("--population", "1", "2", "--envs", "4", "--iterations", "1")
    run(monkeypatch, "--device", "cpu", *sizes, "--out", "small")
    rows = json.loads((results / "small.json").read_text())["rows"]
    assert [(row["population"], row["envs"]) for row in rows] == [(1, 4), (2, 4)]
    assert all(0 < row["lowest"] <= row["steps_per_second"] <= row["highest"] for row in rows)
    assert "P =   2, N = 4: " in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--population", "--envs", "--iterations"])
def test_sizes_are_whole_numbers_from_1(
    option: str, results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, "--device", "cpu", option, "0")
    assert stopped.value.code == 2
    assert f"{option}: '0': allowed are whole numbers from 1" in capsys.readouterr().err
