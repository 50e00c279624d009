"""`reference=True` against the published equations, written out one parameter at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hardy.optim import UPGD, UPGDW, AdaptiveUPGD, VarianceGradientScaler
from hardy.optim.noise import standard_normal

CLASSES = [UPGD, UPGDW, AdaptiveUPGD]
SHAPES = [(5, 3), (5,), (2, 5), (2,)]


def published_gates(utilities: list[Tensor], beta: float, t: int, gating: str) -> list[Tensor]:
    """1 − Ū: corrected utilities over the raw maximum of all of them, or over their row's norm."""
    corrected = [u / (1 - beta**t) for u in utilities]
    if gating == "local":
        return [1 - torch.sigmoid(torch.nn.functional.normalize(u, dim=-1)) for u in corrected]
    eta = max(u.max() for u in utilities)
    return [1 - torch.sigmoid(u / eta) for u in corrected]


def published_run(
    cls: type,
    weights: list[Tensor],
    gradients: list[list[Tensor]],
    noises: list[list[Tensor]],
    gating: str,
    protecting: bool,
) -> list[Tensor]:
    """Algorithms of the paper with the step factor of the published code."""
    lr, decay, beta, sigma, beta1, beta2, eps = 1e-2, 0.01, 0.99, 0.05, 0.9, 0.999, 1e-5
    factor = 1.0 if cls is UPGDW else 2.0
    w = [weight.clone() for weight in weights]
    u = [torch.zeros_like(weight) for weight in w]
    m = [torch.zeros_like(weight) for weight in w]
    v = [torch.zeros_like(weight) for weight in w]
    for t, (grads, noise) in enumerate(zip(gradients, noises, strict=True), start=1):
        for k, g in enumerate(grads):
            u[k] = beta * u[k] + (1 - beta) * (-g * w[k])
        gates = published_gates(u, beta, t, gating)
        for k, g in enumerate(grads):
            update = g
            if cls is AdaptiveUPGD:
                m[k] = beta1 * m[k] + (1 - beta1) * g
                v[k] = beta2 * v[k] + (1 - beta2) * g * g
                update = (m[k] / (1 - beta1**t)) / ((v[k] / (1 - beta2**t)).sqrt() + eps)
            xi = sigma * noise[k]
            gate = factor * gates[k]
            step = (update + xi) * gate if protecting else update + xi * gate
            w[k] = (1 - lr * decay) * w[k] - lr * step
    return w


@pytest.mark.parametrize(("gating", "protecting"), [("global", True), ("global", False), ("local", True)])
@pytest.mark.parametrize("cls", CLASSES)
def test_reference_equals_the_published_update_over_100_steps(cls: type, gating: str, protecting: bool) -> None:
    torch.manual_seed(3)
    weights = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    gradients = [[torch.randn(shape, dtype=torch.float64) for shape in SHAPES] for _ in range(100)]
    source = torch.Generator().manual_seed(11)
    keys = [torch.zeros(1, dtype=torch.int64).random_(generator=source) for _ in range(100)]
    noises = [[noise[0] for noise in standard_normal(key, [w[None] for w in weights])] for key in keys]
    parameters = [torch.nn.Parameter(w.clone()) for w in weights]
    numbers = {"lr": 1e-2, "weight_decay": 0.01, "beta_utility": 0.99, "sigma": 0.05}
    generator = torch.Generator().manual_seed(11)
    optimizer = cls(parameters, **numbers, reference=True, gating=gating, protecting=protecting, generator=generator)
    for grads in gradients:
        for p, g in zip(parameters, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
    expected = published_run(cls, weights, gradients, noises, gating, protecting)
    for p, w in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=0, atol=1e-6)


def gate_of_top_weight(steps: int, **arguments: Any) -> float:
    """Gate of the weight with the largest utility in update number ``steps`` of constant gradients, read off a plain step."""
    w = torch.tensor([1.0, 0.5, -0.25], dtype=torch.float64)
    p = torch.nn.Parameter(w.clone())
    optimizer = UPGDW([p], lr=1.0, weight_decay=0.0, beta_utility=0.999, sigma=0.0, **arguments)
    p.grad = -torch.ones(3, dtype=torch.float64)
    optimizer.step()
    p.data.copy_(w)
    # The state that steps - 1 gradients of −1 at w would have left.
    optimizer.state[p]["step"].fill_(steps - 1)
    optimizer.state[p]["utility"].copy_((1 - 0.999 ** (steps - 1)) * w)
    p.grad = -torch.ones(3, dtype=torch.float64)
    optimizer.step()
    return float(p.detach()[0] - w[0])


@pytest.mark.parametrize(("steps", "gate"), [(10, 0.0), (100, 2.7e-5), (1000, 0.17), (50_000, 0.269)])
def test_the_published_maximum_freezes_the_top_weight_for_thousands_of_steps(steps: int, gate: float) -> None:
    assert gate_of_top_weight(steps, reference=True) == pytest.approx(gate, rel=0.05, abs=2e-4 if steps == 10 else 0)


@pytest.mark.parametrize("steps", [2, 100, 50_000])
def test_the_default_corrects_both_sides(steps: int) -> None:
    assert gate_of_top_weight(steps) == pytest.approx(0.26894, rel=1e-4)


@given(scale=st.floats(0.1, 10.0), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=15)
def test_short_code_steps_twice_as_far_as_the_paper(scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    start, gradient = torch.randn(7, dtype=torch.float64), scale * torch.randn(7, dtype=torch.float64)

    def moved(cls: type, **arguments: Any) -> Tensor:
        p = torch.nn.Parameter(start.clone())
        p.grad = gradient.clone()
        cls([p], lr=0.1, weight_decay=0.0, sigma=0.0, reference=True, **arguments).step()
        return p.detach() - start

    torch.testing.assert_close(moved(UPGD), 2 * moved(UPGDW))
    torch.testing.assert_close(moved(UPGD, step_factor=1.0), moved(UPGDW))


@pytest.mark.parametrize("cls", CLASSES)
def test_reference_refuses_what_contradicts_it(cls: type) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="adaptive_noise"):
        cls([p], reference=True, adaptive_noise=True)
    with pytest.raises(ValueError, match="gradient_scaler"):
        cls([p], reference=True, gradient_scaler=VarianceGradientScaler({"p": p}))
    with pytest.raises(ValueError, match="adaptive_noise"):
        cls([p], reference=True).add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "adaptive_noise": True})
    assert cls([p], reference=True).param_groups[0]["adaptive_noise"] is False
    assert cls([p]).param_groups[0]["adaptive_noise"] is True
