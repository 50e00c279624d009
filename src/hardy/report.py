"""What a run leaves for people: a learning-curve picture and ``summary.json``, made from the run's folder alone."""

from __future__ import annotations

import io
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hardy.checkpoint import package_version, write_bytes_atomic, write_json_atomic
from hardy.metrics import STEP, read_metrics
from hardy.nn.parallel import available_cores

Status = Literal["finished", "interrupted", "failed"]
SUMMARY = "summary.json"
_INK, _MUTED, _GRID = "#1f2933", "#7b8794", "#e4e7eb"
_BLUE, _ORANGE, _GREEN = "#2563eb", "#d97706", "#059669"
_SERIES = (_BLUE, _ORANGE, _GREEN, "#dc2626", "#7c3aed")
_VERSIONS = ("hardy", "torch", "numpy", "gymnasium")


def learning_curve(folder: Path) -> Path:
    """Draw ``learning_curve.png`` from ``metrics.csv``: the return over steps, and below it the value loss and the VGS factor.

    Dotted lines mark the steps at which the task changed. In a population the line is the mean and the band reaches from the
    worst member to the best.

    Raises:
        FileNotFoundError: the folder holds no ``metrics.csv``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and only reports need it
    from matplotlib.figure import Figure

    metrics = read_metrics(folder)
    figure = Figure(figsize=(9, 5.4), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 1))
    top.set_title(folder.resolve().name, loc="left", fontsize=13, fontweight="bold", color=_INK, pad=26)
    _draw_return(top, metrics)
    _draw_losses(bottom, metrics)
    for axes in (top, bottom):
        _style(axes)
        for index, step in enumerate(_changes(metrics)):
            label = "task changes" if axes is top and index == 0 else None
            axes.axvline(step, color=_MUTED, linewidth=1, linestyle=(0, (1, 2)), zorder=1, label=label)
    if top.get_legend_handles_labels()[0]:
        place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.3, "ncols": 4}  # never over the curve
        top.legend(**place, frameon=False, fontsize=9, labelcolor=_INK, handlelength=1.6, columnspacing=1.6, borderpad=0)
    bottom.set_xlabel("environment steps", color=_INK)
    bottom.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    path = folder / "learning_curve.png"
    write_bytes_atomic(path, _png(figure))
    return path


def write_summary(
    folder: Path, *, seed: int, status: Status, evaluation: Mapping[str, float | int] | None = None, error: str | None = None
) -> Path:
    """Write ``summary.json``: what was run, how long it took, how well it went, and on what.

    Args:
        folder: the run's folder, named as the run, with its ``metrics.csv``.
        seed: of the run.
        status: how it ended.
        evaluation: the final evaluation's ``mean``, ``low``, ``high`` and ``episodes``. Without it, the last one in
            ``metrics.csv``, whose number of episodes is not known.
        error: what went wrong, for a run that failed.

    Raises:
        FileNotFoundError: the folder holds no ``metrics.csv``.
    """
    metrics = read_metrics(folder)
    if evaluation is None:
        evaluation = {name: _last(metrics, f"eval/{name}") for name in ("mean", "low", "high")}
    steps, seconds = _last(metrics, STEP), _last(metrics, "time/elapsed")
    summary: dict[str, Any] = {
        "run": folder.resolve().name,
        "status": status,
        "seed": seed,
        "total_timesteps": 0 if math.isnan(steps) else int(steps),
        "wall_time_seconds": _number(seconds),
        "steps_per_second": _number(steps / seconds) if seconds > 0 else None,
        "return_last_100_episodes": _number(_last(metrics, "rollout/ep_rew_mean")),
        "evaluation": {name: _number(evaluation.get(name)) for name in ("mean", "low", "high", "episodes")},
        "versions": {"python": platform.python_version()} | {name: package_version(name) for name in _VERSIONS},
        "machine": {"system": platform.system(), "processor": platform.machine(), "cores": available_cores()},
    }
    if error is not None:
        summary["error"] = error
    path = folder / SUMMARY
    write_json_atomic(path, summary)
    return path


def attack_report(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write ``attack.json``, and draw ``attack.png``: the return over the radius of each attack, with 95 % intervals.

    Args:
        rows: ``attack``, ``epsilon``, ``mean``, ``low``, ``high`` and ``episodes`` each; the first is without attack.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    written = [{name: value if isinstance(value, str) else _number(value) for name, value in row.items()} for row in rows]
    write_json_atomic(folder / "attack.json", written)
    figure = Figure(figsize=(9, 4.2), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    axes.set_title(folder.resolve().name, loc="left", fontsize=13, fontweight="bold", color=_INK, pad=26)
    natural, attacked = rows[0], rows[1:]
    axes.axhspan(natural["low"], natural["high"], color=_MUTED, alpha=0.2, linewidth=0, label="natural")
    for color, name in zip(_SERIES, dict.fromkeys(row["attack"] for row in attacked), strict=False):
        points = [natural, *sorted((row for row in attacked if row["attack"] == name), key=lambda row: row["epsilon"])]
        radius, mean, low, high = (np.array([row[key] for row in points]) for key in ("epsilon", "mean", "low", "high"))
        error = np.nan_to_num(np.abs(np.stack([low, high]) - mean), posinf=0.0)
        axes.errorbar(radius, mean, yerr=error, color=color, marker="o", markersize=4, capsize=3, linewidth=1.6, label=name)
    _style(axes)
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.3, "ncols": 6}
    axes.legend(**place, frameon=False, fontsize=9, labelcolor=_INK, handlelength=1.6, columnspacing=1.6, borderpad=0)
    axes.set_xlabel("radius of the attack, in deviations of the normalised observation", color=_INK)
    axes.set_ylabel("return", color=_INK)
    path = folder / "attack.png"
    write_bytes_atomic(path, _png(figure))
    return path


def _draw_return(axes: Any, metrics: Mapping[str, np.ndarray]) -> None:
    name = "rollout/ep_rew_mean"
    steps, values = _points(metrics, name)
    members = [column for column in metrics if column.startswith(f"{name}/member_")]
    if members:
        table = np.stack([metrics[column] for column in members])
        known = np.isfinite(table).any(axis=0)
        low, high = np.nanmin(table[:, known], axis=0), np.nanmax(table[:, known], axis=0)
        axes.fill_between(metrics[STEP][known], low, high, color=_BLUE, alpha=0.15, linewidth=0, label="worst to best member")
    else:
        axes.plot(steps, values, color=_BLUE, alpha=0.3, linewidth=1, label="training return")
    cuts = np.searchsorted(steps, _changes(metrics))  # smoothing across a change would show the fall before its cause
    smooth = np.concatenate([_smooth(part) for part in np.split(values, cuts)])
    axes.plot(steps, smooth, color=_BLUE, linewidth=2, label="mean of members" if members else "smoothed")
    at, mean = _points(metrics, "eval/mean")
    if len(at):
        known = np.isfinite(metrics["eval/mean"])  # not by step: the last iteration's own row has the same one
        spread = np.stack([metrics[f"eval/{end}"][known] for end in ("low", "high")])
        error = np.nan_to_num(np.abs(spread - mean), posinf=0.0)
        style = {"fmt": "o", "color": _GREEN, "markersize": 5, "capsize": 3, "linewidth": 1.2, "zorder": 4}
        axes.errorbar(at, mean, yerr=error, label="evaluation, 95 % interval", **style)
    axes.set_ylabel("return", color=_INK)


def _draw_losses(axes: Any, metrics: Mapping[str, np.ndarray]) -> None:
    steps, loss = _points(metrics, "train/value_loss")
    axes.plot(steps, loss, color=_ORANGE, linewidth=1.4)
    axes.set_ylabel("value loss", color=_ORANGE)
    if len(loss) and loss.min() > 0 and loss.max() > 50 * loss.min():
        axes.set_yscale("log")
    steps, factor = _points(metrics, "vgs/scaling_factor")
    if len(steps):
        right = axes.twinx()
        right.plot(steps, factor, color=_GREEN, linewidth=1.4)
        right.set_ylim(-0.08, 1.08)
        right.set_yticks((0, 0.5, 1))
        right.set_ylabel("VGS factor", color=_GREEN)
        right.tick_params(colors=_MUTED, length=0, labelsize=9)
        right.spines[:].set_visible(False)


def _style(axes: Any) -> None:
    axes.grid(True, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_MUTED, length=0, labelsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.margins(x=0.01)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _points(metrics: Mapping[str, np.ndarray], name: str) -> tuple[np.ndarray, np.ndarray]:
    if name not in metrics or STEP not in metrics:
        return np.empty(0), np.empty(0)
    known = np.isfinite(metrics[name])
    return metrics[STEP][known], metrics[name][known]


def _smooth(values: np.ndarray, share: float = 0.1) -> np.ndarray:
    """Centred moving average over ``share`` of the values, its window shrinking towards both ends so that none is invented."""
    half = int(len(values) * share / 2)
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(half, np.minimum(index, len(values) - 1 - index))
    return np.asarray((total[index + reach + 1] - total[index - reach]) / (2 * reach + 1))


def _changes(metrics: Mapping[str, np.ndarray]) -> np.ndarray:
    steps, count = _points(metrics, "env/drift_changes")
    return steps[1:][np.diff(count) > 0]


def _last(metrics: Mapping[str, np.ndarray], name: str) -> float:
    known = metrics[name][~np.isnan(metrics[name])] if name in metrics else np.empty(0)
    return float(known[-1]) if len(known) else math.nan


def _number(value: float | int | None) -> float | int | None:
    # JSON has neither NaN nor infinity.
    return value if value is not None and math.isfinite(value) else None
