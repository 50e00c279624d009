"""Exploration: only copies explore, each number has its own draw, and no draw leaves its bounds."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from hardy.pbt import Gain, HyperparameterSpace, PBTRules, draw_initial, explore
from hardy.pbt.settings import NEAREST_TO_ONE
from hardy.population import stream_seed

NAN, INF = math.nan, math.inf
SPACES = {
    "lr": HyperparameterSpace(low=1e-4, high=1e-1, factor=1.5),
    "clip": HyperparameterSpace(low=-1.0, high=1.0, space="linear", factor=1.1),
    "gamma": HyperparameterSpace(low=0.9, high=0.9999, space="log_one_minus", factor=2.0),
}
MIDDLE = {"lr": 1e-2, "clip": 0.5, "gamma": 0.99}


def rules_of(explore: str = "perturb", spaces: Mapping[str, HyperparameterSpace] = SPACES) -> PBTRules:
    return PBTRules.model_validate({"hyperparams": dict(spaces), "explore": explore})


def column(value: float, size: int) -> dict[str, np.ndarray]:
    return {"lr": np.full(size, value)}


def explored(values: Mapping[str, Any], rules: PBTRules, seed: int = 0, round: int = 1, **kwargs: Any) -> dict[str, np.ndarray]:
    """`explore` with every member replaced."""
    arrays = {name: np.asarray(numbers, dtype=float) for name, numbers in values.items()}
    size = len(next(iter(arrays.values())))
    return explore(arrays, np.ones(size, dtype=bool), rules, seed=seed, round=round, **kwargs)


def everyone(size: int) -> dict[str, np.ndarray]:
    return {name: np.full(size, value) for name, value in MIDDLE.items()}


# --------------------------------------------------------------------------------------------------------- the first draws


def test_first_draws_are_even_on_the_scale_of_their_space() -> None:
    drawn = draw_initial(rules_of(), 2000, seed=3)
    for name, space in SPACES.items():
        assert ((drawn[name] >= space.low) & (drawn[name] <= space.high)).all()
    even = {
        "lr": np.log(drawn["lr"] / 1e-4) / np.log(1e3),
        "clip": (drawn["clip"] + 1) / 2,
        "gamma": np.log((1 - drawn["gamma"]) / 0.1) / np.log(1e-3),
    }
    for name, place in even.items():
        assert stats.kstest(place, "uniform").pvalue > 0.01, name


def test_first_draws_are_independent_of_one_another() -> None:
    drawn = draw_initial(rules_of(), 500, seed=3)
    ranks = np.array([stats.rankdata(values) for values in drawn.values()])
    assert np.abs(np.corrcoef(ranks) - np.eye(3)).max() < 4 / math.sqrt(500)
    assert len(set(drawn["lr"])) == 500
    assert set(draw_initial(rules_of(), 500, seed=4)["lr"]).isdisjoint(drawn["lr"])


def test_a_larger_population_begins_with_the_same_members_and_further_names_change_none() -> None:
    small, large = (draw_initial(rules_of(), size, seed=3) for size in (3, 7))
    one_name = draw_initial(rules_of(spaces={"gamma": SPACES["gamma"]}), 3, seed=3)
    for name in SPACES:
        assert small[name].tolist() == large[name][:3].tolist()
    assert one_name["gamma"].tolist() == small["gamma"].tolist()


def test_golden_draws() -> None:
    """Worked out by hand from the streams' own numbers, so that neither their names nor their use can change unseen."""
    assert np.random.default_rng(stream_seed(0, "initial", 0, "gamma")).random() == pytest.approx(0.019185604371657)
    assert draw_initial(rules_of(), 1, seed=0)["gamma"][0] == pytest.approx(1 - 0.1 * 1e-3**0.019185604371657, rel=1e-12)
    stream = np.random.default_rng(stream_seed(3, "explore", 4, 1, "lr")).random(2)
    assert stream == pytest.approx([0.84457182, 0.09632889]), "the second is below a half: up"
    assert explored(everyone(2), rules_of(), seed=3, round=4)["lr"][1] == pytest.approx(1.5e-2, rel=1e-12)
    assert explored(everyone(2), rules_of("both"), seed=3, round=4)["lr"][1] == pytest.approx(1.5e-2, rel=1e-12)
    drawn = explored(everyone(2), rules_of("resample"), seed=3, round=4)["lr"][1]
    assert drawn == pytest.approx(1e-4 * 1e3**0.09632889, rel=1e-6)


# ------------------------------------------------------------------------------------------------------------- who explores


@pytest.mark.parametrize("way", ["perturb", "resample", "both"])
def test_only_the_replaced_change(way: str) -> None:
    values = {name: np.full(6, value) for name, value in MIDDLE.items()}
    values["lr"][4] = NAN  # a survivor's number is its own affair, whatever it is
    values["gamma"][0] = 5.0
    before = {name: numbers.tobytes() for name, numbers in values.items()}
    replaced = np.array([False, True, False, True, False, False])
    found = explore(values, replaced, rules_of(way), seed=1, round=2)
    for name, numbers in found.items():
        assert numbers[~replaced].tobytes() == values[name][~replaced].tobytes(), "survivors bit for bit"
        assert (numbers[replaced] != values[name][replaced]).all()
        assert values[name].tobytes() == before[name], "the input is not written"
        assert not np.shares_memory(numbers, values[name])


def test_nobody_replaced_changes_nothing_and_still_gives_fresh_arrays() -> None:
    values = everyone(3)
    for way in ("perturb", "pb2"):
        found = explore(values, np.zeros(3, dtype=bool), rules_of(way), seed=1, round=2)
        for name, numbers in found.items():
            assert numbers.tolist() == values[name].tolist()
            assert not np.shares_memory(numbers, values[name])


def test_other_hyperparameters_pass_through_in_their_places() -> None:
    values = {"z.other": np.array([NAN, -3.0]), **everyone(2), "a.other": np.array([1.0, 2.0])}
    found = explored(values, rules_of())
    assert list(found) == ["z.other", "lr", "clip", "gamma", "a.other"]
    assert found["z.other"].tobytes() == values["z.other"].tobytes()
    assert found["a.other"].tolist() == [1.0, 2.0]
    assert not np.shares_memory(found["a.other"], values["a.other"])


def test_missing_numbers_are_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match=r"no values for hyperparameter 'gamma', which the rules tune \(did you mean 'gama'\?\)"
    ):
        explored({"lr": [1e-2], "clip": [0.5], "gama": [0.99]}, rules_of())
    with pytest.raises(ValueError, match=r"hyperparameter 'clip' has shape \(3,\): replaced names 2 members"):
        loose({**everyone(2), "clip": np.zeros(3)}, np.ones(2, dtype=bool), rules_of(), seed=0, round=1)


loose = getattr(explore, "__wrapped__", explore)
"""`explore` as a caller without shape checks reaches it."""


# ---------------------------------------------------------------------------------------------------------- steps and draws


def test_a_step_multiplies_divides_or_moves_as_the_space_says() -> None:
    found = explored(everyone(40), rules_of())
    expected = {
        "lr": [1e-2 / 1.5, 1e-2 * 1.5],
        "clip": [0.5 - 0.1 * 2, 0.5 + 0.1 * 2],
        "gamma": [1 - 0.01 * 2, 1 - 0.01 / 2],
    }
    for name, values in expected.items():
        assert sorted(set(found[name])) == pytest.approx(values, rel=1e-12), name
        assert len(set(found[name])) == 2, name


def test_up_and_down_are_equally_likely() -> None:
    found = explored(everyone(4000), rules_of())
    for name, numbers in found.items():
        ups = int((numbers > MIDDLE[name]).sum())
        assert abs(ups - 2000) < 4 * math.sqrt(1000), name


def test_draws_of_members_names_and_rounds_are_independent() -> None:
    rules = rules_of(spaces={name: SPACES["lr"] for name in ("a", "b", "c")})
    values = {name: np.full(1000, 1e-2) for name in ("a", "b", "c")}
    rounds = [explored(values, rules, round=round) for round in (1, 2)] + [explored(values, rules, seed=1)]
    ups = np.array([found[name] > 1e-2 for found in rounds for name in ("a", "b", "c")], dtype=float)
    assert np.abs(np.corrcoef(ups) - np.eye(9)).max() < 4 / math.sqrt(1000)
    assert len({tuple(pattern) for pattern in ups[:3].T}) == 8, "all combinations of up and down occur in one exchange"


@pytest.mark.parametrize("way", ["perturb", "resample", "both"])
def test_a_draw_does_not_depend_on_who_else_explores(way: str) -> None:
    rules = rules_of(way)
    full = explored(everyone(5), rules)
    larger = explored(everyone(9), rules)
    alone = explore(everyone(5), np.arange(5) == 3, rules, seed=0, round=1)
    one_name = explored({"gamma": np.full(5, 0.99)}, rules_of(way, {"gamma": SPACES["gamma"]}))
    for name in SPACES:
        assert larger[name][:5].tolist() == full[name].tolist()
        assert alone[name][3] == full[name][3]
    assert one_name["gamma"].tolist() == full["gamma"].tolist()


def test_a_new_draw_is_even_over_the_whole_range_and_forgets_the_copied_value() -> None:
    found = explored(everyone(2000), rules_of("resample"))
    assert stats.kstest(np.log(found["lr"] / 1e-4) / np.log(1e3), "uniform").pvalue > 0.01
    assert stats.kstest((found["clip"] + 1) / 2, "uniform").pvalue > 0.01
    assert stats.kstest(np.log((1 - found["gamma"]) / 0.1) / np.log(1e-3), "uniform").pvalue > 0.01
    elsewhere = explored({**everyone(2000), "lr": np.full(2000, 2e-3)}, rules_of("resample"))
    assert elsewhere["lr"].tolist() == found["lr"].tolist()


@pytest.mark.parametrize("probability", [0.0, 0.25, 0.9, 1.0])
def test_both_draws_anew_with_its_probability_and_steps_otherwise(probability: float) -> None:
    space = SPACES["lr"].model_copy(update={"resample_probability": probability})
    found = explored(column(1e-2, 2000), rules_of("both", {"lr": space}))["lr"]
    up, down = np.isclose(found, 1.5e-2, rtol=1e-12), np.isclose(found, 1e-2 / 1.5, rtol=1e-12)
    drawn = int((~up & ~down).sum())
    assert abs(drawn - 2000 * probability) <= 4 * math.sqrt(2000 * probability * (1 - probability))
    assert abs(int(up.sum()) - int(down.sum())) <= 4 * math.sqrt(2000 - drawn)


# ------------------------------------------------------------------------------------------------------------------ bounds


def test_a_value_outside_the_bounds_is_brought_to_the_nearest_first() -> None:
    rules = rules_of(spaces={"lr": SPACES["lr"]})
    above, below = (set(explored(column(value, 40), rules)["lr"]) for value in (70.0, -3.0))
    assert sorted(above) == pytest.approx([1e-1 / 1.5, 1e-1], rel=1e-12)
    assert sorted(below) == pytest.approx([1e-4, 1.5e-4], rel=1e-12)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("way", ["perturb", "both"])
def test_a_value_that_is_not_finite_is_drawn_anew(way: str, bad: float) -> None:
    values = {name: np.full(600, bad) for name in SPACES}
    found = explored(values, rules_of(way))
    assert stats.kstest(np.log(found["lr"] / 1e-4) / np.log(1e3), "uniform").pvalue > 0.01
    for name, space in SPACES.items():
        assert ((found[name] >= space.low) & (found[name] <= space.high)).all()


numbers = st.one_of(st.floats(allow_nan=True, allow_infinity=True), st.floats(-2, 2), st.floats(0.9, 1.1))


@st.composite
def spaces(draw: st.DrawFn) -> HyperparameterSpace:
    kind = draw(st.sampled_from(["linear", "log", "log_one_minus"]))
    ends = {"linear": st.floats(-1e3, 1e3), "log": st.floats(1e-12, 1e3), "log_one_minus": st.floats(-5, NEAREST_TO_ONE)}[kind]
    low, high = sorted((draw(ends), draw(ends)))
    assume(np.float32(low) < np.float32(high))
    return HyperparameterSpace(low=low, high=high, space=kind, factor=draw(st.floats(1.001, 1e6)))  # type: ignore[arg-type]


@settings(deadline=None, max_examples=200)
@given(
    space=spaces(),
    way=st.sampled_from(["perturb", "resample", "both"]),
    values=st.lists(numbers, min_size=1, max_size=6),
    seed=st.integers(0, 1000),
)
def test_results_lie_inside_the_bounds_whatever_was_copied(
    space: HyperparameterSpace, way: str, values: list[float], seed: int
) -> None:
    rules = rules_of(way, {"x": space})
    results = [explored({"x": values}, rules, seed)["x"], draw_initial(rules, 3, seed)["x"]]
    for found in results:
        assert ((found >= space.low) & (found <= space.high)).all()
        if space.space == "log_one_minus":
            assert (found < 1).all()


def test_a_discount_never_reaches_one_however_often_it_steps_up() -> None:
    space = HyperparameterSpace(low=0.5, high=NEAREST_TO_ONE, space="log_one_minus", factor=10.0)
    rules, values = rules_of(spaces={"gamma": space}), {"gamma": np.full(20, 0.9)}
    highest = 0.0
    for round in range(1, 100):
        values = explored(values, rules, round=round)
        highest = max(highest, float(values["gamma"].max()))
        assert (values["gamma"] < 1).all()
    assert highest == space.high, "the bound itself is reached"


# --------------------------------------------------------------------------------------------------------------------- PB2


class Bandit(types.ModuleType):
    """Stands in for the Gaussian process: notes what it is asked and answers with numbered values."""

    def __init__(self) -> None:
        super().__init__("hardy.pbt.pb2")
        self.asked: list[tuple[Any, ...]] = []

    def suggest(
        self, rules: PBTRules, history: Sequence[Gain], running: Sequence[Mapping[str, float]], count: int, **seeds: int
    ) -> list[dict[str, float]]:
        self.asked.append((rules, history, running, count, seeds))
        return [{"lr": 1e-3 * (i + 1), "clip": 0.1 * (i + 1), "gamma": 0.95 + 0.01 * i} for i in range(count)]


def test_pb2_answers_for_the_replaced_knowing_what_the_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    bandit = Bandit()
    monkeypatch.setitem(sys.modules, "hardy.pbt.pb2", bandit)
    values = {"other": np.arange(4.0), **everyone(4)}
    values["lr"][:] = [0.01, 0.02, 0.03, 0.04]
    history = [Gain(1, 0, MIDDLE, 3.0)]
    rules = rules_of("pb2")
    found = explore(values, np.array([False, True, False, True]), rules, seed=5, round=6, history=history)
    assert found["lr"].tolist() == [0.01, 0.001, 0.03, 0.002]
    assert found["clip"].tolist() == [0.5, 0.1, 0.5, 0.2]
    assert found["gamma"].tolist() == [0.99, 0.95, 0.99, 0.96]
    assert found["other"].tolist() == [0, 1, 2, 3]
    running = [{**MIDDLE, "lr": 0.01}, {**MIDDLE, "lr": 0.03}]
    assert bandit.asked == [(rules, history, running, 2, {"seed": 5, "round": 6})]
    explore(values, np.zeros(4, dtype=bool), rules, seed=5, round=6, history=history)
    assert len(bandit.asked) == 1, "nobody replaced, nothing asked"


def test_pb2_itself_answers_inside_the_bounds() -> None:
    pytest.importorskip("sklearn", reason="PB2 needs scikit-learn")
    history = [Gain(round, p, {**MIDDLE, "lr": 1e-3 * (p + 1)}, float(p)) for round in (1, 2) for p in range(3)]
    found = explore(everyone(4), np.arange(4) > 1, rules_of("pb2"), seed=5, round=3, history=history)
    for name, space in SPACES.items():
        assert found[name][:2].tolist() == [MIDDLE[name]] * 2
        assert ((found[name] >= space.low) & (found[name] <= space.high)).all()
