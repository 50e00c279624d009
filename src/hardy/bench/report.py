"""Results for people: tables, in the terminal and as ``bench.md``, and one picture for each section."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hardy.bench.compare import TOLERANCE, Comparison
from hardy.bench.results import Machine, Measurement, Result, SectionResult
from hardy.checkpoint import write_bytes_atomic, write_text_atomic
from hardy.figures import BLUE, INK, MUTED, new_figure, png, set_title, style

REPORT = "bench.md"
BUSY = 0.05
"""Share of the machine that other programs may take before it is worth a warning."""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table whose columns are aligned; all but the first are numbers and end on the right."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        aligned = [
            cell.ljust(width) if at == 0 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(aligned)} |"

    rule = [f"{'-' * (width + 1)}{'-' if at == 0 else ':'}" for at, width in enumerate(widths)]
    return [line(head), f"|{'|'.join(rule)}|", *(line(row) for row in rows)]


def section_lines(section: SectionResult) -> list[str]:
    """Heading, measurements and ratios of one section."""
    lines = [f"## {section.name}{'' if section.complete else ' (interrupted)'}", ""]
    if section.others is not None and section.others > BUSY:
        lines += [f"Other programs took {section.others:.0%} of the machine meanwhile: the speeds are too low.", ""]
    measured = [[found.name, *_numbers(found), found.unit] for found in section.measurements]
    lines += [*table(["measurement", "median", "lowest", "highest", "unit"], measured), ""]
    if section.ratios:
        ratios = [[found.name, *_numbers(found), found.better] for found in section.ratios]
        lines += [*table(["ratio", "median", "lowest", "highest", "better"], ratios), ""]
    return lines


def machine_lines(machine: Machine) -> list[str]:
    """The machine and the versions, in two sentences."""
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    libraries = "with" if machine.compiled else "without"
    return [
        f"{machine.processor}, {machine.cores} cores, {machine.memory_mib:,} MiB, {machine.system}.",
        f"{versions}; {libraries} Hardy's compiled library.",
    ]


def comparison_lines(comparison: Comparison) -> list[str]:
    """Every ratio then and now, and which got too much worse."""
    rows = [
        [
            f"{change.section}: {change.new.name}",
            f"{change.old.median:.3f}",
            f"{change.new.median:.3f}",
            f"{change.factor:.3f}",
            change.new.better,
            "REGRESSION" if change.regression else "",
        ]
        for change in comparison.changes
    ]
    lines = table(["ratio", "old", "new", "new/old", "better", ""], rows)
    if comparison.machines_differ:
        lines.append("The results come from different machines, whose ratios may differ by themselves.")
    if comparison.compiled_differs:
        lines.append("Only one of the results was measured with Hardy's compiled library.")
    if comparison.missing:
        sections = ", ".join(sorted({name.split(":")[0] for name in comparison.missing}))
        lines.append(f"Not compared, because one of the results lacks them: {len(comparison.missing)} ratios of {sections}.")
    count = len(comparison.regressions)
    if count:
        lines.append(f"{count} of {len(rows)} ratios got worse by more than {TOLERANCE:.0%}.")
    else:
        lines.append(f"No ratio of {len(rows)} got worse by more than {TOLERANCE:.0%}.")
    return lines


def write(result: Result, folder: Path) -> None:
    """Write ``bench.md`` and a picture for each section."""
    lines = ["# Benchmark", "", f"{result.date}.", *machine_lines(result.machine), ""]
    lines += [line for section in result.sections for line in section_lines(section)]
    write_text_atomic(folder / REPORT, "\n".join(lines).rstrip() + "\n")
    for section in result.sections:
        write_bytes_atomic(folder / f"{section.name}.png", picture(section))


def picture(section: SectionResult) -> bytes:
    """One panel for each group and unit: a curve where its labels are numbers, bars elsewhere; whiskers are the spread."""
    grouped: dict[tuple[str, str], list[Measurement]] = {}
    for one in section.measurements:
        grouped.setdefault((one.group, one.unit), []).append(one)
    panels = list(grouped.values())
    heights = [2.4 if _is_curve(found) else 0.6 + 0.32 * len(found) for found in panels]
    figure = new_figure(9.0, 0.8 * len(panels) + sum(heights))
    all_axes = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axes, found in zip(all_axes, panels, strict=True):
        set_title(axes, f"{section.name}: {found[0].group}", below=8.0)
        (_draw_curve if _is_curve(found) else _draw_bars)(axes, found)
        style(axes)
    return png(figure)


def _is_curve(found: Sequence[Measurement]) -> bool:
    return len(found) > 1 and all(one.x is not None for one in found)


def _draw_curve(axes: Any, found: Sequence[Measurement]) -> None:
    ordered = sorted(found, key=lambda one: one.x or 0)
    x, median = [one.x for one in ordered], [one.median for one in ordered]
    axes.errorbar(x, median, yerr=_whiskers(ordered), color=BLUE, marker="o", markersize=4, capsize=3, linewidth=1.6)
    axes.set_xscale("log", base=2)
    axes.set_xticks(x, [one.label for one in ordered])
    axes.set_ylim(bottom=0)
    axes.set_ylabel(found[0].unit, color=INK)


def _draw_bars(axes: Any, found: Sequence[Measurement]) -> None:
    medians = [one.median for one in found]
    whiskers = {"ecolor": MUTED, "capsize": 3}
    axes.barh([one.label for one in found], medians, color=BLUE, height=0.6, xerr=_whiskers(found), error_kw=whiskers)
    axes.invert_yaxis()
    if max(medians) > 30 * min(medians):
        axes.set_xscale("log")
    elif max(medians) >= 1000:
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel(found[0].unit, color=INK)


def _whiskers(found: Sequence[Measurement]) -> np.ndarray:
    return np.array([[one.median - one.low, one.high - one.median] for one in found]).T


def _numbers(found: Any) -> list[str]:
    numbers = (found.median, found.low, found.high)
    largest = max(abs(number) for number in numbers)
    decimals = 0 if largest >= 1000 else 1 if largest >= 100 else 2 if largest >= 10 else 3
    return [f"{number:,.{decimals}f}" for number in numbers]
