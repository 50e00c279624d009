"""What a population run leaves for people: who descends from whom, and which hyperparameters won, from the folder alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from hardy.checkpoint import write_bytes_atomic
from hardy.figures import BLUE, GRID, INK, MUTED, ORANGE, RED, label_steps, legend_above, new_figure, png, set_title, style
from hardy.lineage import MemberRecord, ancestry, best_member, read_population

LINEAGE, SCHEDULES = "lineage.png", "schedules.png"
_NUMBERED = 24  # members that can all have their number beside their lane
_DECADE = 10.0
_UNSCORED = "#cbd2d9"


def lineage_picture(folder: Path) -> Path:
    """Draw ``lineage.png`` from ``population.csv``: who descends from whom.

    Each member has a lane. Between two exchanges its line has the colour of the score that it reached at the second one. Where
    it was replaced, a curve comes from its parent's lane. The lineage of the best member lies on top.

    Raises:
        FileNotFoundError: the folder holds no ``population.csv``.
    """
    records = read_population(folder)
    winner = ancestry(records, best_member(records)) if records else []
    size = max((record.member for record in records), default=0) + 1
    height = min(1.7 + max(0.28 * size, 1.4), 13.0)
    figure = new_figure(min(max(11.0, 0.09 * len(winner)), 18.0), height)
    axes = figure.subplots()
    set_title(axes, folder.resolve().name)
    style(axes)
    axes.grid(False)
    axes.hlines(range(size), 0, 1, transform=axes.get_yaxis_transform(), color=GRID, linewidth=0.8, zorder=1)
    pieces = _pieces(records)
    scores = [piece.score for piece in pieces if math.isfinite(piece.score)]
    shades = _shades(scores)
    _draw_lineages(axes, pieces, winner, shades)
    if scores:
        below = "min" if min(scores) < shades.norm.vmin else "neither"
        bar = figure.colorbar(shades, ax=axes, pad=0.015, fraction=0.05, aspect=7 * height, extend=below, extendfrac=0.02)
        bar.set_label("score", color=INK)
        bar.outline.set_visible(False)
        bar.ax.tick_params(colors=MUTED, length=0, labelsize=9)
    axes.set_ylim(size - 0.4, -0.6)
    axes.set_ylabel("member", color=INK)
    axes.set_yticks(range(0, size, 1 if size <= _NUMBERED else 4))
    label_steps(axes)
    path = folder / LINEAGE
    write_bytes_atomic(path, png(figure))
    return path


def schedule_picture(folder: Path) -> Path:
    """Draw ``schedules.png`` from ``population.csv``: every tuned hyperparameter over the steps.

    Each member is a thin grey line, the lineage of the best member a thick one. An axis is logarithmic where the values span
    more than a factor of ten, and so is that of numbers below 1 whose distances from 1 do.

    Raises:
        FileNotFoundError: the folder holds no ``population.csv``.
    """
    from matplotlib.lines import Line2D

    records = read_population(folder)
    winner = ancestry(records, best_member(records)) if records else []
    names = list(winner[0].after) if winner else []
    columns = {0: 1, 1: 1, 2: 2, 4: 2}.get(len(names), 3)
    rows = max(1, math.ceil(len(names) / columns))
    figure = new_figure(max(4.2 * columns, 7.0), 2.5 * rows + 1.1)
    figure.get_layout_engine().set(hspace=0.06, wspace=0.04)
    panels = list(figure.subplots(rows, columns, sharex=True, squeeze=False).flat)
    for name, axes in zip(names, panels, strict=False):
        _draw_schedule(axes, name, records, winner)
    for axes in panels[len(names) :]:
        axes.remove()
    for axes in panels[max(len(names) - columns, 0) : len(names)]:  # the lowest of each column
        axes.tick_params(labelbottom=True)
        label_steps(axes, ticks=4)
    handles = [Line2D([], [], color=MUTED, linewidth=0.8, label="every member")]
    if winner:
        best = f"lineage of the best: member {winner[-1].member}"
        handles.insert(0, Line2D([], [], color=BLUE, linewidth=2.4, label=best))
    title = {"title": folder.resolve().name, "title_fontproperties": {"size": 13, "weight": "bold"}, "alignment": "left"}
    look = {"ncols": 2, "frameon": False, "fontsize": 9, "labelcolor": INK, "handlelength": 1.6}
    figure.legend(handles=handles, loc="outside upper left", **title, **look).get_title().set_color(INK)
    path = folder / SCHEDULES
    write_bytes_atomic(path, png(figure))
    return path


@dataclass(frozen=True)
class _Piece:
    """What a member did from one exchange to the next: a curve from its parent's lane if it was replaced, then its own lane."""

    record: MemberRecord
    curve: Float[np.ndarray, "points 2"]
    lane: Float[np.ndarray, "2 2"]
    score: float  # at the next exchange, of what it learnt on the way; NaN where there is none


def _pieces(records: Sequence[MemberRecord]) -> list[_Piece]:
    steps = {record.exchange: record.step for record in records}
    exchanges = sorted(steps)
    score = {(record.exchange, record.member): record.score for record in records}
    widest = max(0.05 * (max(steps.values(), default=0) - min(steps.values(), default=0)), 1.0)
    pieces = []
    for begin, end in zip(exchanges, [*exchanges[1:], None], strict=False):
        length = widest if end is None else steps[end] - steps[begin]  # where a run stopped at an exchange: a stub
        for record in (record for record in records if record.exchange == begin):
            if end is None and record.parent == record.member and len(exchanges) > 1:
                continue
            time = np.linspace(0, 1, 17 if record.parent != record.member else 1)
            lanes = record.parent + (record.member - record.parent) * time**2 * (3 - 2 * time)
            curve = np.stack([record.step + min(widest, 0.6 * length) * time, lanes], axis=1)
            lane = np.array([[curve[-1, 0], record.member], [record.step + length, record.member]])
            pieces.append(_Piece(record, curve, lane, math.nan if end is None else score.get((end, record.member), math.nan)))
    return pieces


def _draw_lineages(axes: Any, pieces: Sequence[_Piece], winner: Sequence[MemberRecord], shades: Any) -> None:
    from matplotlib.collections import LineCollection

    won = {(record.exchange, record.member) for record in winner}
    best = [piece for piece in pieces if (piece.record.exchange, piece.record.member) in won]
    copies = [piece for piece in pieces if len(piece.curve) > 1]
    path = [np.concatenate([piece.curve, piece.lane]) for piece in best]
    crowd = min(1.0, 300 / max(len(copies), 1))  # many curves must not hide the lanes, nor many lanes the winner
    thin = 0.65 + 0.35 * crowd
    for colour, width in (("white", 9.5), (ORANGE, 6.5)) if path else ():
        axes.plot(*np.concatenate(path).T, color=colour, linewidth=width * thin, solid_capstyle="butt", zorder=4)
    for shown, lines, look in (
        (copies, [piece.curve for piece in copies], {"linewidths": 1.2 * thin, "alpha": max(crowd, 0.25), "zorder": 2}),
        (pieces, [piece.lane for piece in pieces], {"linewidths": 2.4 * thin, "zorder": 3}),
        (best, path, {"linewidths": 2.6 * thin**2, "zorder": 5}),
    ):
        collection = LineCollection(lines, cmap=shades.cmap, norm=shades.norm, capstyle="butt", **look)
        collection.set_array(np.ma.masked_invalid([piece.score for piece in shown]))
        axes.add_collection(collection)
    healed = [piece.record for piece in copies if piece.record.event == "healed"]
    moved = [piece.record for piece in copies if piece.record.event == "migrated"]
    for at, marker, colour in ((healed, "x", RED), (moved, "d", INK)):
        place = [record.step for record in at], [record.member for record in at]
        axes.scatter(*place, marker=marker, s=24 * thin**3, color=colour, linewidths=1.4 * thin, zorder=6)
    unscored = any(not math.isfinite(piece.score) for piece in pieces)
    if winner:
        legend_above(axes, handles=_keys(winner[-1], bool(copies), bool(moved), bool(healed), unscored))


def _keys(best: MemberRecord, copied: bool, moved: bool, healed: bool, unscored: bool) -> list[Any]:
    from matplotlib.lines import Line2D

    score = f", score {best.score:.4g} ± {best.standard_error:.2g}" if math.isfinite(best.score) else ""
    alone = {"linestyle": "none", "markersize": 5}
    keys: list[tuple[bool, str, dict[str, Any]]] = [
        (True, f"lineage of the best: member {best.member}{score}", {"color": ORANGE, "linewidth": 6.5}),
        (copied, "copies another", {"color": MUTED, "linewidth": 1.2}),
        (moved, "copies weights only", {"color": INK, "marker": "d", **alone}),
        (healed, "was not finite", {"color": RED, "marker": "x", **alone}),
        (unscored, "no score", {"color": _UNSCORED, "linewidth": 2.4}),
    ]
    return [Line2D([], [], label=label, **look) for present, label, look in keys if present]


def _shades(scores: Sequence[float]) -> Any:
    """From pale for a low score to dark for a high one; a few very low scores of the start do not use up the scale."""
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    low, high = (float(np.percentile(scores, 5)), max(scores)) if scores else (0.0, 1.0)
    if low == high:
        low, high = low - 0.5, high + 0.5
    colours = ListedColormap(matplotlib.colormaps["YlGnBu"](np.linspace(0.25, 1, 256))).with_extremes(bad=_UNSCORED)
    return ScalarMappable(Normalize(low, high), colours)


def _draw_schedule(axes: Any, name: str, records: Sequence[MemberRecord], winner: Sequence[MemberRecord]) -> None:
    from matplotlib.collections import LineCollection

    steps = [record.step for record in records]
    end = max(*steps, min(steps) + 1)
    members = sorted({record.member for record in records})
    lines = [_stairs([record for record in records if record.member == member], name, end) for member in members]
    axes.add_collection(LineCollection(lines, colors=MUTED, linewidths=0.7, alpha=max(0.25, 0.8 - len(members) / 80), zorder=2))
    axes.plot(*_stairs(winner, name, end).T, color=BLUE, linewidth=2.4, solid_joinstyle="round", zorder=3)
    style(axes)
    axes.set_title(name, loc="left", fontsize=10, color=INK)
    values = np.concatenate(lines)[:, 1]
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0:
        if values.max() > _DECADE * values.min():
            axes.set_yscale("log")
        elif values.max() < 1 and 1 - values.min() > _DECADE * (1 - values.max()):
            axes.set_yscale("logit")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter(lambda value, _: "")
    axes.autoscale_view()


def _stairs(records: Sequence[MemberRecord], name: str, end: int) -> Float[np.ndarray, "points 2"]:
    """Step line through the values with which each record goes on."""
    steps = np.array([record.step for record in records] + [end])
    values = np.array([record.after[name] for record in records])
    return np.stack([np.repeat(steps, 2)[1:-1], np.repeat(values, 2)], axis=1)
