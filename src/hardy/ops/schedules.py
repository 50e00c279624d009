"""Schedules: factors that multiply a base value, so that whoever changes the base is not overruled."""

from __future__ import annotations

import math
from typing import Literal

ScheduleKind = Literal["constant", "linear", "cosine"]


def schedule_factor(kind: ScheduleKind, progress: float) -> float:
    """Factor for the base value at ``progress``, from 0 (start) to 1 (end); beyond either end it stays at that end's factor.

    ``constant`` is 1 throughout. ``linear`` and ``cosine`` go from 1 to 0, cosine with a flat start and end
    (Loshchilov & Hutter 2017, arXiv:1608.03983, eq. 5, one cycle).
    """
    progress = min(max(progress, 0.0), 1.0)
    match kind:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - progress
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))


def ramp_factor(progress: float, warmup: float, ramp: float) -> float:
    """Factor for a base value: 0 for the share ``warmup`` of the run, then rising linearly to 1 over the share ``ramp``."""
    if progress < warmup:
        return 0.0
    return min((progress - warmup) / ramp, 1.0) if ramp > 0 else 1.0
