"""What the terminal shows while a run trains: a live view, or plain lines where the output is no terminal."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TypeAlias

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_REFRESH_SECONDS = 0.25
_LINE_SECONDS = 5.0
_MEMBERS = 16
_SHOWN = (
    ("return", "rollout/ep_rew_mean", ".1f"),
    ("length", "rollout/ep_len_mean", ".1f"),
    ("value loss", "train/value_loss", ".4g"),
    ("policy loss", "train/policy_loss", ".4f"),
    ("VGS factor", "vgs/scaling_factor", ".3f"),
    ("KL", "train/approx_kl", ".4f"),
    ("task changes", "env/drift_changes", ".0f"),
)

Row: TypeAlias = Mapping[str, str | float | int]
"""What a population's table says about one member, by the head of the column."""


class LiveView:
    """Progress of a run; a context manager.

    In a terminal a small table is redrawn at most four times a second. Elsewhere, in a log file or a pipe, one plain line is
    printed every five seconds and one at the end, and a population's table at each exchange. ``NO_COLOR`` is respected.

    Args:
        total: steps at which the run ends.
        title: name of the run.
        start: steps already done before, in a resumed run.
        console: where to write; by default the standard output.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        total: int,
        title: str = "",
        start: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.title = total, title
        self._console = console or Console(highlight=False)
        self._clock = clock
        self._start, self._step = start, start
        self._began = self._drawn = clock()
        self._metrics: dict[str, float] = {}
        self._members: list[Row] = []
        self._pending = False
        terminal = self._console.is_terminal and not self._console.is_dumb_terminal
        self._live = Live(console=self._console, auto_refresh=False) if terminal else None

    def __enter__(self) -> LiveView:
        """Start the view."""
        if self._live is not None:
            self._live.start()
            self._draw()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Show the last state and give the terminal back."""
        if self._live is not None:
            self._draw()
            self._live.stop()
        elif self._pending:
            self._draw()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note what an iteration gave.

        Args:
            step: steps done so far.
            metrics: by registered name; a population's ``name/member_<i>`` beside them give the best member's return. What
                was not measured this time keeps its last value.
        """
        self._step = step
        self._metrics.update(metrics)
        self._pending = True
        if self._clock() - self._drawn >= (_LINE_SECONDS if self._live is None else _REFRESH_SECONDS):
            self._draw()

    def members(self, rows: Sequence[Row]) -> None:
        """Show the table of a population, the best member first and the worst last; of many members, the 16 best.

        In a terminal it stays until the next call; elsewhere it is printed, once.

        Args:
            rows: one per member, all with the same keys, which become the head of the table: ``member``, ``score``, and
                whatever else there is to tell. A number that is not finite is shown as a dash.
        """
        self._members = sorted(rows, key=_rank)
        if self._live is not None:
            self._draw()
        elif self._members:
            for line in _MemberTable(self._members, _MEMBERS).lines():
                self._console.print(line, soft_wrap=True, markup=False, highlight=False)

    def _draw(self) -> None:
        self._drawn = self._clock()
        self._pending = False
        if self._live is None:
            self._console.print(self._line(), soft_wrap=True, markup=False, highlight=False)
        else:
            self._live.update(self._table(), refresh=True)

    def _numbers(self) -> list[tuple[str, str]]:
        """What there is to show, as (label, text)."""
        seconds = self._drawn - self._began
        average = (self._step - self._start) / seconds if seconds > 0 else math.nan
        rate = self._metrics.get("time/steps_per_second", average)
        left = (self.total - self._step) / average if average > 0 else math.nan
        shown = [(label, format(self._metrics[name], spec)) for label, name, spec in _SHOWN if name in self._metrics]
        members = [value for name, value in self._metrics.items() if name.startswith("rollout/ep_rew_mean/member_")]
        finite = [value for value in members if math.isfinite(value)]
        if finite:
            shown.insert(1, ("best return", format(max(finite), ".1f")))
        return [("steps/s", _or_dash(rate, ",.0f")), ("time left", _duration(left)), *shown]

    def _progress(self) -> str:
        share = self._step / self.total if self.total > 0 else 1.0
        return f"{self._step:,} / {self.total:,} steps ({min(share, 1.0):.0%})"

    def _line(self) -> str:
        return " · ".join([self._progress(), *(f"{label} {text}" for label, text in self._numbers())])

    def _table(self) -> RenderableType:
        head = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=max(self.total, 1), completed=min(self._step, self.total), width=36)
        head.add_row(Text(self.title, style="bold"), bar, Text(self._progress()))
        body = Table.grid(padding=(0, 2))
        for justify in ("left", "right") * 3:
            body.add_column(justify=justify, min_width=9 if justify == "right" else 0)
        cells = [Text(part, style="dim" if index == 0 else "") for pair in self._numbers() for index, part in enumerate(pair)]
        for first in range(0, len(cells), 6):
            body.add_row(*cells[first : first + 6])
        if not self._members:
            return Group(head, body)
        room = self._console.height - body.row_count - 4  # what does not fit would be cut off, and with it how many there are
        table = _MemberTable(self._members, max(1, min(_MEMBERS, room)))
        return Group(head, body, Text(), table.rich(self._console.width))


class _MemberTable:
    """The table of a population, of which the first ``shown`` rows are shown; they come sorted."""

    def __init__(self, rows: Sequence[Row], shown: int) -> None:
        ranks = [""] * len(rows)
        if len(rows) > 1:
            ranks[0], ranks[-1] = "best" if math.isfinite(_score(rows[0])) else "", "worst"
        columns = [("", False, ranks)] + [_column(key, [row[key] for row in rows]) for key in rows[0]]
        worst = ", ".join(f"{key} {cells[-1]}" for key, _, cells in columns if key in ("member", "score"))
        self.columns = [(key, number, cells[:shown]) for key, number, cells in columns]
        self.more = f"… and {len(rows) - shown} more, the worst: {worst}" if len(rows) > shown else ""

    def lines(self) -> list[str]:
        """As plain text, aligned."""
        padded = []
        for key, number, cells in self.columns:
            width = max(map(len, (key, *cells)))
            padded.append([text.rjust(width) if number else text.ljust(width) for text in (key, *cells)])
        lines = ["  ".join(row).rstrip() for row in zip(*padded, strict=True)]
        return [*lines, self.more] if self.more else lines

    def rich(self, width: int) -> RenderableType:
        """For a terminal; columns that do not fit are named below instead, since half a number is a wrong one."""
        ends = itertools.accumulate(max(map(len, (key, *cells))) + 2 for key, _, cells in self.columns)
        fitting = [column for column, end in zip(self.columns, ends, strict=True) if end - 2 <= width]
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
        for key, number, _ in fitting:
            table.add_column(Text(key), justify="right" if number else "left", no_wrap=True)
        for row in zip(*(cells for _, _, cells in fitting), strict=True):
            table.add_row(*map(Text, row), style={"best": "green", "worst": "red"}.get(row[0], ""))
        hidden = ", ".join(key for key, _, _ in self.columns[len(fitting) :])
        notes = [note for note in (self.more, hidden and f"no room for {hidden}") if note]
        return Group(table, Text("; ".join(notes), style="dim", no_wrap=True, overflow="ellipsis")) if notes else table


def _column(key: str, values: Sequence[str | float | int]) -> tuple[str, bool, list[str]]:
    """Its head, whether it holds numbers, and its cells: equally many decimals, unless the numbers span orders of magnitude."""
    numbers = [value for value in values if not isinstance(value, str)]
    sizes = [abs(number) for number in numbers if math.isfinite(number) and number != 0]
    spec = ".3g"
    if all(isinstance(number, int) for number in numbers):
        spec = "d"
    elif sizes and min(sizes) > max(sizes) / 100:
        decimals = 3 - math.floor(math.log10(max(sizes)))
        spec = f".{max(decimals, 0)}f" if decimals < 7 else spec
    cells = [value if isinstance(value, str) else _or_dash(value, spec) for value in values]
    return key, len(numbers) == len(values), cells


def _score(row: Row) -> float:
    score = row.get("score", math.nan)
    return math.nan if isinstance(score, str) else float(score)


def _rank(row: Row) -> float:
    score = _score(row)
    return -score if math.isfinite(score) else math.inf


def print_error(message: str) -> None:
    """Tell the user on the standard error what is wrong, as ``error: <message>``."""
    console = Console(stderr=True, highlight=False)
    console.print(Text.assemble(("error:", "bold red"), " ", message), soft_wrap=True)


def _or_dash(value: float | int, spec: str) -> str:
    return format(value, spec) if math.isfinite(value) else "–"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "–"
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
