"""The variance gradient scaler, alone with any torch optimizer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hardy.optim import UPGDW, AdaptiveUPGD, VarianceGradientScaler
from hardy.optim.settings import VGSSettings
from hardy.optim.vgs import average_weights, noise_to_signal_ratio, shrinkage

SIZE = 20_000


def scaler_of(*names: str, size: int = SIZE, **arguments: Any) -> tuple[dict[str, nn.Parameter], VarianceGradientScaler]:
    parameters = {name: nn.Parameter(torch.zeros(size)) for name in names}
    return parameters, VarianceGradientScaler(parameters, **{"warmup_steps": 0, **arguments})


def heterogeneous(ratio: float, size: int = SIZE) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every element, both uneven, with ``tr Var = ratio·‖mean‖²``."""
    mean, deviation = torch.randn(size), 0.1 + torch.rand(size)
    return mean, deviation * (ratio * mean.square().sum() / deviation.square().sum()).sqrt()


def feed(
    scaler: VarianceGradientScaler, p: nn.Parameter, updates: int, mean: Tensor, deviation: Tensor, parts: int = 1
) -> None:
    """Measure ``updates`` gradients; with parts > 1 each is the sum of that many recorded microbatches."""
    for _ in range(updates):
        p.grad = None
        for _ in range(parts):
            contribution = mean / parts + deviation / parts**0.5 * torch.randn_like(mean)
            p.grad = contribution if p.grad is None else p.grad + contribution
            if parts > 1:
                scaler.record_microbatch()
        scaler.scale_gradients()


# Estimators


@pytest.mark.parametrize("ratio", [0.09, 1.0, 4.0])
@pytest.mark.parametrize(("estimator", "parts"), [("ema", 1), ("microbatch", 2), ("microbatch", 5)])
def test_known_mean_and_covariance_are_recovered_within_5_percent(ratio: float, estimator: str, parts: int) -> None:
    parameters, scaler = scaler_of("w", estimator=estimator)
    feed(scaler, parameters["w"], 40, *heterogeneous(ratio), parts)
    assert scaler.normalized_variance == pytest.approx(ratio, rel=0.05)
    assert scaler.scaling_factor == pytest.approx(1 / (1 + ratio), rel=0.05)


def share_at_the_bound(beta: float) -> float:
    """How often the factor stands at its lower bound, for a gradient of 5 dimensions whose true factor is 1/21."""
    parameters, scaler = scaler_of("w", size=5, beta=beta)
    mean, deviation = heterogeneous(20.0, 5)
    factors = []
    for _ in range(800):
        feed(scaler, parameters["w"], 1, mean, deviation)
        factors.append(scaler.scaling_factor)
    return sum(factor <= 0.01 for factor in factors[300:]) / 500


def test_the_default_window_resolves_the_ratios_of_reinforcement_learning() -> None:
    # In few dimensions a short window finds no signal at all every now and then, and the factor jumps to its bound.
    assert share_at_the_bound(VGSSettings().beta) < 0.01
    assert share_at_the_bound(0.9) > 0.1


@pytest.mark.parametrize(("estimator", "parts"), [("ema", 1), ("microbatch", 4)])
def test_a_constant_heterogeneous_gradient_has_no_variance(estimator: str, parts: int) -> None:
    parameters, scaler = scaler_of("w", estimator=estimator)
    mean, _ = heterogeneous(1.0)
    feed(scaler, parameters["w"], 5, mean, torch.zeros_like(mean), parts)
    assert scaler.normalized_variance < 1e-6
    assert scaler.scaling_factor == pytest.approx(1.0, abs=1e-6)


@given(beta=st.floats(0.05, 0.99), count=st.integers(1, 200))
@settings(deadline=None, max_examples=25)
def test_average_weights_are_those_of_the_average(beta: float, count: int) -> None:
    weights = torch.tensor(
        [(1 - beta) * beta ** (count - 1 - i) / (1 - beta**count) for i in range(count)], dtype=torch.float64
    )
    newest, squares = average_weights(torch.full((1, 1), beta, dtype=torch.float64), torch.full((1, 1), count))
    assert float(newest) == pytest.approx(float(weights[-1]), rel=1e-9)
    assert float(squares) == pytest.approx(float(weights.square().sum()), rel=1e-9)


@given(ratio=st.floats(1e-3, 1e3))
@settings(deadline=None, max_examples=25)
def test_shrinkage_at_alpha_1_minimises_the_mean_squared_error(ratio: float) -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    best = float(shrinkage(ratio * one, one, 1e-6 * one))

    def error(c: float) -> float:
        return (c - 1) ** 2 + c**2 * ratio  # E‖c·g − E g‖² for ‖E g‖ = 1

    assert error(best) <= min(error(best * 0.99), error(best * 1.01))


def test_the_signal_is_floored_relative_to_the_second_moment() -> None:
    def ratio(variance: float, signal: float) -> float:
        matrix = [torch.full((1, 1), value, dtype=torch.float64) for value in (variance, signal, 1e-4)]
        return float(noise_to_signal_ratio(*matrix))

    assert ratio(1.0, -0.1) == pytest.approx(1 / (1e-4 * 0.9))
    assert ratio(1e-12, -1e-13) == pytest.approx(ratio(1.0, -0.1))
    assert ratio(0.0, 0.0) == 0.0
    assert ratio(-1e-9, 1.0) == 0.0


# Factor


def test_warm_up_then_bounded_below() -> None:
    parameters, scaler = scaler_of("w", size=7, warmup_steps=3, min_scale=0.05)
    gradient, factors = torch.ones(7), []
    for update in range(5):
        parameters["w"].grad = gradient * (-1) ** update
        scaler.scale_gradients()
        factors.append(scaler.scaling_factor)
        torch.testing.assert_close(parameters["w"].grad.abs(), torch.full((7,), factors[-1]))
    assert factors == pytest.approx([1.0, 1.0, 1.0, 0.05, 0.05])


@pytest.mark.parametrize(
    ("scope", "names"),
    [("global", ["all"]), ("module", ["actor", "critic", "bias"]), ("tensor", ["actor.a", "actor.b", "critic.a", "bias"])],
)
def test_scopes(scope: str, names: list[str]) -> None:
    parameters, scaler = scaler_of("actor.a", "actor.b", "critic.a", "bias", size=5, scope=scope)
    for update in range(4):
        for name, p in parameters.items():
            p.grad = torch.ones(5) * ((-1) ** update if name == "critic.a" else 1)
        scaler.scale_gradients()
    assert list(scaler.scaling_factors) == list(scaler.normalized_variances) == names
    factors = scaler.scaling_factors
    if scope == "module":
        assert factors["actor"] == factors["bias"] == 1.0
        assert factors["critic"] == pytest.approx(0.01)
        # Between the scopes there is a difference, so the mean stands for neither.
        assert scaler.scaling_factor == pytest.approx((1 + 1 + 0.01) / 3)
    for name, p in parameters.items():
        scale = factors[{"global": "all", "module": name.split(".")[0], "tensor": name}[scope]]
        torch.testing.assert_close(p.grad.abs(), torch.full((5,), scale))


def test_a_sum_over_the_scope_comes_before_the_division() -> None:
    parameters, scaler = scaler_of("a", "b", size=3, scope="global", beta=0.5)
    for update in range(30):
        parameters["a"].grad = torch.full((3,), 10.0)
        parameters["b"].grad = torch.full((3,), (-1.0) ** update)
        scaler.scale_gradients()
    # b alone has an unbounded ratio; together the noise is small against the signal.
    assert scaler.normalized_variance < 0.05


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, UPGDW])
def test_between_backward_and_step_of_any_optimizer(optimizer: Any) -> None:
    torch.manual_seed(1)
    model, x, y = nn.Linear(5, 2), torch.randn(32, 5), torch.randn(32, 2)
    scaler, stepper = VarianceGradientScaler(model.named_parameters()), optimizer(model.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        batch = torch.randint(0, 32, (8,))
        stepper.zero_grad()
        nn.functional.mse_loss(model(x[batch]), y[batch]).backward()
        scaler.scale_gradients(max_grad_norm=1.0)
        stepper.step()
        losses.append(float(nn.functional.mse_loss(model(x), y).detach()))
    assert losses[-1] < losses[0]
    assert 0.01 <= scaler.scaling_factor < 1.0


def test_parameters_without_gradient_and_without_elements() -> None:
    parameters, scaler = scaler_of("a", "b", size=3)
    scaler.scale_gradients()
    parameters["a"].grad = torch.ones(3)
    scaler.scale_gradients()
    assert scaler.scaling_factors == {"a": 1.0, "b": 1.0}
    assert parameters["b"].grad is None
    assert scaler.state_dict()["steps"] == {"a": 1, "b": 0}
    assert VarianceGradientScaler({"a": parameters["a"], "empty": nn.Parameter(torch.zeros(0))}).scaling_factor == 1.0


@pytest.mark.parametrize("estimator", ["ema", "microbatch"])
def test_a_gradient_that_is_not_finite_leaves_the_statistics_alone(estimator: str) -> None:
    parameters, scaler = scaler_of("w", size=50, estimator=estimator)
    parts = 1 if estimator == "ema" else 2
    feed(scaler, parameters["w"], 3, torch.ones(50), torch.ones(50), parts)
    before = scaler.state_dict()
    feed(scaler, parameters["w"], 1, torch.full((50,), torch.nan), torch.ones(50), parts)
    assert str(scaler.state_dict()) == str(before)
    feed(scaler, parameters["w"], 1, torch.ones(50), torch.ones(50), parts)
    assert scaler.state_dict()["steps"]["w"] == 4


# State


@pytest.mark.parametrize("estimator", ["ema", "microbatch"])
def test_state_dict_round_trip(estimator: str) -> None:
    parts = 1 if estimator == "ema" else 2
    parameters, scaler = scaler_of("w", size=50, estimator=estimator)
    feed(scaler, parameters["w"], 4, torch.ones(50), torch.ones(50), parts)
    others, twin = scaler_of("w", size=50, estimator=estimator)
    twin.load_state_dict(copy.deepcopy(scaler.state_dict()))
    assert (twin.scaling_factor, twin.normalized_variance) == (scaler.scaling_factor, scaler.normalized_variance)
    for p, s in ((parameters["w"], scaler), (others["w"], twin)):
        torch.manual_seed(5)
        feed(s, p, 2, torch.ones(50), torch.ones(50), parts)
    assert twin.scaling_factor == scaler.scaling_factor


def test_state_of_another_model_or_estimator_is_refused() -> None:
    _, scaler = scaler_of("w", size=3)
    with pytest.raises(ValueError, match=r"\['other'\].*expects \['w'\]"):
        scaler.load_state_dict(scaler_of("other", size=3)[1].state_dict())
    with pytest.raises(ValueError, match="mean"):
        scaler.load_state_dict(scaler_of("w", size=3, estimator="microbatch")[1].state_dict())
    with pytest.raises(ValueError, match="steps"):
        scaler.load_state_dict({})


# Microbatches


def test_too_few_microbatches_and_the_wrong_estimator_are_refused() -> None:
    parameters, scaler = scaler_of("w", size=3, estimator="microbatch")
    with pytest.raises(RuntimeError, match="after backward"):
        scaler.record_microbatch()
    parameters["w"].grad = torch.ones(3)
    scaler.record_microbatch()
    with pytest.raises(RuntimeError, match="at least 2 recorded microbatches per update, got 1"):
        scaler.scale_gradients()
    with pytest.raises(RuntimeError, match="estimator='microbatch'"):
        scaler_of("w", size=3)[1].record_microbatch()


# Inside an optimizer


def test_scale_gradients_leaves_the_scaling_to_the_optimizer_that_holds_the_scaler() -> None:
    results = []
    for called in (False, True):
        torch.manual_seed(2)
        p = nn.Parameter(torch.ones(5))
        scaler = VarianceGradientScaler({"w": p}, warmup_steps=0)
        optimizer = AdaptiveUPGD([p], lr=0.1, sigma=0.0, gradient_scaler=scaler)
        for _ in range(4):
            p.grad = gradient = torch.randn(5)
            if called:
                scaler.scale_gradients()
                assert torch.equal(p.grad, gradient)
            optimizer.step()
        results.append((p.detach().clone(), scaler.normalized_variance))
        assert scaler.state_dict()["steps"]["w"] == 4
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    with pytest.raises(ValueError, match="another optimizer"):
        UPGDW([p], gradient_scaler=scaler)


def test_the_optimizer_scales_only_what_the_scaler_knows() -> None:
    known, unknown = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    scaler = VarianceGradientScaler({"w": known}, warmup_steps=0)
    optimizer = UPGDW([known, unknown], lr=1.0, sigma=0.0, weight_decay=0.0, gating="none", gradient_scaler=scaler)
    for update in range(4):
        known.data.fill_(1.0)
        unknown.data.fill_(1.0)
        known.grad = unknown.grad = torch.ones(5) * (-1.0) ** update
        optimizer.step()
    torch.testing.assert_close(known.detach(), torch.full((5,), 1.01))
    torch.testing.assert_close(unknown.detach(), torch.full((5,), 2.0))
    assert optimizer.diagnostics["vgs/scaling_factor"] == scaler.scaling_factor == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"alpha": -1.0}, "alpha = -1.0"),
        ({"min_scale": 0.0}, "min_scale = 0.0"),
        ({"min_scale": 1.5}, "min_scale = 1.5: must be a finite number > 0.* and <= 1"),
        ({"warmup_steps": -1}, "warmup_steps = -1"),
        ({"beta": 1.0}, "beta = 1.0"),
        ({"signal_floor": 0.0}, "signal_floor = 0.0"),
        ({"scope": "modul"}, "scope = 'modul'.*global, module, tensor.*did you mean 'module'"),
        ({"estimator": "emma"}, "estimator = 'emma'.*did you mean 'ema'"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        VarianceGradientScaler({"w": nn.Parameter(torch.ones(2))}, **arguments)


def test_parameters_are_needed_and_named_once() -> None:
    p = nn.Parameter(torch.ones(2))
    for pairs in ([], [("w", p), ("w", p)]):
        with pytest.raises(ValueError, match="named_parameters"):
            VarianceGradientScaler(pairs)
    scaler = VarianceGradientScaler({"w": p})
    p.grad = torch.ones(2).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        scaler.scale_gradients()
    p.grad = torch.ones(2)
    with pytest.raises(ValueError, match="max_grad_norm = 0"):
        scaler.scale_gradients(max_grad_norm=0.0)
