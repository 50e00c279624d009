"""What the scheduler of separate processes knows of each member, and how that is saved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_PLAIN = ("id", "step", "episodes", "inherited", "parent", "exchanges", "lost", "due")


@dataclass(frozen=True)
class Report:
    """One member as it was at one moment.

    Args:
        experience: steps behind its weights: its own since it last copied another, and those of what it copied.
        score: mean return of a clean evaluation; NaN if it has none.
        standard_error: of the score.
        episodes: of the evaluation.
        checkpoint: file that holds its state at that moment, if it wrote one.
        hyperparams: what it trained with.
    """

    experience: int
    score: float
    standard_error: float
    episodes: int
    checkpoint: Path | None
    hyperparams: Mapping[str, float]

    @property
    def usable(self) -> bool:
        """Whether another member could take it over."""
        return self.checkpoint is not None and math.isfinite(self.score)


@dataclass
class PopulationMember:
    """What the scheduler knows of a member.

    Args:
        id: its number, from 0.
        hyperparams: what it trains with, by dotted path.
        score, standard_error, episodes, checkpoint: as last reported.
        step: its own steps, as last reported; 0 when it was lost, until it reports again.
        inherited: to be added to ``step`` to have the experience of its weights.
        parent: whom it copied last.
        exchanges: how many it took part in.
        lost: it was not heard of in time, and is refilled when it comes back.
        due: experience at which it takes part in its next exchange.
        start: the score from which its gain until the next exchange counts.
        entry: its report for the coming exchange.
        reports: its latest entries, oldest first.
        heard: when it last reported, on the scheduler's clock.
        awaited: since when others wait, or have waited, for its next entry.
        exchange: the decided exchange that it has yet to fetch: its number, and every member as this one may see it.
    """

    id: int
    hyperparams: dict[str, float]
    score: float = math.nan
    standard_error: float = math.nan
    episodes: int = 1
    checkpoint: Path | None = None
    step: int = 0
    inherited: int = 0
    parent: int | None = None
    exchanges: int = 0
    lost: bool = False
    due: int = 0
    start: float = math.nan
    entry: Report | None = None
    reports: list[Report] = field(default_factory=list)
    heard: float = -math.inf
    awaited: float | None = None
    exchange: tuple[int, list[Report | None]] | None = None

    def latest(self) -> Report:
        """The member as last reported."""
        experience = self.step + self.inherited
        return Report(experience, self.score, self.standard_error, self.episodes, self.checkpoint, dict(self.hyperparams))


def _number(value: float) -> float | str:
    """JSON has no NaN."""
    return value if math.isfinite(value) else repr(value)


def _report_state(report: Report | None) -> dict[str, Any] | None:
    if report is None:
        return None
    numbers = {"score": _number(report.score), "standard_error": _number(report.standard_error)}
    return {**asdict(report), **numbers, "checkpoint": None if report.checkpoint is None else str(report.checkpoint)}


def _restored_report(state: Mapping[str, Any] | None) -> Report | None:
    if state is None:
        return None
    numbers = {name: float(state[name]) for name in ("score", "standard_error")}
    return Report(**{**state, **numbers, "checkpoint": None if state["checkpoint"] is None else Path(state["checkpoint"])})


def member_state(member: PopulationMember, now: float) -> dict[str, Any]:
    """A member as JSON values, its times as seconds before ``now``."""
    return {
        **{name: getattr(member, name) for name in _PLAIN},
        **{name: _number(getattr(member, name)) for name in ("score", "standard_error", "start")},
        "hyperparams": dict(member.hyperparams),
        "checkpoint": None if member.checkpoint is None else str(member.checkpoint),
        "entry": _report_state(member.entry),
        "reports": [_report_state(report) for report in member.reports],
        "heard": _number(now - member.heard),
        "awaited": None if member.awaited is None else now - member.awaited,
        "exchange": None
        if member.exchange is None
        else {"round": member.exchange[0], "reports": [_report_state(report) for report in member.exchange[1]]},
    }


def restored_member(state: Mapping[str, Any], now: float) -> PopulationMember:
    """What `member_state` described."""
    numbers = {name: float(state[name]) for name in ("score", "standard_error", "start")}
    exchange = state["exchange"]
    return PopulationMember(
        **{
            **state,
            **numbers,
            "hyperparams": dict(state["hyperparams"]),
            "checkpoint": None if state["checkpoint"] is None else Path(state["checkpoint"]),
            "entry": _restored_report(state["entry"]),
            "reports": [_restored_report(report) for report in state["reports"]],
            "heard": now - float(state["heard"]),
            "awaited": None if state["awaited"] is None else now - state["awaited"],
            "exchange": exchange and (exchange["round"], [_restored_report(report) for report in exchange["reports"]]),
        }
    )
