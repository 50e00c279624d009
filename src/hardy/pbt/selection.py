"""Selection: who copies whom at an exchange, from the scores alone, so that it serves any algorithm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

from hardy.pbt.settings import PBTRules
from hardy.population import stream_seed


@dataclass(frozen=True)
class Scores:
    """A clean evaluation of each member, all on the same seeds.

    Args:
        mean: mean return of the member's episodes; NaN or infinite where it has none.
        standard_error: of that mean. One that is not finite is unknown: such a member is replaced only where ``min_gap`` is 0.
        episodes: how many episodes each member played.

    Raises:
        ValueError: the two arrays differ in length, a standard error is negative, or ``episodes`` is below 1.
    """

    mean: Float[np.ndarray, "P"]
    standard_error: Float[np.ndarray, "P"]
    episodes: int

    def __post_init__(self) -> None:
        """Refuse what no evaluation can have found."""
        if self.mean.ndim != 1 or self.mean.shape != self.standard_error.shape:
            raise ValueError(
                f"mean has shape {self.mean.shape}, standard_error {self.standard_error.shape}: both hold one number per member"
            )
        if bool((self.standard_error < 0).any()):
            raise ValueError(f"standard_error = {self.standard_error.tolist()}: must be ≥ 0")
        if self.episodes < 1:
            raise ValueError(f"episodes = {self.episodes}: must be ≥ 1")


@dataclass(frozen=True)
class Selection:
    """What each member does at an exchange.

    Args:
        source: the member whose state it copies, as that was before the exchange; ``source[p] == p`` means that p survives.
        keeps_hyperparams: p takes the weights of its source but keeps its own hyperparameters (MF-PBT's migration).
    """

    source: Int[np.ndarray, "P"]
    keeps_hyperparams: Bool[np.ndarray, "P"]

    @property
    def replaced(self) -> Bool[np.ndarray, "P"]:
        """Members that copy another one."""
        found: Bool[np.ndarray, "P"] = self.source != np.arange(len(self.source))
        return found


def groups(size: int, frequencies: Sequence[int]) -> Int[np.ndarray, "P"]:
    """The sub-population of each member, dealt out in turn: member p belongs to ``p % len(frequencies)``."""
    return np.arange(size) % len(frequencies)


def select(
    scores: Scores, rules: PBTRules, *, seed: int, round: int, available: Bool[np.ndarray, "P"] | None = None
) -> Selection:
    """Decide who copies whom.

    A member is *lost* if its score is not finite or if it is not ``available``. A lost member is never a source, and is
    replaced at every exchange by one of the best share (``rules.truncation``) of the members that are not lost. Any other
    member is replaced only by one that is *better*: its score is higher, by more than ``rules.min_gap`` standard errors of
    the difference, and with ``select = "welch"`` also significantly so. So the best member is never replaced.

    ``rules.select`` says whom a member is compared with (Jaderberg et al. 2017, arXiv:1711.09846, section 4.1): with
    ``truncation`` each of the worst share with one of the best share, at least one of each; with ``tournament`` and ``welch``
    each member with one opponent, drawn once.

    With several ``rules.frequencies`` (MF-PBT, arXiv:2506.03225) all of this happens inside sub-populations, and then members
    migrate between them. From the paper and its published code: sub-population g exchanges where its frequency divides the
    round; a second share of its members, the worst that selection left in place, is then open to the best members of other
    sub-populations, the better to the better, each of them taken once; what comes from a sub-population that exchanges less
    often brings its hyperparameters, from one that exchanges more often the weights only, so that short-sighted
    hyperparameters do not spread. Our choices, for populations of any size and for noisy scores:

    * a migrant must be better in the sense above, not only ranked higher; so must every source;
    * a member that takes the weights only keeps its own hyperparameters (the paper gives it those of the best of its
      sub-population); from an equally frequent sub-population it takes both;
    * where selection left nobody but the best in place, as in a pair, the worst takes the migrant instead of the source that
      it has, if the migrant is better than that source too;
    * the best of a sub-population stays, unless it is alone there: then migration is all there is for it;
    * a lost member is replaced at once, whatever its frequency, with hyperparameters, which may be why it was lost; from
      the whole population if its own is lost altogether.

    Args:
        scores: of all members.
        rules: how to select.
        seed: of the run. Member p draws from a stream of its own, named by seed, round and p.
        round: number of this exchange, from 1.
        available: members whose state can be copied now; all of them by default.

    Returns:
        Sources, which refer to the state before the exchange: a source may be replaced itself, so read before writing. Nobody
        is replaced if all are lost.

    Raises:
        ValueError: ``round`` is below 1, ``available`` has another length, or ``select = "welch"`` has a single episode.
    """
    size = len(scores.mean)
    if round < 1:
        raise ValueError(f"round = {round}: exchanges are counted from 1")
    if available is not None and available.shape != (size,):
        raise ValueError(f"available has shape {available.shape}: the scores are those of {size} members")
    if rules.select == "welch" and scores.episodes < 2:
        raise ValueError(
            f"select = 'welch' with episodes = {scores.episodes}: a variance needs at least 2 evaluation episodes; "
            "use more of them, or select = 'truncation'"
        )
    usable = np.isfinite(scores.mean) if available is None else np.isfinite(scores.mean) & available
    chosen = Selection(np.arange(size), np.zeros(size, dtype=bool))
    exchange = _Exchange(scores, rules, seed, round, groups(size, rules.frequencies), usable)
    if usable.any():
        for group, frequency in enumerate(rules.frequencies):
            exchange.heal(group, chosen.source)
            if round % frequency == 0:
                exchange.compete(group, chosen.source)
                exchange.migrate(group, chosen)
    return chosen


@dataclass(frozen=True)
class _Exchange:
    """One exchange: what its decisions are made from. The methods fill the arrays that they are given."""

    scores: Scores
    rules: PBTRules
    seed: int
    round: int
    group: Int[np.ndarray, "P"]
    usable: Bool[np.ndarray, "P"]

    def ranked(self, members: Bool[np.ndarray, "P"]) -> list[int]:
        """The usable ones of ``members``, best first, equals in the order of their numbers."""
        found = [int(member) for member in np.flatnonzero(members & self.usable)]
        return sorted(found, key=lambda member: (-self.scores.mean[member], member))

    def share(self, count: int) -> int:
        """How many of ``count`` members the share is; at most half, as ``truncation`` is, but at least one."""
        return max(1, math.floor(count * self.rules.truncation + 1e-9))  # 100 · 0.29 is 28.999…

    def draw(self, member: int, pool: Sequence[int]) -> int:
        generator = np.random.default_rng(stream_seed(self.seed, "select", self.round, member))
        return pool[int(generator.integers(len(pool)))]

    def better(self, source: int, target: int) -> bool:
        """Whether ``source`` is better than ``target`` beyond the noise of their scores."""
        mean, errors = self.scores.mean, self.scores.standard_error
        difference = float(mean[source]) - float(mean[target])
        error = math.hypot(float(errors[source]), float(errors[target]))
        if not difference > 0:
            return False
        if self.rules.min_gap > 0 and not difference > self.rules.min_gap * error:  # a NaN must not pass
            return False
        if self.rules.select != "welch" or error == 0:
            return True
        return self._p_value(difference / error, float(errors[source]) / error, float(errors[target]) / error) < (
            self.rules.significance
        )

    def _p_value(self, difference: float, source_error: float, target_error: float) -> float:
        """Of the one-sided Welch test, all numbers in units of the standard error of the difference, which cannot underflow."""
        count = self.scores.episodes
        test = stats.ttest_ind_from_stats(
            difference,
            source_error * math.sqrt(count),
            count,
            0.0,
            target_error * math.sqrt(count),
            count,
            equal_var=False,
            alternative="greater",
        )
        return float(test.pvalue)

    def heal(self, group: int, source: Int[np.ndarray, "P"]) -> None:
        """Replace the lost members of a sub-population."""
        members = self.group == group
        pool = self.ranked(members) or self.ranked(np.ones_like(members))
        pool = pool[: self.share(len(pool))]
        for member in np.flatnonzero(members & ~self.usable):
            source[member] = self.draw(int(member), pool)

    def compete(self, group: int, source: Int[np.ndarray, "P"]) -> None:
        """Selection inside a sub-population."""
        members = self.group == group
        ranked = self.ranked(members)
        size = int(members.sum())
        if self.rules.select == "truncation":
            count = self.share(size)
            pairs = [(member, self.draw(member, ranked[:count])) for member in ranked[size - count :]]
        elif len(ranked) > 1:
            pairs = [(member, self.draw(member, sorted({*ranked} - {member}))) for member in ranked]
        else:
            pairs = []
        for member, opponent in pairs:
            if self.better(opponent, member):
                source[member] = opponent

    def migrate(self, group: int, chosen: Selection) -> None:
        """Let the best of the other sub-populations into this one."""
        members = self.group == group
        ranked = self.ranked(members)
        size = int(members.sum())
        movable = ranked[1:] if size > 1 else ranked
        settled = [member for member in movable if chosen.source[member] == member]
        outsiders = self.ranked(~members)
        for member in settled[-self.share(size) :] or movable[-1:]:
            # Whoever is better than the source that a member has is better than the member.
            if outsiders and self.better(outsiders[0], int(chosen.source[member])):
                migrant = outsiders.pop(0)
                frequency = self.rules.frequencies[self.group[migrant]]
                chosen.source[member] = migrant
                chosen.keeps_hyperparams[member] = frequency < self.rules.frequencies[group]
