"""Population-based training for members that live in processes of their own and meet through their checkpoints.

The decisions are those of `hardy.pbt.selection` and `hardy.pbt.exploration`; what is added here is what separate processes
need: members that arrive at different times, crash, come back, or leave a file that cannot be read.
"""

from __future__ import annotations

import math
import operator
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field
from torch import Tensor

from hardy.checkpoint import CheckpointError, MemberCheckpoint, read_member
from hardy.pbt.exploration import Gain, draw_initial, explore
from hardy.pbt.members import PopulationMember, Report, member_state, restored_member
from hardy.pbt.pb2 import MAX_POINTS, require
from hardy.pbt.selection import Scores, Selection, groups, select
from hardy.pbt.settings import PBTRules

REMEMBERED = 8
"""Intervals of a member that slower ones can still be compared with."""


class PBTConfig(PBTRules):
    """The rules of an exchange, and when members that run on their own exchange."""

    population_size: int = Field(8, ge=2)
    perturbation_interval: int = Field(20_000, ge=1)
    """Steps of a member between two exchanges."""
    ready_fraction: float = Field(1.0, gt=0, le=1)
    """Share of the members not lost that must have reported before an exchange is decided."""
    max_wait: float = Field(600.0, gt=0)
    """Seconds after the first report of a round at which it is decided with those that are there. Who has not been heard of for
    so long while the others waited counts as lost."""
    seed: int = Field(0, ge=0)


class PBTScheduler:
    """Decides exchanges from what members report, one round after another.

    A member calls `report` with its score now and then, asks `should_exploit_and_explore`, and, if so, calls
    `exploit_and_explore` and goes on with what that returns. It may train on while it waits; what counts is its first report at
    or after each interval. It writes every checkpoint that it reports under a name of its own and keeps it until the next
    exchange at least.

    A round is decided once, for everybody, from the scores of that moment, when enough members have reported, or at
    ``max_wait`` seconds after the first of them did. Members are compared at equal or less experience (DexPBT, Petrenko et al.
    2023, arXiv:2305.12127): a slow member is replaced only by what another was at the same interval or before, and one that
    has not reported for the round is not judged. Members without a finite score, and lost ones, take over the best there is,
    whatever its experience.

    Not safe for threads: the process that owns the scheduler serves one call at a time.

    Args:
        config: the rules.
        clock: seconds that only increase.

    Raises:
        ConfigError: ``explore`` is "pb2" and scikit-learn is missing.
    """

    def __init__(self, config: PBTConfig, clock: Callable[[], float] = time.monotonic) -> None:
        if config.explore == "pb2":
            require()
        self.config = config
        self.clock = clock
        self.members: list[PopulationMember] = []
        self.round = 1
        """Number of the exchange that comes next."""
        self.history: list[Gain] = []
        self._began: float | None = None

    def initialize_population(self) -> list[PopulationMember]:
        """Make the members, hyperparameters drawn from their spaces.

        Raises:
            ValueError: they exist already.
        """
        if self.members:
            raise ValueError(
                "the population exists already: initialize_population() is called once, or load_state_dict() instead"
            )
        drawn = draw_initial(self.config, self.config.population_size, self.config.seed)
        for index in range(self.config.population_size):
            own = {name: float(column[index]) for name, column in drawn.items()}
            self.members.append(PopulationMember(index, own, due=self.config.perturbation_interval))
        return list(self.members)

    def report(
        self,
        member_id: int,
        *,
        step: int,
        score: float,
        standard_error: float,
        episodes: int,
        checkpoint: str | Path | None = None,
    ) -> None:
        """Take in what a member has reached.

        Args:
            member_id: whose report it is.
            step: its own steps so far. A lost member that did not end reports before it asks for an exchange; without a report
                it counts as begun anew, its steps from 0.
            score: mean return of a clean evaluation; NaN if there is none, infinite counts as NaN.
            standard_error: of the score; NaN if unknown.
            episodes: of the evaluation.
            checkpoint: file that holds its state at this step; without one nobody can copy it.

        Raises:
            ValueError: the member is unknown, its step went back, or a number is impossible.
        """
        member = self._member(member_id)
        step, episodes = operator.index(step), operator.index(episodes)
        if step < member.step:
            raise ValueError(f"member {member.id}: step = {step}: must be ≥ {member.step}, since steps do not go back")
        if standard_error < 0:
            raise ValueError(f"member {member.id}: standard_error = {standard_error}: must be ≥ 0, or NaN if it is unknown")
        needed = 2 if self.config.select == "welch" else 1
        if episodes < needed:
            raise ValueError(
                f"member {member.id}: episodes = {episodes}: must be ≥ {needed} where select = '{self.config.select}'"
            )
        member.step, member.episodes = step, episodes
        member.score = float(score) if math.isfinite(score) else math.nan
        member.standard_error = float(standard_error)
        member.checkpoint = None if checkpoint is None else Path(checkpoint)
        member.heard = self.clock()
        self._enter(member)

    def should_exploit_and_explore(self, member: PopulationMember | int) -> bool:
        """Whether an exchange of this member is decided and waits for it; decides the round if its time has come.

        Raises:
            ValueError: the member is unknown.
        """
        known = self._member(member)
        if known.entry is not None and self._ready():
            self._decide()
        return known.exchange is not None

    def exploit_and_explore(
        self, member: PopulationMember | int
    ) -> tuple[Mapping[str, Tensor] | None, dict[str, float], str | None]:
        """What a member goes on with after the exchange that was decided for it.

        Returns:
            New state, new hyperparameters and the format of the file that the state is from (see
            `hardy.checkpoint.read_member`); ``None``, its own hyperparameters and ``None`` if it survives. The state is to be
            loaded before the hyperparameters, since it holds those of its source.

        Warns:
            UserWarning: the checkpoint of a source cannot be read, so that another is taken, or none; or lacks parts.

        Raises:
            ValueError: the member is unknown, or no exchange waits for it.
        """
        known = self._member(member)
        if not self.should_exploit_and_explore(known) or known.exchange is None:
            raise ValueError(f"member {known.id}: no exchange waits for it; ask should_exploit_and_explore() first")
        number, reports = known.exchange
        found = self._exploit(known, number, reports)
        known.exchange = None
        known.exchanges += 1
        if found is None:
            self._survive(known)
            return None, dict(known.hyperparams), None
        source, report, keeps, read = found
        if not keeps:
            known.hyperparams = self._explored(known, report.hyperparams, number)
        known.inherited = report.experience - known.step
        known.parent = source
        self._begin_interval(known, report.experience, report.score)
        return read.parameters, dict(known.hyperparams), read.format

    def state_dict(self) -> dict[str, Any]:
        """Everything as JSON values, so that `load_state_dict` continues exactly; times as seconds that have passed."""
        now = self.clock()
        return {
            "config": self.config.model_dump(mode="json"),
            "round": self.round,
            "began": None if self._began is None else now - self._began,
            "history": [asdict(gain) for gain in self.history],
            "members": [member_state(member, now) for member in self.members],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned.

        Raises:
            ValueError: it belongs to another configuration.
        """
        if state["config"] != self.config.model_dump(mode="json"):
            raise ValueError(f"the state belongs to another configuration: {state['config']}")
        now = self.clock()
        self.round = state["round"]
        self._began = None if state["began"] is None else now - state["began"]
        self.history = [Gain(**gain) for gain in state["history"]]
        self.members = [restored_member(member, now) for member in state["members"]]

    def _member(self, member: PopulationMember | int) -> PopulationMember:
        index = member.id if isinstance(member, PopulationMember) else member
        if not self.members:
            raise ValueError("there is no population yet: call initialize_population() or load_state_dict()")
        if not 0 <= index < len(self.members):
            raise ValueError(f"member {index}: unknown; members are 0 to {len(self.members) - 1}")
        return self.members[index]

    def _enter(self, member: PopulationMember) -> None:
        """Count the last report for the coming exchange if it is the first one that reached the interval.

        Not while a decided exchange waits, as one does for every lost member.
        """
        if member.exchange is None and member.entry is None and member.step + member.inherited >= member.due:
            member.entry = member.latest()
            member.reports = [*member.reports, member.entry][-REMEMBERED:]
            if self._began is None:
                self._began = self.clock()

    def _ready(self) -> bool:
        active = [member for member in self.members if not member.lost]
        entered = sum(member.entry is not None for member in active)
        if entered >= self.config.ready_fraction * len(active) - 1e-9:
            return True
        return self._began is not None and self.clock() - self._began >= self.config.max_wait

    def _decide(self) -> None:
        """Freeze the scores of this moment: one exchange for everybody who takes part, and for the lost."""
        now = self.clock()
        for member in self.members:
            if member.entry is None and not member.lost:
                since = self._began if member.awaited is None else member.awaited
                member.awaited = now if since is None else since
                if now - max(member.awaited, member.heard) >= self.config.max_wait:
                    member.lost, member.step, member.inherited = True, 0, 0
        for member in self.members:
            entry = member.entry
            if member.lost:
                member.exchange = self.round, [self._seen(other, None) for other in self.members]
            elif entry is not None:
                healthy = math.isfinite(entry.score)
                limit = self._interval(entry.experience) if healthy else None
                seen = [entry if other is member else self._seen(other, limit) for other in self.members]
                member.exchange = self.round, seen
                self._remember_gain(member, entry)
        for member in self.members:
            if member.entry is not None:
                member.entry, member.awaited = None, None
        self.round += 1
        self._began = None

    def _seen(self, member: PopulationMember, limit: int | None) -> Report | None:
        """What a member was, as far as one that has come to interval ``limit`` may see it."""
        for report in reversed(member.reports):
            if limit is None or self._interval(report.experience) <= limit:
                return report
        return None

    def _remember_gain(self, member: PopulationMember, entry: Report) -> None:
        gain = entry.score - member.start
        if math.isfinite(gain):
            self.history.append(Gain(self.round, member.id, dict(entry.hyperparams), gain))
            del self.history[:-MAX_POINTS]

    def _exploit(
        self, member: PopulationMember, number: int, reports: list[Report | None]
    ) -> tuple[int, Report, bool, MemberCheckpoint] | None:
        """Whom the member copies, as what, whether it keeps its hyperparameters, and the file; None if it survives."""
        unreadable: set[int] = set()
        while True:
            places, chosen = self._choose(member, number, reports, unreadable)
            source = places[int(chosen.source[member.id])]
            report = reports[source]
            if source == member.id or report is None or report.checkpoint is None:
                own = reports[member.id]
                if member.lost or own is None or not math.isfinite(own.score):
                    warnings.warn(f"member {member.id} has no usable score or state, and there is nobody to copy", stacklevel=3)
                return None
            try:
                return source, report, bool(chosen.keeps_hyperparams[member.id]), read_member(report.checkpoint)
            except CheckpointError as error:
                warnings.warn(f"member {member.id} cannot copy member {source}: {error}", stacklevel=3)
                unreadable.add(source)

    def _choose(
        self, member: PopulationMember, number: int, reports: list[Report | None], unreadable: set[int]
    ) -> tuple[list[int], Selection]:
        """The selection for one member, and who stands in each place of the population that it was made from.

        Who takes no part, or has better scores but no file, must not stand among the worst in its place, or a single dead
        member would stop selection for ever: there stands another that is only just better, or nobody if there is none.
        """
        seen = [math.nan if report is None else report.score for report in reports]
        own = reports[member.id]
        level = math.nan if own is None or member.lost else own.score
        better = [
            index
            for index, report in enumerate(reports)
            if report is not None and report.usable and index not in {member.id, *unreadable} and not report.score <= level
        ]
        better.sort(key=lambda index: (-seen[index], index))
        group = groups(len(reports), self.config.frequencies)
        places = list(range(len(reports)))
        available = np.zeros(len(reports), dtype=bool)
        for index, report in enumerate(reports):
            if index == member.id:
                available[index] = not member.lost
            elif index in better or (report is not None and own is not None and self._is_judged_with(report, own)):
                available[index] = report is not None and report.usable
            elif beside := [other for other in better if group[other] == group[index]]:
                places[index], available[index] = beside[-1], True
        shown = [reports[place] for place in places]
        scores = Scores(
            np.array([math.nan if report is None else report.score for report in shown]),
            np.array([math.nan if report is None else report.standard_error for report in shown]),
            min((report.episodes for report in reports if report is not None), default=2),
        )
        return places, select(scores, self.config, seed=self.config.seed, round=number, available=available)

    def _is_judged_with(self, report: Report, own: Report) -> bool:
        """Whether somebody who is not better was reported at the same interval, and so may be the one to go instead."""
        return not report.score > own.score and self._interval(report.experience) == self._interval(own.experience)

    def _explored(self, member: PopulationMember, copied: Mapping[str, float], number: int) -> dict[str, float]:
        trained = [copied if other is member else other.hyperparams for other in self.members]
        columns = {name: np.array([values[name] for values in trained]) for name in self.config.hyperparams}
        replaced = np.array([other is member for other in self.members])
        found = explore(columns, replaced, self.config, seed=self.config.seed, round=number, history=self.history)
        return {name: float(column[member.id]) for name, column in found.items()}

    def _survive(self, member: PopulationMember) -> None:
        if member.lost:
            self._begin_interval(member, member.step + member.inherited, math.nan)
            return
        entry = member.reports[-1]
        member.start = entry.score
        member.due = self._next(entry.experience)
        self._enter(member)  # it may have trained on while it waited, and so have come to its next interval already

    def _begin_interval(self, member: PopulationMember, experience: int, start: float) -> None:
        """Begin again with other weights: what was reported of the old ones is no longer this member."""
        member.lost, member.entry, member.awaited = False, None, None
        member.due, member.start = self._next(experience), start

    def _interval(self, experience: int) -> int:
        return experience // self.config.perturbation_interval

    def _next(self, experience: int) -> int:
        return (self._interval(experience) + 1) * self.config.perturbation_interval
