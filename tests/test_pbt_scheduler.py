"""Separate processes: one decision a round, nobody waits for ever, nothing stale is compared, nothing is lost."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hardy import DistributionalPPO
from hardy.checkpoint import flatten_state, read_member, save_tensors
from hardy.config import ConfigError, settings_from_dict
from hardy.pbt import HyperparameterSpace, Scores, explore, pb2, select
from hardy.pbt.members import PopulationMember
from hardy.pbt.scheduler import PBTConfig, PBTScheduler

INTERVAL = 100
SPACES = {"optimizer.lr": HyperparameterSpace(low=1e-4, high=1e-1), "ppo.ent_coef": HyperparameterSpace(low=1e-5, high=1e-2)}
NAN = math.nan


class Clock:
    """Time that passes when a test says so."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def scheduler(size: int = 4, clock: Clock | None = None, **changes: Any) -> PBTScheduler:
    given: dict[str, Any] = {
        "min_gap": 0.0,
        "hyperparams": SPACES,
        "perturbation_interval": INTERVAL,
        "max_wait": 60.0,
        **changes,
    }
    made = PBTScheduler(PBTConfig(population_size=size, **given), clock or Clock())
    made.initialize_population()
    return made


def write(path: Path, value: float) -> Path:
    """A full file of one member, whose weight says whose it is."""
    names = ("parameters.w", "optimizer.upgd.step", "observation.mean", "reward.moments.mean", "hyper.optimizer.lr")
    save_tensors(path, {name: torch.full((1, 2), value) for name in names}, {"kind": "model", "seeds": [0]})
    return path


def report(made: PBTScheduler, member: int, step: int, score: float, folder: Path | None, **changes: Any) -> None:
    """A report of a member whose file holds its score."""
    path = None if folder is None else write(folder / f"m{member}_{step}.safetensors", score)
    made.report(member, **{"step": step, "score": score, "standard_error": 0.1, "episodes": 5, "checkpoint": path, **changes})


def weight(parameters: Mapping[str, Tensor] | None) -> float | None:
    return None if parameters is None else float(parameters["parameters.w"][0, 0])


def exchange(made: PBTScheduler, members: Sequence[int] | None = None) -> list[float | None]:
    """What each member goes on with: the weight of its source's file, None if it survived."""
    chosen = range(len(made.members)) if members is None else members
    return [weight(made.exploit_and_explore(member)[0]) for member in chosen]


def test_the_population_starts_with_draws_from_its_spaces() -> None:
    made = PBTScheduler(PBTConfig(population_size=5, hyperparams=SPACES, seed=3))
    members = made.initialize_population()
    assert [member.id for member in members] == [0, 1, 2, 3, 4]
    for name, space in SPACES.items():
        values = [member.hyperparams[name] for member in members]
        assert len(set(values)) == 5 and all(type(value) is float and space.low <= value <= space.high for value in values)
    again = PBTScheduler(PBTConfig(population_size=5, hyperparams=SPACES, seed=3)).initialize_population()
    assert [member.hyperparams for member in again] == [member.hyperparams for member in members]
    with pytest.raises(ValueError, match="exists already"):
        made.initialize_population()


def test_the_worst_takes_over_the_best_and_everybody_else_goes_on(tmp_path: Path) -> None:
    made = scheduler()
    for member, score in enumerate([3.0, 1.0, 9.0, 4.0]):
        report(made, member, INTERVAL, score, tmp_path)
    before = [dict(member.hyperparams) for member in made.members]
    assert all(made.should_exploit_and_explore(member) for member in made.members)
    for member in (0, 2, 3):
        assert made.exploit_and_explore(made.members[member]) == (None, before[member], None)
    parameters, hyperparams, format = made.exploit_and_explore(1)
    assert format == "v2_full_parameters" and parameters is not None
    assert parameters.keys() == read_member(tmp_path / "m2_100.safetensors").parameters.keys()
    assert weight(parameters) == 9.0
    columns = {name: torch.tensor([values[name] for values in before], dtype=torch.float64).numpy() for name in SPACES}
    for column in columns.values():
        column[1] = column[2]
    explored = explore(columns, torch.tensor([False, True, False, False]).numpy(), made.config, seed=0, round=1)
    assert hyperparams == {name: column[1] for name, column in explored.items()}
    assert hyperparams != before[1] and hyperparams != before[2]
    member = made.members[1]
    assert (member.parent, member.exchanges, member.hyperparams) == (2, 1, hyperparams)
    assert [member.hyperparams for member in made.members if member.id != 1] == [before[0], *before[2:]]
    assert not any(made.should_exploit_and_explore(member) for member in range(4))


def test_an_exchange_comes_at_the_interval_and_not_before(tmp_path: Path) -> None:
    made = scheduler(2)
    for step in (40, 99):
        for member in range(2):
            report(made, member, step, float(member), tmp_path)
            assert not made.should_exploit_and_explore(member)
    for round_end in (100, 230, 300, 470):
        for member in range(2):
            report(made, member, round_end, float(member), tmp_path)
        assert exchange(made) == [1.0, None]
        for member in range(2):
            report(made, member, round_end + 1, float(member), tmp_path)
            assert not made.should_exploit_and_explore(member)


@pytest.mark.parametrize(("fraction", "needed"), [(0.1, 1), (0.25, 1), (0.5, 2), (0.51, 3), (0.75, 3), (0.8, 4), (1.0, 4)])
def test_a_round_waits_for_the_ready_fraction(tmp_path: Path, fraction: float, needed: int) -> None:
    made = scheduler(ready_fraction=fraction)
    ready = []
    for member in range(needed):
        report(made, member, INTERVAL, float(member), tmp_path)
        ready.append(made.should_exploit_and_explore(member))
    assert ready == [False] * (needed - 1) + [True]
    assert [made.should_exploit_and_explore(member) for member in range(4)] == [True] * needed + [False] * (4 - needed)


def test_a_round_is_decided_once_from_the_scores_of_one_moment(tmp_path: Path) -> None:
    """Were the scores of the second moment mixed in, member 1 would survive and member 0 fall."""
    made = scheduler()
    for member, score in enumerate([3.0, 1.0, 9.0, 4.0]):
        report(made, member, INTERVAL, score, tmp_path)
    assert exchange(made, [0]) == [None]
    report(made, 0, INTERVAL + 10, 0.0, tmp_path)
    report(made, 1, INTERVAL + 10, 20.0, tmp_path)
    report(made, 2, INTERVAL + 10, -5.0, tmp_path)
    assert exchange(made, [2, 1, 3]) == [None, 9.0, None]


def test_the_order_of_fetching_changes_nothing(tmp_path: Path) -> None:
    found = []
    for order in ([0, 1, 2, 3, 4, 5], [5, 3, 1, 0, 2, 4]):
        made = scheduler(6, truncation=0.5)
        for member, score in enumerate([3.0, 1.0, 9.0, 4.0, 8.0, 0.0]):
            report(made, member, INTERVAL, score, tmp_path)
        results = {member: made.exploit_and_explore(member) for member in order}
        found.append([(weight(results[member][0]), results[member][1]) for member in range(6)])
    assert found[0] == found[1]


def test_nobody_waits_longer_than_max_wait_for_a_member_that_is_silent(tmp_path: Path) -> None:
    clock = Clock()
    made = scheduler(clock=clock)
    report(made, 0, INTERVAL, 5.0, tmp_path)
    clock.now += 30
    report(made, 1, INTERVAL, 1.0, tmp_path)
    report(made, 2, INTERVAL, 3.0, tmp_path)
    assert not made.should_exploit_and_explore(0)
    clock.now += 29.9
    assert not made.should_exploit_and_explore(0)
    clock.now += 0.1
    assert made.should_exploit_and_explore(0)
    assert [member.lost for member in made.members] == [False, False, False, True]
    assert exchange(made, [0, 1, 2]) == [None, 5.0, None]
    # The next round does not wait for it again.
    for member in range(3):
        report(made, member, 2 * INTERVAL, float(member), tmp_path)
    assert made.should_exploit_and_explore(0)


@pytest.mark.parametrize("step", [None, 7, 130])
def test_a_lost_member_that_comes_back_is_refilled_and_then_takes_part(tmp_path: Path, step: int | None) -> None:
    """Its process began anew and has said nothing, began anew and reports 7 steps, or was only slow and reports its 130th."""
    clock = Clock()
    made = scheduler(3, clock)
    for number in (1, 2):
        for member in range(3):
            if number == 1 or member != 2:
                report(made, member, number * INTERVAL, [10.0, 20.0, 0.0][member] + number, tmp_path)
        clock.now += 60 * (number == 2)
        assert exchange(made, [0, 1]) == ([None, None] if number == 1 else [22.0, None])
    assert made.members[2].lost
    if step is not None:
        report(made, 2, step, 1e9, tmp_path)  # whatever it says, nobody knows what its weights are
    assert made.should_exploit_and_explore(2)
    assert exchange(made, [2]) == [22.0]
    assert (made.members[2].parent, made.members[2].lost) == (1, False)
    # It has the experience of its source, 200 steps, wherever its own counter stands.
    began = step or 0
    report(made, 2, began + INTERVAL - 1, 50.0, tmp_path)
    for member in range(2):
        report(made, member, 3 * INTERVAL, float(member), tmp_path)
    assert not made.should_exploit_and_explore(0)
    report(made, 2, began + INTERVAL, 50.0, tmp_path)
    assert exchange(made) == [50.0, None, None]


def test_a_member_that_never_comes_back_does_not_stop_selection(tmp_path: Path) -> None:
    """With a quarter to be replaced, the dead one must not be that quarter for ever; nor must those without a file."""
    clock = Clock()
    made = scheduler(clock=clock)
    for number in range(1, 4):
        for member in range(3):
            report(made, member, number * INTERVAL, float(member), tmp_path)
        clock.now += 60 * (number == 1)
        assert exchange(made, range(3)) == [2.0, None, None]


def test_a_lost_member_is_a_source_only_with_a_file_and_a_score(tmp_path: Path) -> None:
    """Members 2 and 3 were the best; only the file of member 2 is there."""
    clock = Clock()
    made = scheduler(clock=clock)
    for member, score in enumerate([1.0, 2.0, 90.0, 99.0]):
        report(made, member, INTERVAL, score, tmp_path if member != 3 else None)
    assert exchange(made) == [90.0, None, None, None]
    for member in range(2):
        report(made, member, 2 * INTERVAL, float(member), tmp_path)
    clock.now += 60
    assert exchange(made, [0, 1]) == [90.0, None]
    assert [member.lost for member in made.members] == [False, False, True, True]


def test_a_member_that_is_slow_but_heard_of_is_late_and_not_lost(tmp_path: Path) -> None:
    clock = Clock()
    made = scheduler(3, clock)
    report(made, 0, INTERVAL, 5.0, tmp_path)
    report(made, 1, INTERVAL, 1.0, tmp_path)
    clock.now += 40
    report(made, 2, 60, 0.0, tmp_path)
    clock.now += 20
    assert exchange(made, [0, 1]) == [None, 5.0]
    assert not made.members[2].lost
    assert not made.should_exploit_and_explore(2)  # it was not judged in a round that it took no part in


def test_a_silent_member_is_lost_though_rounds_never_waited_for_it(tmp_path: Path) -> None:
    clock = Clock()
    made = scheduler(3, clock, ready_fraction=0.5)
    for number in range(1, 5):
        for member in range(2):
            report(made, member, number * INTERVAL, float(member), tmp_path)
        exchange(made, [0, 1])
        assert made.members[2].lost == (number == 4)
        clock.now += 20


def test_rounds_are_counted_and_decided_though_a_member_has_not_fetched_the_last_one(tmp_path: Path) -> None:
    clock = Clock()
    made = scheduler(3, clock)
    for member, score in enumerate([5.0, 6.0, 1.0]):
        report(made, member, INTERVAL, score, tmp_path)
    exchange(made, [0, 1])
    for member in range(2):
        report(made, member, 2 * INTERVAL, float(member), tmp_path)
    assert not made.should_exploit_and_explore(0)
    clock.now += 60
    assert exchange(made, [0, 1]) == [1.0, None]
    assert made.round == 3
    # It is lost now, and fetches the newest exchange: in the one that it missed the best was 6.
    assert exchange(made, [2]) == [1.0]


@pytest.mark.parametrize("score", [NAN, math.inf, -math.inf])
def test_a_member_without_a_finite_score_is_never_a_source_and_always_replaced(tmp_path: Path, score: float) -> None:
    made = scheduler(3, min_gap=100.0)
    report(made, 0, INTERVAL, score, tmp_path, checkpoint=write(tmp_path / "x.safetensors", -1.0))
    assert math.isnan(made.members[0].score)
    report(made, 1, INTERVAL, 2.0, tmp_path)
    report(made, 2, INTERVAL, 1.0, tmp_path)
    assert exchange(made) == [2.0, None, None]


def test_a_source_has_a_checkpoint(tmp_path: Path) -> None:
    made = scheduler()
    for member, score in enumerate([3.0, 1.0, 9.0, 4.0]):
        report(made, member, INTERVAL, score, None if member == 2 else tmp_path)
    assert exchange(made) == [None, 4.0, None, None]


def test_a_member_that_must_be_replaced_passes_over_those_without_a_checkpoint(tmp_path: Path) -> None:
    made = scheduler(3)
    for member, score in enumerate([NAN, 9.0, 3.0]):
        report(made, member, INTERVAL, score, None if member == 1 else tmp_path)
    assert exchange(made) == [3.0, None, None]


def test_without_any_source_everybody_goes_on(tmp_path: Path) -> None:
    made = scheduler(2)
    report(made, 0, INTERVAL, NAN, tmp_path)
    report(made, 1, INTERVAL, 2.0, None)
    own = dict(made.members[0].hyperparams)
    with pytest.warns(UserWarning, match="member 0 has no usable score or state, and there is nobody to copy"):
        assert made.exploit_and_explore(0) == (None, own, None)
    assert exchange(made, [1]) == [None]


def spoil(kind: str, path: Path) -> None:
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-5])
    elif kind == "missing":
        path.unlink()
    else:
        save_tensors(path, {"parameters.w": torch.ones(2, 2)}, {"kind": "checkpoint", "seeds": [1, 2]})


@pytest.mark.parametrize("kind", ["truncated", "missing", "several"])
def test_a_source_whose_file_cannot_be_read_is_passed_over(tmp_path: Path, kind: str) -> None:
    made = scheduler()
    for member, score in enumerate([3.0, 1.0, 9.0, 4.0]):
        report(made, member, INTERVAL, score, tmp_path)
    for member in (2, 3):
        spoil(kind, tmp_path / f"m{member}_100.safetensors")
    with pytest.warns(UserWarning, match="cannot copy member") as caught:
        parameters, hyperparams, _ = made.exploit_and_explore(1)
    assert [str(warning.message)[:31] for warning in caught] == [f"member 1 cannot copy member {source}: " for source in (2, 3)]
    assert all(str(tmp_path) in str(warning.message) for warning in caught)
    assert weight(parameters) == 3.0
    assert made.members[1].parent == 0
    assert hyperparams == made.members[1].hyperparams


def test_if_no_file_can_be_read_the_member_survives_with_all_it_has(tmp_path: Path) -> None:
    made = scheduler()
    for member, score in enumerate([3.0, 1.0, 9.0, 4.0]):
        report(made, member, INTERVAL, score, tmp_path)
        spoil("truncated", tmp_path / f"m{member}_100.safetensors")
    own = dict(made.members[1].hyperparams)
    with pytest.warns(UserWarning, match="cannot copy member"):
        assert made.exploit_and_explore(1) == (None, own, None)
    assert made.members[1].parent is None and made.members[1].hyperparams == own
    report(made, 1, 2 * INTERVAL, 1.0, tmp_path)  # and takes part in the next round
    assert made.members[1].entry is not None


def test_a_policy_alone_is_taken_over_with_a_warning_and_its_format(tmp_path: Path) -> None:
    made = scheduler(2)
    torch.save({"checkpoint_format": "v1_policy_only", "parameters": {"w": torch.full((1, 2), 7.0)}}, tmp_path / "best.pt")
    report(made, 0, INTERVAL, 9.0, None, checkpoint=tmp_path / "best.pt")
    report(made, 1, INTERVAL, 1.0, tmp_path)
    with pytest.warns(UserWarning, match="v1_policy_only lacks optimizer"):
        parameters, _, format = made.exploit_and_explore(1)
    assert (weight(parameters), format) == (7.0, "v1_policy_only")


def test_a_slow_member_is_compared_with_what_others_were_at_its_interval(tmp_path: Path) -> None:
    """Member 2 takes three times as long for a step."""
    made = scheduler(3, ready_fraction=0.6)
    for number in (1, 2):
        for member in (0, 1):
            report(made, member, number * INTERVAL, 10.0 * number + member, tmp_path)
        assert exchange(made, [0, 1]) == [10.0 * number + 1, None]
    report(made, 2, INTERVAL, 9.5, tmp_path)
    assert not made.should_exploit_and_explore(2)
    report(made, 0, 3 * INTERVAL, 30.0, tmp_path)
    found = {member: exchange(made, [member])[0] for member in (0, 2)}
    assert found == {0: None, 2: 11.0}  # by what member 1 was after 100 steps, 11, not by its 21 of now
    assert made.members[2].step + made.members[2].inherited == INTERVAL


def test_a_fast_member_is_judged_by_its_score_at_the_interval(tmp_path: Path) -> None:
    made = scheduler(2)
    for step, score in ((INTERVAL, 1.0), (150, 50.0), (2 * INTERVAL, 60.0)):
        report(made, 0, step, score, tmp_path)
        assert not made.should_exploit_and_explore(0)
    report(made, 1, INTERVAL, 2.0, tmp_path)
    assert exchange(made) == [2.0, None]
    # It threw its 200 steps away and has the 100 of its source: its next interval ends after 100 more.
    report(made, 0, 2 * INTERVAL + 99, 3.0, tmp_path)
    report(made, 1, 2 * INTERVAL, 2.0, tmp_path)
    assert not made.should_exploit_and_explore(1)
    report(made, 0, 3 * INTERVAL, 3.0, tmp_path)
    assert exchange(made) == [None, 3.0]


def test_a_fast_member_that_survives_has_come_to_its_next_interval_already(tmp_path: Path) -> None:
    clock = Clock()
    made = scheduler(2, clock)
    report(made, 0, INTERVAL, 5.0, tmp_path)
    clock.now += 10
    report(made, 0, 2 * INTERVAL, 6.0, tmp_path)
    clock.now += 40
    report(made, 1, INTERVAL, 2.0, tmp_path)
    assert exchange(made) == [None, 5.0]  # not the 6.0 of a longer training
    clock.now += 59
    assert not made.should_exploit_and_explore(0)  # the others' time begins with this round
    report(made, 1, 2 * INTERVAL, 1.0, tmp_path)
    assert exchange(made) == [None, 6.0]


def test_sub_populations_exchange_in_their_own_rounds(tmp_path: Path) -> None:
    made = scheduler(4, frequencies=(1, 2), truncation=0.5)
    replaced = []
    for number in range(1, 5):
        for member, score in enumerate([1.0, 2.0, 3.0, 1.0]):
            report(made, member, number * INTERVAL, score, tmp_path)
        replaced.append([index for index, found in enumerate(exchange(made)) if found is not None])
    assert replaced[0] == replaced[2] == [0]
    assert 3 in replaced[1] and 3 in replaced[3]


def test_a_migrant_brings_weights_and_leaves_the_hyperparameters(tmp_path: Path) -> None:
    """From the sub-population that exchanges every round to the one that exchanges every second one."""
    made = scheduler(4, frequencies=(1, 2), truncation=0.25)
    for number in (1, 2):
        for member, score in enumerate([90.0, 2.0, 80.0, 1.0]):
            report(made, member, number * INTERVAL, score, tmp_path)
        before = [dict(member.hyperparams) for member in made.members]
        results = [made.exploit_and_explore(member) for member in range(4)]
    kept = [index for index in (1, 3) if weight(results[index][0]) == 90.0 and results[index][1] == before[index]]
    assert len(kept) == 1


def test_gains_are_remembered_from_the_score_a_member_began_with(tmp_path: Path) -> None:
    made = scheduler(3)
    began = [dict(member.hyperparams) for member in made.members]
    for member, score in enumerate([5.0, 1.0, 2.0]):
        report(made, member, INTERVAL, score, tmp_path)
    exchange(made)
    assert made.history == []  # nobody knows the score of the first weights
    copy = dict(made.members[1].hyperparams)
    for member, score in enumerate([7.0, 9.0, NAN]):
        report(made, member, 2 * INTERVAL, score, tmp_path)
    exchange(made)
    found = [(gain.round, gain.member, gain.hyperparams, gain.gain) for gain in made.history]
    assert found == [(2, 0, began[0], 2.0), (2, 1, copy, 4.0)]  # member 1 began with the 5 of its source


def test_pb2_learns_from_the_gains_and_knows_what_the_others_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []

    def suggest(rules: Any, history: Any, running: Any, count: int, *, seed: int, round: int) -> list[dict[str, float]]:
        seen.append((list(history), [dict(values) for values in running], count, seed, round))
        return [{"optimizer.lr": len(seen) / 1000, "ppo.ent_coef": 0.001}]

    monkeypatch.setattr(pb2, "suggest", suggest)
    made = scheduler(4, explore="pb2", truncation=0.5, seed=5)
    for number in (1, 2):
        for member, score in enumerate([9.0, 8.0, 1.0, 2.0]):
            report(made, member, number * INTERVAL, score + number, tmp_path)
        before = [dict(member.hyperparams) for member in made.members]
        exchange(made)
    assert [(count, seed, number) for _, _, count, seed, number in seen] == [(1, 5, 1)] * 2 + [(1, 5, 2)] * 2
    assert all(history == made.history for history, *_ in seen[2:]) and len(made.history) == 4
    assert seen[2][1] == [before[0], before[1], before[3]]
    assert seen[3][1] == [before[0], before[1], {"optimizer.lr": 0.003, "ppo.ent_coef": 0.001}]
    assert made.members[3].hyperparams["optimizer.lr"] == 0.004


def test_pb2_without_its_library_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ConfigError(["needs scikit-learn"])

    monkeypatch.setattr("hardy.pbt.scheduler.require", missing)
    PBTScheduler(PBTConfig())
    with pytest.raises(ConfigError, match="scikit-learn"):
        PBTScheduler(PBTConfig(explore="pb2"))


@settings(deadline=None, max_examples=30)
@given(
    scores=st.lists(st.sampled_from([NAN, 1.0, 2.0, 3.0, 4.0, 5.0]), min_size=2, max_size=7),
    method=st.sampled_from(["truncation", "tournament", "welch"]),
    frequencies=st.sampled_from([(1,), (1, 2), (2, 1, 1)]),
    seed=st.integers(0, 100),
)
def test_where_everybody_takes_part_the_decision_is_that_of_select(
    scores: list[float], method: Any, frequencies: tuple[int, ...], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    size = len(scores)
    made = scheduler(size, select=method, frequencies=frequencies, seed=seed, truncation=0.4)
    path = write(tmp_path_factory.getbasetemp() / "any.safetensors", 1.0)
    for member, score in enumerate(scores):
        report(made, member, INTERVAL, score, None, checkpoint=path)
    judged = Scores(np.array(scores), np.full(size, 0.1), 5)
    chosen = select(judged, made.config, seed=seed, round=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nobody to copy
        exchange(made)
    expected = [None if source == member else source for member, source in enumerate(chosen.source.tolist())]
    assert [member.parent for member in made.members] == expected


Misuse = Callable[[PBTScheduler], Any]


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda made: report(made, 2, 10, 0.0, None), "member 2: unknown; members are 0 to 1"),
        (lambda made: report(made, -1, 10, 0.0, None), "member -1: unknown"),
        (lambda made: made.should_exploit_and_explore(7), "member 7: unknown"),
        (lambda made: made.exploit_and_explore(0), "member 0: no exchange waits for it; ask should_exploit_and_explore"),
        (lambda made: report(made, 0, 49, 0.0, None), "member 0: step = 49: must be ≥ 50"),
        (lambda made: report(made, 1, -1, 0.0, None), "member 1: step = -1: must be ≥ 0"),
        (lambda made: report(made, 0, 60, 0.0, None, standard_error=-0.1), "standard_error = -0.1: must be ≥ 0, or NaN"),
        (lambda made: report(made, 0, 60, 0.0, None, episodes=1), "episodes = 1: must be ≥ 2 where select = 'welch'"),
    ],
)
def test_misuse_is_named(call: Misuse, problem: str) -> None:
    made = scheduler(2, select="welch")
    report(made, 0, 50, 0.0, None)
    before = made.state_dict()
    with pytest.raises(ValueError, match=re.escape(problem)):
        call(made)
    assert made.state_dict() == before


def test_an_empty_scheduler_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"call initialize_population\(\) or load_state_dict\(\)"):
        PBTScheduler(PBTConfig()).should_exploit_and_explore(0)


@pytest.mark.parametrize(
    "change",
    [
        {"population_size": 1},
        {"perturbation_interval": 0},
        {"ready_fraction": 0.0},
        {"ready_fraction": 1.1},
        {"max_wait": 0.0},
        {"seed": -1},
    ],
)
def test_impossible_settings_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        settings_from_dict(PBTConfig, change)


actions = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.integers(0, 130),
        st.sampled_from([NAN, 1.0, 2.0, 3.0, 4.0]),
        st.booleans(),
        st.sampled_from([0.0, 10.0, 45.0]),
    ),
    max_size=25,
)


@settings(deadline=None, max_examples=20)
@given(script=actions, cut=st.integers(0, 25), fraction=st.sampled_from([0.5, 1.0]))
def test_a_scheduler_resumed_anywhere_continues_exactly(
    script: list[tuple[Any, ...]], cut: int, fraction: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Through JSON without NaN, and with another clock."""
    folder = tmp_path_factory.mktemp("run")
    clocks = [Clock(), Clock()]
    ours, theirs = (scheduler(3, clock, ready_fraction=fraction) for clock in clocks)
    for index, (member, steps, score, has_file, seconds) in enumerate(script):
        if index == cut:
            text = json.dumps(theirs.state_dict(), allow_nan=False)
            clocks[1] = Clock(-5000.0)
            theirs = PBTScheduler(theirs.config, clocks[1])
            theirs.load_state_dict(json.loads(text))
        results = []
        for made, clock in zip((ours, theirs), clocks, strict=True):
            clock.now += seconds
            step = made.members[member].step + steps
            report(made, member, step, score, folder if has_file else None)
            due = made.should_exploit_and_explore(member)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = made.exploit_and_explore(member) if due else None
            results.append((due, found and (weight(found[0]), *found[1:])))
        assert results[0] == results[1]
    assert json.dumps(ours.state_dict()) == json.dumps(theirs.state_dict())


@pytest.mark.parametrize("rounds_before", [0, 1])
def test_a_resumed_scheduler_waits_for_what_was_left_of_the_time(tmp_path: Path, rounds_before: int) -> None:
    """Also for a member that rounds have passed by already: it is lost after the same time in all."""
    clock = Clock()
    made = scheduler(3, clock, ready_fraction=0.6)
    for number in range(rounds_before):
        for member in range(2):
            report(made, member, (number + 1) * INTERVAL, float(member), tmp_path)
        exchange(made, [0, 1])
    report(made, 0, (rounds_before + 1) * INTERVAL, 5.0, tmp_path)
    clock.now += 40
    later = Clock(-77.0)
    resumed = PBTScheduler(made.config, later)
    resumed.load_state_dict(json.loads(json.dumps(made.state_dict())))
    later.now += 19.9
    assert not resumed.should_exploit_and_explore(0)
    later.now += 0.2
    assert resumed.should_exploit_and_explore(0)
    assert resumed.members[2].lost


def test_a_resumed_scheduler_remembers_since_when_a_member_is_awaited(tmp_path: Path) -> None:
    clock = Clock()
    made = scheduler(3, clock, ready_fraction=0.6)
    for member in range(2):
        report(made, member, INTERVAL, float(member), tmp_path)
    exchange(made, [0, 1])
    clock.now += 30
    resumed = PBTScheduler(made.config, clock)
    resumed.load_state_dict(json.loads(json.dumps(made.state_dict())))
    clock.now += 30.1
    for member in range(2):
        report(resumed, member, 2 * INTERVAL, float(member), tmp_path)
    assert resumed.should_exploit_and_explore(0) and resumed.members[2].lost


def test_the_state_of_another_configuration_is_refused() -> None:
    state = scheduler(3).state_dict()
    with pytest.raises(ValueError, match="another configuration"):
        PBTScheduler(PBTConfig(population_size=4)).load_state_dict(state)


# ---------------------------------------------------------------------------------------------- with real members and files

LEARNING = PBTConfig(
    population_size=3,
    perturbation_interval=32,
    min_gap=0.0,
    hyperparams={"optimizer.lr": SPACES["optimizer.lr"]},
    max_wait=60.0,
)


def make_model(member: PopulationMember) -> DistributionalPPO:
    return DistributionalPPO(
        "MlpGruPolicy",
        "CartPoleNoVel-v1",
        seed=member.id,
        num_envs=4,
        threads=1,
        optimizer={"name": "AdaptiveUPGD", "lr": member.hyperparams["optimizer.lr"]},
        policy_kwargs={"memory_size": 5, "encoder": [3]},
        ppo={"n_steps": 8, "n_epochs": 1, "n_minibatches": 1},
    )


def load_(model: DistributionalPPO, parameters: Mapping[str, Tensor], hyperparams: Mapping[str, float]) -> None:
    """What a member does with the answer: state into its own storage, then hyperparameters, then no memory of old weights."""
    assert model.trainer is not None
    state = flatten_state(model.trainer.state)
    for name, value in parameters.items():
        state[name].copy_(value)
    for name, number in hyperparams.items():
        model.trainer.state.hyper[name].fill_(number)
    model.reset_lstm_states_to_initial()


def turn(made: PBTScheduler, model: DistributionalPPO, member: int, score: float, folder: Path) -> None:
    """One interval of training, the file, the report."""
    model.learn(LEARNING.perturbation_interval)
    assert model.trainer is not None
    step = model.trainer.timesteps
    path = model.save(folder / f"member{member}_{step}")
    made.report(member, step=step, score=score, standard_error=0.1, episodes=4, checkpoint=path)


def weights(model: DistributionalPPO) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.policy.named_parameters()}


def test_three_members_that_learn_exchange_for_two_rounds(tmp_path: Path) -> None:
    made = PBTScheduler(LEARNING, Clock())
    models = [make_model(member) for member in made.initialize_population()]
    for number, scores in enumerate([[1.0, 2.0, 3.0], [5.0, 1.0, 2.0]], start=1):
        for member, model in enumerate(models):
            turn(made, model, member, scores[member], tmp_path)
        best, worst = scores.index(max(scores)), scores.index(min(scores))
        before = [weights(model) for model in models]
        for member, model in enumerate(models):
            assert made.should_exploit_and_explore(member)
            parameters, hyperparams, format = made.exploit_and_explore(member)
            assert (parameters is not None) == (format == "v2_full_parameters") == (member == worst)
            if parameters is not None:
                load_(model, parameters, hyperparams)
        for member, model in enumerate(models):
            expected = before[best if member == worst else member]
            assert all(torch.equal(value, expected[name]) for name, value in weights(model).items())
            assert model.trainer is not None
            rate = float(model.trainer.state.hyper["optimizer.lr"])
            assert rate == pytest.approx(made.members[member].hyperparams["optimizer.lr"], rel=1e-6)
        assert made.members[worst].parent == best and made.round == number + 1
        source, copy = models[best].trainer, models[worst].trainer
        assert source is not None and copy is not None
        assert torch.equal(copy.state.observation.mean, source.state.observation.mean)
        assert torch.equal(copy.state.optimizer.upgd.step, source.state.optimizer.upgd.step)
        assert models[worst].lstm_states is not None and not models[worst].lstm_states.any()


def test_two_members_go_on_when_the_third_goes_silent_and_refill_it_when_it_is_back(tmp_path: Path) -> None:
    clock = Clock()
    made = PBTScheduler(LEARNING, clock)
    models = [make_model(member) for member in made.initialize_population()]
    for member, model in enumerate(models):
        turn(made, model, member, float(member), tmp_path)
    for member, model in enumerate(models):
        parameters, hyperparams, _ = made.exploit_and_explore(member)
        if parameters is not None:
            load_(model, parameters, hyperparams)
    del models[2]
    for member, model in enumerate(models):
        turn(made, model, member, float(member), tmp_path)
        assert not made.should_exploit_and_explore(member)
    clock.now += 60
    for member in range(2):
        made.exploit_and_explore(member)
    # The process of member 2 starts again, with fresh weights and its step at 0.
    model = make_model(made.members[2])
    assert made.should_exploit_and_explore(2)
    parameters, hyperparams, _ = made.exploit_and_explore(2)
    assert parameters is not None
    load_(model, parameters, hyperparams)
    assert all(torch.equal(value, weights(models[1])[name]) for name, value in weights(model).items())
    turn(made, model, 2, 9.0, tmp_path)
    for member, other in enumerate(models):
        turn(made, other, member, float(member), tmp_path)
    assert [made.should_exploit_and_explore(member) for member in range(3)] == [True] * 3
    assert made.members[2].exchange is not None and not made.members[2].lost
