"""PB2: the kernel is the paper's, and the bandit finds what is good now."""

from __future__ import annotations

import builtins
import itertools
import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor

from hardy.config import ConfigError
from hardy.pbt import Gain, HyperparameterSpace, PBTRules, pb2
from hardy.pbt.pb2 import suggest
from hardy.pbt.time_kernel import TimeVaryingRBF
from hardy.population import stream_seed

RULES = PBTRules(
    hyperparams={
        "lr": HyperparameterSpace(low=1e-4, high=1.0),
        "gamma": HyperparameterSpace(low=0.9, high=0.999, space="log_one_minus"),
    },
    explore="pb2",
)
LINEAR = PBTRules(hyperparams={"x": HyperparameterSpace(low=-2.0, high=6.0, space="linear")}, explore="pb2")


def share(name: str, value: float) -> float:
    """Where a value stands in its range, on the even scale, written out anew."""
    if name == "lr":
        return math.log(value / 1e-4) / math.log(1e4)
    return math.log((1 - 0.9) / (1 - value)) / math.log(0.1 / 0.001)


def drifting(values: Mapping[str, float], time: float) -> float:
    """Highest, 1, at a place that wanders through the square once in 60 rounds."""
    place = 0.5 + 0.3 * math.cos(time / 10), 0.5 + 0.3 * math.sin(time / 10)
    distance = sum((share(name, value) - centre) ** 2 for (name, value), centre in zip(values.items(), place, strict=True))
    return math.exp(-8 * distance)


def play(seed: int, rounds: int, *, learn: bool) -> float:
    """Mean gain of two suggestions a round, beside two members that go on, over the second half of the rounds."""
    noise = np.random.default_rng(seed)
    running = suggest(RULES, [], [], 2, seed=seed, round=1000)
    history: list[Gain] = []
    reached = []
    for number in range(1, rounds + 1):
        found = suggest(RULES, history if learn else [], running, 2, seed=seed, round=number)
        gains = [drifting(values, number + 1) for values in [*found, *running]]
        reached.append(sum(gains[:2]) / 2)
        for member, (values, gain) in enumerate(zip([*found, *running], gains, strict=True)):
            history.append(Gain(number + 1, member, values, 50 + 7 * (gain + 0.05 * noise.normal())))
        running = found
    return float(np.mean(reached[rounds // 2 :]))


def test_it_follows_a_drifting_optimum_better_than_chance() -> None:
    """Chance reaches 0.28 on average, and never as much as the bandit at its worst."""
    learnt = [play(seed, 12, learn=True) for seed in range(3)]
    chance = [play(seed, 12, learn=False) for seed in range(3)]
    assert min(learnt) > 0.6 > max(chance)


def noiseless(rules: PBTRules, optimum: float, points: int) -> list[Gain]:
    places = np.linspace(-2, 6, points)
    return [Gain(3, index, {"x": float(place)}, -((place - optimum) ** 2)) for index, place in enumerate(places)]


@pytest.mark.parametrize("optimum", [-2.0, -1.3, 2.0, 4.7, 6.0])
def test_the_optimum_of_a_known_curve_is_found(optimum: float) -> None:
    found = suggest(LINEAR, noiseless(LINEAR, optimum, 25), [], 1, seed=0, round=3)
    assert found[0]["x"] == pytest.approx(optimum, abs=0.25)


def test_what_was_good_long_ago_counts_less_than_what_is_good_now() -> None:
    generator = np.random.default_rng(0)
    history = []
    for number in range(1, 41):
        best = 0.0 if number <= 20 else 4.0
        for member, x in enumerate(generator.uniform(-2, 6, 4)):
            history.append(Gain(number, member, {"x": float(x)}, -((x - best) ** 2)))
    found = suggest(LINEAR, history, [], 1, seed=0, round=40)
    assert found[0]["x"] == pytest.approx(4.0, abs=1.0)


@settings(deadline=None, max_examples=10)
@given(
    gains=st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=7),
    count=st.integers(0, 3),
    seed=st.integers(0, 2**40),
)
def test_suggestions_are_inside_the_bounds_and_repeat_whatever_the_gains(gains: list[float], count: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    history = [
        Gain(index // 2, index, {"lr": float(10 ** generator.uniform(-6, 3)), "gamma": float(generator.uniform(-1, 2))}, gain)
        for index, gain in enumerate(gains)
    ]
    running = [{"lr": 0.0, "gamma": 1.0}]
    found = suggest(RULES, history, running, count, seed=seed, round=4)
    assert found == suggest(RULES, history, running, count, seed=seed, round=4)
    assert len(found) == count
    for values in found:
        assert list(values) == ["lr", "gamma"]
        assert all(type(value) is float for value in values.values())
        assert 1e-4 <= values["lr"] <= 1.0 and 0.9 <= values["gamma"] <= 0.999


def test_another_seed_or_round_draws_anew() -> None:
    draws = [suggest(RULES, [], [], 1, seed=seed, round=number)[0] for seed, number in itertools.product((0, 1), (1, 2))]
    assert len({values["lr"] for values in draws}) == 4


@pytest.mark.parametrize("history", [[], [Gain(1, 0, {"lr": 0.1, "gamma": 0.95}, 1.0)]])
def test_fewer_than_two_points_mean_even_draws_from_the_whole_range(history: list[Gain]) -> None:
    found = suggest(RULES, history, [], 400, seed=1, round=1)
    for name in RULES.hyperparams:
        shares = [share(name, values[name]) for values in found]
        assert np.quantile(shares, [0.05, 0.5, 0.95]) == pytest.approx([0.05, 0.5, 0.95], abs=0.06)
    expected = np.random.default_rng(stream_seed(1, "pb2", 1)).random(2)
    assert [share(name, found[0][name]) for name in RULES.hyperparams] == pytest.approx(expected.tolist())


def test_points_that_say_nothing_are_left_out() -> None:
    good = noiseless(LINEAR, 1.0, 9)
    useless = [
        Gain(3, 1, {"x": 5.0}, math.nan),
        Gain(3, 1, {"x": 5.0}, math.inf),
        Gain(3, 1, {"x": math.nan}, 1e9),
        Gain(3, 1, {"y": 5.0}, 1e9),
    ]
    without = suggest(LINEAR, good, [{"x": 3.0}], 2, seed=0, round=3)
    assert suggest(LINEAR, [*useless, *good], [{"x": 3.0}, {"x": math.inf}, {}], 2, seed=0, round=3) == without


def test_only_the_newest_points_are_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pb2, "MAX_POINTS", 25)
    old = [Gain(1, 0, {"x": float(x)}, 1e6 * x) for x in np.linspace(-2, 6, 20)]
    recent = noiseless(LINEAR, 1.0, 25)
    assert suggest(LINEAR, [*recent, *old], [], 1, seed=0, round=3) == suggest(LINEAR, recent, [], 1, seed=0, round=3)


def spread(found: list[dict[str, float]]) -> float:
    places = np.array([[share(name, value) for name, value in values.items()] for values in found])
    return min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(places, 2))


@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_a_batch_tries_different_places_though_the_history_is_the_same(noise: float) -> None:
    generator = np.random.default_rng(5)
    drawn = suggest(RULES, [], [], 12, seed=3, round=1)
    history = [Gain(2, index, values, drifting(values, 2) + noise * generator.normal()) for index, values in enumerate(drawn)]
    found = suggest(RULES, history, [], 4, seed=0, round=2)
    assert spread(found) > 0.02
    # What runs already is not tried again either.
    assert spread([found[0], *suggest(RULES, history, [found[0]], 1, seed=0, round=2)]) > 0.02


def test_the_bound_is_mean_plus_kappa_deviations_and_imagined_places_only_lower_the_deviation() -> None:
    known = np.array([[1.0, 0.1], [1.0, 0.5], [2.0, 0.9], [2.0, 0.4], [2.0, 0.7]])
    gains = np.array([-1.0, 0.2, 1.3, -0.7, 0.2])
    bandit = pb2._Bandit(known, gains, np.random.default_rng(0))
    assert bandit.kappa == pytest.approx(math.sqrt(0.2 + math.log(0.4 * 5)))
    places = np.array([[0.3], [0.6]])
    rows = np.array([[3.0, 0.3], [3.0, 0.6]])
    gram = bandit.expected.kernel_(known) + bandit.noise * np.eye(5)
    cross = bandit.expected.kernel_(rows, known)
    mean = cross @ np.linalg.solve(gram, gains)
    variance = bandit.expected.kernel_.diag(rows) - np.einsum("ij,ji->i", cross, np.linalg.solve(gram, cross.T))
    np.testing.assert_allclose(bandit.bound(places, 3), mean + bandit.kappa * np.sqrt(variance), rtol=1e-6)
    bandit.imagine([np.array([0.3])], 3)
    after = bandit.bound(places, 3)
    assert after[0] == pytest.approx(mean[0], abs=1e-2)  # known exactly now, at the gain that was expected
    assert mean[1] < after[1] < mean[1] + bandit.kappa * math.sqrt(variance[1])
    assert pb2._Bandit(known[:2], gains[:2], np.random.default_rng(0)).kappa == pytest.approx(math.sqrt(0.2))


def test_the_kernel_has_the_values_of_the_formula() -> None:
    kernel = TimeVaryingRBF(length_scale=0.5, epsilon=0.19)
    X = np.array([[1.0, 0.2, 0.4], [3.0, 0.2, 0.4], [1.0, 0.5, 0.0], [4.0, 0.5, 0.0]])
    found = kernel(X)
    assert found[0, 0] == 1.0
    assert found[0, 1] == pytest.approx(0.81)  # two rounds apart: (1 − 0.19)^(2/2)
    assert found[0, 2] == pytest.approx(math.exp(-0.25 / (2 * 0.25)))  # |x − x'|² = 0.09 + 0.16
    assert found[1, 3] == pytest.approx(math.exp(-0.5) * 0.9)  # one round apart: the root of 0.81
    assert found[0, 3] == pytest.approx(math.exp(-0.5) * 0.9**3)
    np.testing.assert_array_equal(found, found.T)
    np.testing.assert_allclose(kernel(X[:1], X), found[:1])
    np.testing.assert_array_equal(kernel.diag(X), np.ones(4))
    assert kernel.is_stationary()
    with pytest.raises(ValueError, match="eval_gradient = True with Y"):
        kernel(X, X, eval_gradient=True)


def points(seed: int, count: int = 9) -> Any:
    generator = np.random.default_rng(seed)
    return np.column_stack([generator.integers(0, 12, count).astype(float), generator.random((count, 3))])


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), length_scale=st.floats(0.05, 5.0), epsilon=st.floats(0.001, 0.95))
def test_the_gradient_is_that_of_finite_differences_and_the_matrix_positive(
    seed: int, length_scale: float, epsilon: float
) -> None:
    kernel = TimeVaryingRBF(length_scale, epsilon)
    X = points(seed)
    value, gradient = kernel(X, eval_gradient=True)
    assert np.linalg.eigvalsh(value).min() > -1e-10
    assert gradient.shape == (9, 9, 2)
    np.testing.assert_allclose(np.exp(kernel.theta), [epsilon, length_scale])
    for index in range(2):
        step = np.eye(2)[index] * 1e-6
        up, down = kernel.clone_with_theta(kernel.theta + step)(X), kernel.clone_with_theta(kernel.theta - step)(X)
        np.testing.assert_allclose(gradient[:, :, index], (up - down) / 2e-6, atol=1e-6)


@pytest.mark.parametrize(("fixed", "left"), [("epsilon_bounds", 1), ("length_scale_bounds", 0)])
def test_a_fixed_parameter_has_no_gradient(fixed: str, left: int) -> None:
    X = points(0)
    kernel = TimeVaryingRBF(**{fixed: "fixed"})
    np.testing.assert_array_equal(
        kernel(X, eval_gradient=True)[1][:, :, 0], TimeVaryingRBF()(X, eval_gradient=True)[1][:, :, left]
    )
    none = TimeVaryingRBF(epsilon_bounds="fixed", length_scale_bounds="fixed")
    assert none(X, eval_gradient=True)[1].shape == (9, 9, 0)


def test_fitting_tells_a_world_that_changes_from_one_that_does_not() -> None:
    generator = np.random.default_rng(2)
    X = np.column_stack([np.repeat(np.arange(12.0), 5), generator.random(60)])
    still = np.sin(6 * X[:, 1])
    moving = np.sin(6 * X[:, 1] + 1.3 * X[:, 0])
    forgotten = []
    for gains in (still, moving):
        process = GaussianProcessRegressor(TimeVaryingRBF(), alpha=1e-3, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            forgotten.append(process.fit(X, gains).kernel_.epsilon)
    assert forgotten[0] < 0.01 and forgotten[1] > 0.1


def test_a_missing_library_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    pb2.require()
    importer = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "sklearn":
            raise ModuleNotFoundError("No module named 'sklearn'")
        return importer(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for call in (pb2.require, lambda: suggest(RULES, [], [], 1, seed=0, round=1)):
        with pytest.raises(ConfigError, match=r"pbt\.explore = 'pb2'.*No module.*pip install 'hardy\[pb2\]', or choose"):
            call()


def test_a_negative_count_is_refused() -> None:
    with pytest.raises(ValueError, match="count = -1"):
        suggest(RULES, [], [], -1, seed=0, round=1)
