"""What a run leaves: the learning-curve picture and summary.json."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import image

from hardy import report
from hardy.metrics import MetricsWriter
from hardy.report import learning_curve, write_summary


def write_run(folder: Path, members: int = 1, rows: int = 30, **constant: float) -> Path:
    """A run whose return falls from 100 to 0 in row 15, when the task changes."""
    with MetricsWriter(folder, members) as writer:
        for index in range(rows):
            values: dict[str, Any] = {"env/drift_changes": float(index >= 15), "time/elapsed": (index + 1) * 0.5}
            values["rollout/ep_rew_mean"] = torch.arange(members) + (100.0 if index < 15 else 0.0)
            values["train/value_loss"] = torch.full((members,), 0.5)
            if index % 10 == 9 and index + 1 < rows:
                values |= {"eval/mean": 50.0, "eval/low": 40.0, "eval/high": 70.0}
            writer.write((index + 1) * 100, values | constant)
        if rows:  # the final evaluation has a row of its own, of the same step
            writer.write(rows * 100, {"eval/mean": 60.0, "eval/low": 30.0, "eval/high": 80.0})
    return folder


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The figures that were turned into pictures."""
    figures: list[Any] = []
    png = report.png
    monkeypatch.setattr(report, "png", lambda figure: (figures.append(figure), png(figure))[1])
    yield figures


def curves(axes: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in axes.get_lines()}


def test_the_picture_shows_returns_changes_and_evaluations(tmp_path: Path, drawn: list[Any]) -> None:
    path = learning_curve(write_run(tmp_path / "job", **{"vgs/scaling_factor": 0.25}))
    assert path == tmp_path / "job" / "learning_curve.png"
    pixels = image.imread(path)
    assert pixels.shape[1] >= 1200
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 50
    top, bottom, right = drawn[0].axes
    assert top.get_title(loc="left") == "job"
    assert curves(top)["training return"].get_ydata().tolist() == [100.0] * 15 + [0.0] * 15
    assert curves(top)["smoothed"].get_ydata().tolist() == [100.0] * 15 + [0.0] * 15  # not smeared over the change
    assert list(curves(top)["task changes"].get_xdata()) == [1600, 1600]
    (bars,) = top.containers
    assert bars[0].get_xydata().tolist() == [[1000, 50], [2000, 50], [3000, 60]]
    assert bars[2][0].get_segments()[0].tolist() == [[1000, 40], [1000, 70]]
    assert bars[2][0].get_segments()[2].tolist() == [[3000, 30], [3000, 80]]
    assert set(bottom.get_lines()[0].get_ydata()) == {0.5}
    assert set(right.get_lines()[0].get_ydata()) == {0.25}


def test_the_picture_of_a_population_shows_its_spread(tmp_path: Path, drawn: list[Any]) -> None:
    learning_curve(write_run(tmp_path, members=3))
    (band,) = drawn[0].axes[0].collections[:1]
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (0.0, 102.0)
    assert set(curves(drawn[0].axes[0])["mean of members"].get_ydata()) == {101.0, 1.0}


def test_a_run_that_wrote_little_still_has_a_picture(tmp_path: Path, drawn: list[Any]) -> None:
    for rows in (0, 1):
        assert learning_curve(write_run(tmp_path / str(rows), rows=rows)).exists()
    (tmp_path / "0" / "metrics.csv").write_text("")
    learning_curve(tmp_path / "0")
    with MetricsWriter(tmp_path / "nan", 2) as writer:
        writer.write(1, {"rollout/ep_rew_mean": torch.full((2,), math.nan), "eval/mean": 1.0})
    learning_curve(tmp_path / "nan")
    assert len(drawn) == 4
    with pytest.raises(FileNotFoundError):
        learning_curve(tmp_path)


def test_a_value_loss_over_orders_of_magnitude_is_drawn_on_a_log_axis(tmp_path: Path, drawn: list[Any]) -> None:
    with MetricsWriter(tmp_path, 1) as writer:
        for step, loss in enumerate((100.0, 1.0)):
            writer.write(step, {"train/value_loss": loss})
    learning_curve(tmp_path)
    assert drawn[0].axes[1].get_yscale() == "log"


@settings(deadline=None, max_examples=25)
@given(values=st.lists(st.floats(-1e6, 1e6), max_size=60))
def test_smoothing_keeps_length_ends_and_bounds(values: list[float]) -> None:
    smooth = report._smooth(np.array(values, dtype=np.float64))
    assert len(smooth) == len(values)
    if values:
        np.testing.assert_allclose(smooth[[0, -1]], [values[0], values[-1]], atol=1e-6)
        assert smooth.min() >= min(values) - 1e-6
        assert smooth.max() <= max(values) + 1e-6
    line = np.arange(float(len(values)))
    np.testing.assert_allclose(report._smooth(line), line, atol=1e-9)


def test_summary_says_what_ran_and_how_it_went(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "job")
    evaluation = {"mean": 90.0, "low": math.nan, "high": 95, "episodes": 20}
    path = write_summary(folder, seed=7, status="failed", evaluation=evaluation, error="no disk")
    summary = json.loads(path.read_text())
    assert path.name == "summary.json"
    assert (summary["run"], summary["seed"], summary["status"], summary["error"]) == ("job", 7, "failed", "no disk")
    assert (summary["total_timesteps"], summary["wall_time_seconds"], summary["steps_per_second"]) == (3000, 15.0, 200.0)
    assert summary["return_last_100_episodes"] == 0.0
    assert summary["evaluation"] == {"mean": 90.0, "low": None, "high": 95, "episodes": 20}
    assert summary["versions"]["torch"] == torch.__version__
    assert set(summary["versions"]) == {"python", "hardy", "torch", "numpy", "gymnasium"}
    assert summary["machine"]["cores"] >= 1


def test_summary_of_a_population_names_its_best_and_counts_the_steps_of_all(tmp_path: Path) -> None:
    population = {"size": 4, "best_member": 2, "exploits": 7}
    path = write_summary(write_run(tmp_path, members=4), seed=0, status="finished", population=population)
    summary = json.loads(path.read_text())
    assert summary["population"] == population
    assert (summary["total_timesteps"], summary["steps_per_second"]) == (3000, 800.0)
    assert summary["return_last_100_episodes"] == 1.5


def test_summary_falls_back_on_the_last_evaluation_and_on_nothing(tmp_path: Path) -> None:
    summary = json.loads(write_summary(write_run(tmp_path / "a"), seed=0, status="finished").read_text())
    assert summary["evaluation"] == {"mean": 60.0, "low": 30.0, "high": 80.0, "episodes": None}
    assert "error" not in summary
    assert "population" not in summary
    empty = json.loads(write_summary(write_run(tmp_path / "b", rows=0), seed=0, status="interrupted").read_text())
    assert empty["total_timesteps"] == 0
    assert empty["steps_per_second"] is empty["return_last_100_episodes"] is empty["evaluation"]["mean"] is None
