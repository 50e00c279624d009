"""Taking turns: several things timed in one run, again and again, so that a machine that slows down slows them all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

Say = Callable[[str], None]
"""Tells the user how far a section is."""


def under(heading: str, say: Say) -> Say:
    """Tell with a heading in front."""
    return lambda text: say(f"{heading}: {text}")


def take_turns(
    candidates: Mapping[str, Callable[[], object]], repeats: int, seconds: float, say: Say
) -> dict[str, list[float]]:
    """Seconds that one call of each candidate takes, once for each repeat: A B C, A B C, and so on.

    Args:
        candidates: functions to call, by name. Each turn begins with a call that does not count and brings code and data
            back into the caches.
        seconds: length of a turn; it has at least one call.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(repeats):
        say(f"repeat {repeat + 1} of {repeats}")
        for name, call in candidates.items():
            call()
            times[name].append(seconds_per_call(call, seconds))
    return times


def seconds_per_call(call: Callable[[], object], seconds: float) -> float:
    """Mean time of one call over at least one call and at least so many seconds."""
    calls, began = 0, time.perf_counter()
    while True:
        call()
        calls += 1
        elapsed = time.perf_counter() - began
        if elapsed >= seconds:
            return elapsed / calls
