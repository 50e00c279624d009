"""What a run leaves for people: a learning-curve picture and ``summary.json``, made from the run's folder alone."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hardy.checkpoint import package_version, write_bytes_atomic, write_json_atomic
from hardy.figures import BLUE, GREEN, INK, MUTED, ORANGE, RED, label_steps, legend_above, new_figure, png, set_title, style
from hardy.metrics import STEP, read_metrics
from hardy.parallel import available_cores

Status = Literal["finished", "interrupted", "failed"]
SUMMARY = "summary.json"
_SERIES = (BLUE, ORANGE, GREEN, RED, "#7c3aed")
_VERSIONS = ("hardy", "torch", "numpy", "gymnasium")


def learning_curve(folder: Path) -> Path:
    """Draw ``learning_curve.png`` from ``metrics.csv``: the return over steps, and below it the value loss and the VGS factor.

    Dotted lines mark the steps at which the task changed. In a population the line is the mean and the band reaches from the
    worst member to the best.

    Raises:
        FileNotFoundError: the folder holds no ``metrics.csv``.
    """
    metrics = read_metrics(folder)
    figure = new_figure(9.0, 5.4)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 1))
    set_title(top, folder.resolve().name)
    _draw_return(top, metrics)
    _draw_losses(bottom, metrics)
    for axes in (top, bottom):
        style(axes)
        for index, step in enumerate(_changes(metrics)):
            label = "task changes" if axes is top and index == 0 else None
            axes.axvline(step, color=MUTED, linewidth=1, linestyle=(0, (1, 2)), zorder=1, label=label)
    legend_above(top)
    label_steps(bottom)
    path = folder / "learning_curve.png"
    write_bytes_atomic(path, png(figure))
    return path


def write_summary(
    folder: Path,
    *,
    seed: int,
    status: Status,
    evaluation: Mapping[str, float | int] | None = None,
    error: str | None = None,
    population: Mapping[str, int] | None = None,
) -> Path:
    """Write ``summary.json``: what was run, how long it took, how well it went, and on what.

    Args:
        folder: the run's folder, named as the run, with its ``metrics.csv``.
        seed: of the run.
        status: how it ended.
        evaluation: the final evaluation's ``mean``, ``low``, ``high`` and ``episodes``. Without it, the last one in
            ``metrics.csv``, whose number of episodes is not known.
        error: what went wrong, for a run that failed.
        population: of more than one member, its ``size``, ``best_member`` and number of ``exploits``. Then the return is the
            mean over the members, ``total_timesteps`` are those of one member, and the steps per second those of all.

    Raises:
        FileNotFoundError: the folder holds no ``metrics.csv``.
    """
    metrics = read_metrics(folder)
    if evaluation is None:
        evaluation = {name: _last(metrics, f"eval/{name}") for name in ("mean", "low", "high")}
    steps, seconds = _last(metrics, STEP), _last(metrics, "time/elapsed")
    members = 1 if population is None else population["size"]
    summary: dict[str, Any] = {
        "run": folder.resolve().name,
        "status": status,
        "seed": seed,
        "total_timesteps": 0 if math.isnan(steps) else int(steps),
        "wall_time_seconds": _number(seconds),
        "steps_per_second": _number(members * steps / seconds) if seconds > 0 else None,
        "return_last_100_episodes": _number(_last(metrics, "rollout/ep_rew_mean")),
        "evaluation": {name: _number(evaluation.get(name)) for name in ("mean", "low", "high", "episodes")},
        "versions": {"python": platform.python_version()} | {name: package_version(name) for name in _VERSIONS},
        "machine": {"system": platform.system(), "processor": platform.machine(), "cores": available_cores()},
    }
    if population is not None:
        summary["population"] = dict(population)
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
    written = [{name: value if isinstance(value, str) else _number(value) for name, value in row.items()} for row in rows]
    write_json_atomic(folder / "attack.json", written)
    figure = new_figure(9.0, 4.2)
    axes = figure.subplots()
    set_title(axes, folder.resolve().name)
    natural, attacked = rows[0], rows[1:]
    axes.axhspan(natural["low"], natural["high"], color=MUTED, alpha=0.2, linewidth=0, label="natural")
    for color, name in zip(_SERIES, dict.fromkeys(row["attack"] for row in attacked), strict=False):
        points = [natural, *sorted((row for row in attacked if row["attack"] == name), key=lambda row: row["epsilon"])]
        radius, mean, low, high = (np.array([row[key] for row in points]) for key in ("epsilon", "mean", "low", "high"))
        error = np.nan_to_num(np.abs(np.stack([low, high]) - mean), posinf=0.0)
        axes.errorbar(radius, mean, yerr=error, color=color, marker="o", markersize=4, capsize=3, linewidth=1.6, label=name)
    style(axes)
    legend_above(axes)
    axes.set_xlabel("radius of the attack, in deviations of the normalised observation", color=INK)
    axes.set_ylabel("return", color=INK)
    path = folder / "attack.png"
    write_bytes_atomic(path, png(figure))
    return path


def _draw_return(axes: Any, metrics: Mapping[str, np.ndarray]) -> None:
    name = "rollout/ep_rew_mean"
    steps, values = _points(metrics, name)
    members = [column for column in metrics if column.startswith(f"{name}/member_")]
    if members:
        table = np.stack([metrics[column] for column in members])
        known = np.isfinite(table).any(axis=0)
        low, high = np.nanmin(table[:, known], axis=0), np.nanmax(table[:, known], axis=0)
        axes.fill_between(metrics[STEP][known], low, high, color=BLUE, alpha=0.15, linewidth=0, label="worst to best member")
    else:
        axes.plot(steps, values, color=BLUE, alpha=0.3, linewidth=1, label="training return")
    cuts = np.searchsorted(steps, _changes(metrics))  # smoothing across a change would show the fall before its cause
    smooth = np.concatenate([_smooth(part) for part in np.split(values, cuts)])
    axes.plot(steps, smooth, color=BLUE, linewidth=2, label="mean of members" if members else "smoothed")
    at, mean = _points(metrics, "eval/mean")
    if len(at):
        known = np.isfinite(metrics["eval/mean"])  # not by step: the last iteration's own row has the same one
        spread = np.stack([metrics[f"eval/{end}"][known] for end in ("low", "high")])
        error = np.nan_to_num(np.abs(spread - mean), posinf=0.0)
        style = {"fmt": "o", "color": GREEN, "markersize": 5, "capsize": 3, "linewidth": 1.2, "zorder": 4}
        axes.errorbar(at, mean, yerr=error, label="evaluation, 95 % interval", **style)
    axes.set_ylabel("return", color=INK)


def _draw_losses(axes: Any, metrics: Mapping[str, np.ndarray]) -> None:
    steps, loss = _points(metrics, "train/value_loss")
    axes.plot(steps, loss, color=ORANGE, linewidth=1.4)
    axes.set_ylabel("value loss", color=ORANGE)
    if len(loss) and loss.min() > 0 and loss.max() > 50 * loss.min():
        axes.set_yscale("log")
    steps, factor = _points(metrics, "vgs/scaling_factor")
    if len(steps):
        right = axes.twinx()
        right.plot(steps, factor, color=GREEN, linewidth=1.4)
        right.set_ylim(-0.08, 1.08)
        right.set_yticks((0, 0.5, 1))
        right.set_ylabel("VGS factor", color=GREEN)
        right.tick_params(colors=MUTED, length=0, labelsize=9)
        right.spines[:].set_visible(False)


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
