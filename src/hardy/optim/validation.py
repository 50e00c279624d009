"""Checks of the arguments that people type."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

from hardy.config import nearest

Number: TypeAlias = float | int
"""A number that may be written without a decimal point; run-time checks tell an int from a float."""


def require_one_of(argument: str, value: object, allowed: Sequence[str]) -> None:
    """Refuse a value that is not among those allowed, naming the nearest one.

    Raises:
        ValueError: as said.
    """
    if value in allowed:
        return
    raise ValueError(f"{argument} = {value!r}: allowed are {', '.join(allowed)}{nearest(str(value), allowed)}")


def require_bool(argument: str, value: object) -> None:
    """Refuse what is neither True nor False.

    Raises:
        ValueError: as said.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{argument} = {value!r}: must be True or False")


def require_instance(argument: str, value: object, allowed: type) -> None:
    """Refuse what is neither None nor an instance of the class.

    Raises:
        TypeError: as said.
    """
    if value is not None and not isinstance(value, allowed):
        raise TypeError(f"{argument} = {value!r}: must be a {allowed.__name__} or None")


def require_number(
    argument: str,
    value: object,
    *,
    gt: Number | None = None,
    ge: Number | None = None,
    lt: Number | None = None,
    le: Number | None = None,
) -> None:
    """Refuse what is no finite number inside the bounds.

    Raises:
        ValueError: as said.
    """
    bounds = [f"{sign} {bound}" for sign, bound in ((">", gt), (">=", ge), ("<", lt), ("<=", le)) if bound is not None]
    number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    inside = (
        math.isfinite(number)
        and (gt is None or number > gt)
        and (ge is None or number >= ge)
        and (lt is None or number < lt)
        and (le is None or number <= le)
    )
    if not inside:
        raise ValueError(f"{argument} = {value!r}: must be a finite number {' and '.join(bounds)}".rstrip())
