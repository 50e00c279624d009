"""Where the time of an iteration goes: named phases of the work, a table of them, and a trace of a few iterations.

Parts name what they do with `phase` and `timed`. Only inside a `Profile` does that measure anything.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import ParamSpec, TypeVar

import torch

REST = "everything else"
PHASES = (
    "policy step", "environment step", "device step", "normalising", "rest of the rollout", "returns", "minibatches",
    "captured minibatch", "forward", "loss", "backward", "VGS", "optimizer", "adversary", "metrics", "PBT", "logging",
    "checkpoint", REST,
)  # fmt: skip
"""In the order of the table; docs/configuration.md says what each one covers."""
WARM_UP = 2
"""Iterations that count for nothing: the first ones allocate memory and fill caches."""
TRACED = 2
"""Iterations in the trace, right after those. They are slower for being traced, so the table leaves them out."""

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class _Clock:
    """Seconds of each phase, without those of the phases inside it."""

    def __init__(self, device: str) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.tracing = False
        self._on_gpu = torch.device(device).type == "cuda"
        self._open = [REST]
        self._since = time.perf_counter()

    def mark(self) -> None:
        """Give the time since the last mark to the innermost phase."""
        # Kernels on a GPU run on while Python does; a graph that is being captured must not be waited for.
        if self._on_gpu and not torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def clear(self) -> None:
        self.mark()
        self.seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.mark()
        self._open.append(name)
        try:
            with torch.profiler.record_function(name) if self.tracing else nullcontext():
                yield
        finally:
            self.mark()
            self._open.pop()


_clock: _Clock | None = None
_NOTHING = nullcontext()


def phase(name: str) -> AbstractContextManager[None]:
    """A block of work that belongs to one of `PHASES`; phases inside it count for themselves."""
    return _NOTHING if _clock is None else _clock.phase(name)


def timed(name: str, function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """``function`` with each call as a `phase`; where nothing is profiled, ``function`` itself."""
    if _clock is None:
        return function
    clock = _clock

    @functools.wraps(function)
    def measured(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with clock.phase(name):
            return function(*args, **kwargs)

    return measured


class Profile:
    """Measures the phases of iterations while it is entered; one at a time in a process, and in the thread that trains.

    Args:
        path: of the trace, in the format of Chrome's trace viewer.
        device: where the networks live; on a GPU each phase ends by waiting for its kernels.
    """

    def __init__(self, path: Path, device: str) -> None:
        self.path = path
        self.counted = 0
        """Iterations in the table."""
        self._begun = 0
        self._clock = _Clock(device)
        self._totals = dict.fromkeys(PHASES, 0.0)
        self._trace = ExitStack()

    def __enter__(self) -> Profile:
        """Start to measure."""
        global _clock
        _clock = self._clock
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Stop measuring; a trace under way is written as far as it got."""
        global _clock
        _clock = None
        self._end_trace()

    @contextmanager
    def iteration(self) -> Iterator[None]:
        """One iteration: of the warm-up, of the trace, or of the table."""
        if self._begun == WARM_UP:
            self._begin_trace()
        self._begun += 1
        self._clock.clear()
        yield
        self._clock.mark()
        if self._begun > WARM_UP + TRACED:
            self.counted += 1
            for name, seconds in self._clock.seconds.items():
                self._totals[name] += seconds
        elif self._begun == WARM_UP + TRACED:
            self._end_trace()

    def _begin_trace(self) -> None:
        profiler = torch.profiler.profile(activities=torch.profiler.supported_activities())
        self._trace.callback(lambda: profiler.export_chrome_trace(str(self.path)))
        self._trace.enter_context(profiler)
        self._clock.tracing = True

    def _end_trace(self) -> None:
        self._clock.tracing = False
        self._trace.close()

    def table(self) -> list[str]:
        """Milliseconds an iteration and share of each phase that took any, as lines of text; what is missing is said."""
        lines = []
        if self.counted:
            total = sum(self._totals.values())
            lines.append(f"{f'mean of {self.counted} iterations':<22}{'ms':>10}{'share':>9}")
            for name, seconds in self._totals.items():
                if seconds > 0:
                    lines.append(f"{name:<22}{1000 * seconds / self.counted:>10.2f}{seconds / total:>9.1%}")
            lines.append(f"{'in all':<22}{1000 * total / self.counted:>10.2f}{1:>9.1%}")
        else:
            least = WARM_UP + TRACED + 1
            lines.append(
                f"profile: no table after {self._begun} iterations; {least} are the least, since the first do not count"
            )
        traced = min(self._begun - WARM_UP, TRACED)
        if traced > 0:
            what = f"{traced} iteration{'' if traced == 1 else 's'}"
            lines.append(f"trace of {what}: {self.path}; open it at https://ui.perfetto.dev or chrome://tracing")
        return lines
