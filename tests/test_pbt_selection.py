"""Selection: who copies whom, and that noise, NaN, a missing state or a small population never decide it."""

from __future__ import annotations

import itertools
import math
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hardy.pbt import PBTRules, Scores, Selection, groups, select

NAN, INF = math.nan, math.inf
WAYS = ("truncation", "tournament", "welch")


def scores_of(mean: list[float], error: float | list[float] = 0.0, episodes: int = 10) -> Scores:
    errors = [error] * len(mean) if isinstance(error, float) else error
    return Scores(np.array(mean, dtype=float), np.array(errors, dtype=float), episodes)


def rules_of(**kwargs: Any) -> PBTRules:
    return PBTRules(**{"min_gap": 1.0, **kwargs})


def sources(scores: Scores, rules: PBTRules, seed: int = 0, round: int = 1, **kwargs: Any) -> list[int]:
    return [int(source) for source in select(scores, rules, seed=seed, round=round, **kwargs).source]


def all_sources(scores: Scores, rules: PBTRules, round: int = 1, **kwargs: Any) -> list[set[int]]:
    """Every source that each member gets under any of 60 seeds."""
    return [set(column) for column in zip(*(sources(scores, rules, seed, round, **kwargs) for seed in range(60)), strict=True)]


def test_scores_refuse_what_no_evaluation_can_find() -> None:
    with pytest.raises(ValueError, match=r"mean has shape \(2, 1\), standard_error \(2, 1\)"):
        Scores.__post_init__(loose(np.zeros((2, 1)), np.zeros((2, 1)), 1))
    with pytest.raises(ValueError, match=r"mean has shape \(2,\), standard_error \(3,\): both hold one number per member"):
        Scores.__post_init__(loose(np.zeros(2), np.zeros(3), 1))
    with pytest.raises(ValueError, match=r"standard_error = \[-1.0\]: must be ≥ 0"):
        scores_of([1.0], -1.0)
    with pytest.raises(ValueError, match="episodes = 0: must be ≥ 1"):
        scores_of([1.0], episodes=0)


def loose(mean: np.ndarray, standard_error: np.ndarray, episodes: int) -> Scores:
    """Scores as a caller without shape checks can make them."""
    made = object.__new__(Scores)
    for name, value in (("mean", mean), ("standard_error", standard_error), ("episodes", episodes)):
        object.__setattr__(made, name, value)
    return made


def test_a_member_is_replaced_where_its_source_is_another() -> None:
    selection = Selection(np.array([0, 0, 2]), np.zeros(3, dtype=bool))
    assert selection.replaced.tolist() == [False, True, False]


def test_members_are_dealt_out_to_the_sub_populations_in_turn() -> None:
    assert groups(7, (1, 5, 10)).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert groups(2, (1, 5, 10)).tolist() == [0, 1]


def test_select_refuses_a_round_before_the_first_and_a_mask_of_another_population() -> None:
    with pytest.raises(ValueError, match="round = 0: exchanges are counted from 1"):
        select(scores_of([1.0, 2.0]), rules_of(), seed=0, round=0)
    with pytest.raises(ValueError, match=r"available has shape \(3,\): the scores are those of 2 members"):
        select(scores_of([1.0, 2.0]), rules_of(), seed=0, round=1, available=np.ones(3, dtype=bool))


def test_truncation_replaces_the_worst_share_from_the_best_share() -> None:
    found = all_sources(scores_of([3, 0, 7, 4, 1, 6, 2, 5]), rules_of())
    assert found == [{0}, {2, 5}, {2}, {3}, {2, 5}, {5}, {6}, {7}]


def test_golden_selections() -> None:
    """Worked out by hand from the members' first draws at seed 7: 1 0 0 0 0 2 6 4 of 7 opponents, 0 and 0 of the best two."""
    scores = scores_of([3, 0, 7, 4, 1, 6, 2, 5], 0.5)
    assert sources(scores, rules_of(), seed=7) == [0, 2, 2, 3, 2, 5, 6, 7]
    assert sources(scores, rules_of(select="tournament"), seed=7) == [2, 0, 2, 3, 0, 2, 7, 7]
    assert sources(scores, rules_of(select="welch"), seed=7) == [2, 0, 2, 3, 0, 5, 7, 7], "6 against 7 is no significant gap"


@pytest.mark.parametrize(("size", "share", "count"), [(2, 0.01, 1), (3, 0.5, 1), (5, 0.2, 1), (8, 0.25, 2), (100, 0.29, 29)])
def test_at_least_one_member_leaves_and_never_more_than_the_share(size: int, share: float, count: int) -> None:
    found = sources(scores_of([float(i) for i in range(size)]), rules_of(truncation=share))
    assert [p for p in range(size) if found[p] != p] == list(range(count))
    assert all(found[p] >= size - count for p in range(count))


def test_each_source_of_the_best_share_is_equally_likely() -> None:
    scores, rules = scores_of([0.0, 1.0, 2.0, 10.0, 11.0, 12.0]), rules_of(truncation=0.5)
    drawn = [sources(scores, rules, seed)[0] for seed in range(900)]
    assert {drawn.count(source) for source in (3, 4, 5)} <= set(range(240, 361)), "300 ± 60, above four standard deviations"
    pairs = {tuple(sources(scores, rules, seed)[:2]) for seed in range(100)}
    assert pairs == set(itertools.product((3, 4, 5), repeat=2)), "one draw for each member"


def test_every_exchange_draws_anew() -> None:
    scores, rules = scores_of([0.0, 1.0, 2.0, 10.0, 11.0, 12.0]), rules_of(truncation=0.5)
    assert len({tuple(sources(scores, rules, round=round)) for round in range(1, 30)}) > 5


@settings(deadline=None, max_examples=50)
@given(ranks=st.permutations(range(9)), share=st.sampled_from([0.1, 0.25, 0.5]), seed=st.integers(0, 99))
def test_truncation_depends_on_the_order_of_the_scores_only(ranks: list[int], share: float, seed: int) -> None:
    rules, mean = rules_of(truncation=share, min_gap=0.0), np.array(ranks, dtype=float)
    found = sources(Scores(mean, np.ones(9), 10), rules, seed)
    for rescaled in (1e-3 * mean - 5, mean**3 - 700, np.exp(mean)):
        assert sources(Scores(rescaled, np.ones(9), 10), rules, seed) == found


# -------------------------------------------------------------------------------------------- tournament and Welch's test


def test_a_tournament_has_one_opponent_who_is_never_oneself() -> None:
    """Member 0 is better than 1 and worse than 2: one draw has it replaced in half of the cases, two draws in three of four."""
    rules = rules_of(select="tournament")
    drawn = [sources(scores_of([1.0, 0.0, 2.0]), rules, seed)[0] for seed in range(800)]
    assert set(drawn) == {0, 2}
    assert 340 <= drawn.count(2) <= 460, "400 ± 60, above four standard deviations"
    assert all(sources(scores_of([1.0, 2.0]), rules, seed) == [1, 1] for seed in range(30)), "of two, each is the opponent"


def test_sources_are_of_the_state_before_the_exchange() -> None:
    chain = [
        found
        for seed in range(60)
        if (found := sources(scores_of([0, 1, 2]), rules_of(select="tournament"), seed)) == [1, 2, 2]
    ]
    assert chain, "member 0 copies what member 1 was before it became a copy of 2"


@pytest.mark.parametrize("episodes", [2, 5, 40])
@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (0.2, 1.5), (0.0, 1.0), (1.0, 0.0)])
def test_welch_copies_at_the_level_of_the_textbook(episodes: int, low: float, high: float) -> None:
    """The threshold of the difference from Welch's formula, written out; just below it nobody moves."""
    degrees = (episodes - 1) * (low**2 + high**2) ** 2 / (low**4 + high**4)
    threshold = float(stats.t.isf(0.05, degrees)) * math.hypot(low, high)
    rules = rules_of(select="welch", min_gap=0.0)
    assert sources(scores_of([0.0, 0.999 * threshold], [low, high], episodes), rules) == [0, 1]
    assert sources(scores_of([0.0, 1.001 * threshold], [low, high], episodes), rules) == [1, 1]


def test_welch_takes_its_level_from_the_rules_and_keeps_the_gap() -> None:
    scores = scores_of([0.0, 2.5], 1.0, episodes=40)  # p = 0.04
    assert sources(scores, rules_of(select="welch", significance=0.05)) == [1, 1]
    assert sources(scores, rules_of(select="welch", significance=0.03)) == [0, 1]
    assert sources(scores, rules_of(select="welch", min_gap=2.0)) == [0, 1]


def test_welch_without_variance() -> None:
    rules = rules_of(select="welch")
    assert sources(scores_of([0.0, 1e-9], 0.0), rules) == [1, 1], "no noise, no doubt"
    assert sources(scores_of([1.0, 1.0], 0.0), rules) == [0, 1]
    assert sources(scores_of([0.0, 1e-300], 1e-305), rules) == [1, 1], "squares that vanish in float64"
    assert sources(scores_of([0.0, 1e-305], 1e-305), rules) == [0, 1]
    assert sources(scores_of([-1e300, 1e300], 1e-300), rules) == [1, 1]
    with pytest.raises(ValueError, match=r"select = 'welch' with episodes = 1: a variance needs at least 2"):
        select(scores_of([0.0, 1.0], 1.0, episodes=1), rules, seed=0, round=1)


# ------------------------------------------------------------------------------------------------------ noise, NaN, no state


@pytest.mark.parametrize("way", ["truncation", "tournament"])
def test_a_difference_within_the_noise_replaces_nobody(way: Literal["truncation", "tournament"]) -> None:
    """The standard error of the difference is √(3² + 4²) = 5."""
    for gap in (0.5, 1.0, 2.0):
        rules = rules_of(select=way, min_gap=gap)
        assert sources(scores_of([0.0, 4.999 * gap], [3.0, 4.0]), rules) == [0, 1]
        assert sources(scores_of([0.0, 5.0 * gap], [3.0, 4.0]), rules) == [0, 1], "more than the gap, not as much"
        assert sources(scores_of([0.0, 5.001 * gap], [3.0, 4.0]), rules) == [1, 1]


@pytest.mark.parametrize("way", WAYS)
def test_equal_members_survive_even_without_a_gap(way: Literal["truncation", "tournament", "welch"]) -> None:
    assert sources(scores_of([2.0] * 5), rules_of(select=way, min_gap=0.0)) == [0, 1, 2, 3, 4]


def test_an_unknown_noise_is_not_taken_for_none() -> None:
    for unknown in (NAN, INF):
        scores = scores_of([0.0, 1.0], [0.0, unknown])
        assert sources(scores, rules_of()) == [0, 1]
        assert sources(scores, rules_of(min_gap=0.0)) == [1, 1], "a gap of 0 does not ask for the noise"
        assert sources(scores, rules_of(min_gap=0.0, select="welch")) == [0, 1]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_score_that_is_not_finite_is_always_replaced_and_never_copied(
    way: Literal["truncation", "tournament", "welch"], bad: float
) -> None:
    scores = scores_of([1.0, bad, 5.0, 2.0, bad, 4.0, 3.0, bad], 100.0)
    found = all_sources(scores, rules_of(select=way, truncation=0.4))
    assert found[1] == found[4] == found[7] == {2, 5}, "five are finite, 40 % of five are two"
    assert all(found[p] == {p} for p in (0, 2, 3, 5, 6)), "the others lie within the noise"


@pytest.mark.parametrize("way", WAYS)
def test_a_member_without_a_state_is_replaced_and_never_copied(way: Literal["truncation", "tournament", "welch"]) -> None:
    available = np.array([True, True, False, True])
    found = all_sources(scores_of([0.0, 1.0, 99.0, 2.0], 100.0), rules_of(select=way), available=available)
    assert found == [{0}, {1}, {3}, {3}]


def test_lost_members_take_the_places_of_the_worst() -> None:
    assert sources(scores_of([0.0, NAN, 2.0, 3.0]), rules_of()) == [0, 3, 2, 3]


@pytest.mark.parametrize("way", WAYS)
def test_nobody_is_replaced_where_nobody_can_be_copied(way: Literal["truncation", "tournament", "welch"]) -> None:
    assert sources(scores_of([NAN, INF, NAN]), rules_of(select=way)) == [0, 1, 2]
    assert sources(scores_of([0.0, 1.0]), rules_of(select=way), available=np.zeros(2, dtype=bool)) == [0, 1]
    assert sources(scores_of([0.0, NAN]), rules_of(select=way), available=np.array([False, True])) == [0, 1]


@pytest.mark.parametrize("frequencies", [(1,), (1, 3)])
@pytest.mark.parametrize("way", WAYS)
def test_a_single_agent_stays_itself(way: Literal["truncation", "tournament", "welch"], frequencies: tuple[int, ...]) -> None:
    for mean in (1.0, NAN):
        assert sources(scores_of([mean]), rules_of(select=way, frequencies=frequencies), round=3) == [0]


def test_a_member_draws_the_same_whoever_else_there_is() -> None:
    """Members join in the middle, the best two remain the pool: the worst two draw what they drew before."""
    for seed in range(30):
        small = sources(scores_of([0, 1, 20, 21]), rules_of(truncation=0.5), seed)
        large = sources(scores_of([0, 1, 20, 21, 5, 6, 7, 8]), rules_of(truncation=0.25), seed)
        lost = sources(scores_of([NAN, 1, 20, 21]), rules_of(truncation=0.5), seed)
        assert small[:2] == large[:2]
        assert lost[1] == small[1]


finite = st.integers(-8, 8).map(float)
any_score = st.one_of(finite, finite, finite, st.sampled_from([NAN, INF, -INF]))


@settings(deadline=None, max_examples=300)
@given(
    members=st.lists(
        st.tuples(any_score, st.integers(0, 4).map(float), st.sampled_from([True] * 5 + [False])), min_size=1, max_size=12
    ),
    way=st.sampled_from(WAYS),
    gap=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    share=st.sampled_from([0.05, 0.25, 0.5]),
    frequencies=st.sampled_from([(1,), (1, 2), (2, 1), (1, 2, 5), (2, 2), (1, 1, 1, 4)]),
    round=st.integers(1, 10),
    seed=st.integers(0, 50),
)
def test_every_replacement_has_its_reason(
    members: list[tuple[float, float, bool]],
    way: Literal["truncation", "tournament", "welch"],
    gap: float,
    share: float,
    frequencies: tuple[int, ...],
    round: int,
    seed: int,
) -> None:
    mean, error, available = (np.array(column) for column in zip(*members, strict=True))
    rules = rules_of(select=way, min_gap=gap, truncation=share, frequencies=frequencies)
    scores = Scores(mean, error, 8)
    selection = select(scores, rules, seed=seed, round=round, available=available)
    usable = np.isfinite(mean) & available
    group = groups(len(mean), frequencies)
    for p, source in enumerate(selection.source):
        if not usable[p]:
            assert usable[source] or not usable.any()
            assert (group[source] == group[p]) or not usable[group == group[p]].any()
            assert not selection.keeps_hyperparams[p]
        elif source != p:
            assert usable[source]
            assert mean[source] - mean[p] > max(0.0, gap * math.hypot(error[source], error[p]))
            assert round % frequencies[group[p]] == 0
            assert selection.keeps_hyperparams[p] == (frequencies[group[source]] < frequencies[group[p]])
        else:
            assert not selection.keeps_hyperparams[p]
    if usable.any():
        assert not selection.replaced[usable & (mean == mean[usable].max())].any(), "the best, any of them, stays"
    again = select(scores, rules, seed=seed, round=round, available=available)
    assert np.array_equal(again.source, selection.source)
    assert np.array_equal(again.keeps_hyperparams, selection.keeps_hyperparams)


@settings(deadline=None, max_examples=60)
@given(
    ranks=st.integers(2, 12).flatmap(lambda size: st.permutations(range(size))),
    way=st.sampled_from(WAYS),
    seed=st.integers(0, 99),
)
def test_where_scores_differ_clearly_the_worst_is_always_replaced(
    ranks: list[int], way: Literal["truncation", "tournament", "welch"], seed: int
) -> None:
    found = sources(scores_of([float(rank) for rank in ranks], 0.01), rules_of(select=way, truncation=0.05), seed)
    assert found[ranks.index(0)] != ranks.index(0)


# --------------------------------------------------------------------------------------------- several frequencies, migration


def outcome(mean: list[float], frequencies: tuple[int, ...], round: int, **kwargs: Any) -> tuple[list[int], list[bool]]:
    selection = select(scores_of(mean, 0.1), rules_of(frequencies=frequencies, **kwargs), seed=0, round=round)
    return selection.source.tolist(), selection.keeps_hyperparams.tolist()


def test_a_sub_population_exchanges_where_its_frequency_divides_the_round() -> None:
    """Even members are sub-population 0, odd ones 1; no migrant is better than a member of the other."""
    mean = [14.0, 13.0, 12.0, 11.0]
    expected = {1: [0, 1, 2, 3], 2: [0, 1, 0, 3], 3: [0, 1, 2, 1], 4: [0, 1, 0, 3], 6: [0, 1, 0, 1]}
    found = {
        round: sources(scores_of(mean, [0.1, 0.1, 0.1, 0.1]), rules_of(frequencies=(2, 3), min_gap=9.0), round=round)
        for round in expected
    }
    assert found == expected


def interleave(fast: list[float], slow: list[float]) -> list[float]:
    return [score for pair in zip(fast, slow, strict=True) for score in pair]


def test_the_slow_takes_weights_from_the_fast_and_the_fast_takes_everything_from_the_slow() -> None:
    """Brackets of the paper: of four, the best two stay, the third is open to migration, the last copies the best."""
    ahead, behind = [24.0, 23.0, 22.0, 21.0], [14.0, 13.0, 12.0, 11.0]
    source, keeps = outcome(interleave(ahead, behind), (1, 5), round=5)
    assert source == [0, 1, 2, 3, 4, 0, 0, 1], "slow member 5 takes the best of the fast, both last members their own best"
    assert keeps == [False] * 5 + [True, False, False]
    source, keeps = outcome(interleave(behind, ahead), (1, 5), round=1)
    assert source == [0, 1, 2, 3, 1, 5, 0, 7], "fast member 4 takes the best of the slow, which does not exchange"
    assert keeps == [False] * 8
    source, keeps = outcome(interleave(ahead, behind), (5, 5), round=5)
    assert (source[5], keeps[5]) == (0, False), "equally often: everything"
    assert outcome(interleave(ahead, behind), (1, 5), round=4)[0] == [0, 1, 2, 3, 4, 5, 0, 7]


def test_the_better_take_the_better_migrants_and_each_of_them_once() -> None:
    fast, slow = [float(100 - i) for i in range(8)], [float(50 - i) for i in range(8)]
    source, keeps = outcome(interleave(fast, slow), (1, 5), round=5)
    open_members, last = [9, 11], [13, 15]
    assert [source[p] for p in open_members] == [0, 2]
    assert all(source[p] in (1, 3) for p in last)
    assert [p for p in range(16) if keeps[p]] == open_members


def test_a_migrant_must_be_better_by_the_gap() -> None:
    fast, slow = [12.5, 10.0, 10.0, 10.0], [14.0, 13.0, 12.0, 11.0]
    assert outcome(interleave(fast, slow), (1, 2), round=2, min_gap=3.0)[0][5] == 0, "0.5 > 3 · 0.14"
    assert outcome(interleave(fast, slow), (1, 2), round=2, min_gap=4.0)[0][5] == 5


def test_members_that_selection_left_in_place_are_open_to_migration() -> None:
    """All slow members are equal, so that none copies its own; the gap to the fast ones is large."""
    source, keeps = outcome(interleave([9.0, 8.0, 7.0, 6.0], [1.0, 1.0, 1.0, 1.0]), (1, 2), round=2)
    assert source[1::2] == [1, 3, 5, 0]
    assert keeps == [False] * 7 + [True]


def test_of_a_pair_the_worse_takes_the_migrant_only_where_it_beats_its_own_best() -> None:
    assert outcome([9.0, 5.0, 8.0, 1.0], (1, 2), round=2) == ([0, 1, 0, 0], [False, False, False, True])
    assert outcome([5.0, 9.0, 4.0, 1.0], (1, 2), round=2) == ([0, 1, 1, 1], [False] * 4)
    assert outcome([5.1, 5.0, 4.0, 1.0], (1, 2), round=2)[0][3] == 1, "not by the gap"


def test_alone_in_its_sub_population_a_member_migrates_only() -> None:
    assert outcome([9.0, 5.0], (1, 3), round=3) == ([0, 0], [False, True])
    assert outcome([5.0, 9.0], (1, 3), round=3) == ([1, 1], [False, False])
    assert outcome([9.0, 5.0], (1, 3), round=2) == ([0, 1], [False, False])
    assert outcome([9.0, 9.0], (1, 3), round=3) == ([0, 1], [False, False])


def test_a_lost_member_is_healed_at_once_from_its_own_sub_population() -> None:
    assert outcome([9.0, 5.0, 8.0, NAN, 7.0, 4.0], (7, 7), round=1) == ([0, 1, 2, 1, 4, 5], [False] * 6)


def test_a_lost_sub_population_is_healed_from_the_others_with_hyperparameters() -> None:
    assert outcome([9.0, NAN, 5.0, NAN], (7, 9), round=1) == ([0, 0, 2, 0], [False] * 4)


def test_a_sub_population_whose_others_are_lost_keeps_its_best() -> None:
    assert outcome([9.0, 5.0, 8.0, NAN], (1, 2), round=2)[0] == [0, 1, 0, 1]


@pytest.mark.parametrize("way", ["tournament", "welch"])
def test_other_ways_of_selecting_stay_inside_their_sub_population_too(way: Literal["tournament", "welch"]) -> None:
    """The fast ones are all better than the slow ones, so only the one open to migration may cross."""
    mean = interleave([24.0, 23.0, 22.0, 21.0], [14.0, 13.0, 12.0, 11.0])
    crossed = set()
    for seed in range(40):
        selection = select(scores_of(mean, 0.1), rules_of(select=way, frequencies=(1, 2)), seed=seed, round=2)
        crossings = [p for p in range(8) if selection.source[p] % 2 != p % 2]
        assert len(crossings) == 1 and crossings[0] in (3, 5, 7)
        assert selection.keeps_hyperparams.nonzero()[0].tolist() == crossings
        assert selection.source[crossings[0]] == 0
        crossed |= set(crossings)
    assert len(crossed) > 1
