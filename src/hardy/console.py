"""What the terminal shows while a run trains: a live view, or plain lines where the output is no terminal."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_REFRESH_SECONDS = 0.25
_LINE_SECONDS = 5.0
_SHOWN = (
    ("return", "rollout/ep_rew_mean", ".1f"),
    ("length", "rollout/ep_len_mean", ".1f"),
    ("value loss", "train/value_loss", ".4g"),
    ("policy loss", "train/policy_loss", ".4f"),
    ("VGS factor", "vgs/scaling_factor", ".3f"),
    ("KL", "train/approx_kl", ".4f"),
    ("task changes", "env/drift_changes", ".0f"),
)


class LiveView:
    """Progress of a run; a context manager.

    In a terminal a small table is redrawn at most four times a second. Elsewhere, in a log file or a pipe, one plain line is
    printed every five seconds and one at the end. ``NO_COLOR`` is respected.

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
        return Group(head, body)


def print_error(message: str) -> None:
    """Tell the user on the standard error what is wrong, as ``error: <message>``."""
    console = Console(stderr=True, highlight=False)
    console.print(Text.assemble(("error:", "bold red"), " ", message), soft_wrap=True)


def _or_dash(value: float, spec: str) -> str:
    return format(value, spec) if math.isfinite(value) else "–"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "–"
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
