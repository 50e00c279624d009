"""Quantiles: the loss finds the quantiles of known distributions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hardy.ops import quantiles as ops


def test_midpoints() -> None:
    torch.testing.assert_close(ops.quantile_midpoints(5), torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]))
    with pytest.raises(ValueError, match="count = 0"):
        ops.quantile_midpoints(0)


@pytest.mark.parametrize("name", ["norm", "expon", "logistic"])
def test_descent_finds_the_quantiles_of_a_known_distribution(name: str) -> None:
    """Two members with different κ; the target is the distribution itself, as 2000 of its own quantiles."""
    distribution = getattr(stats, name)
    target = torch.from_numpy(distribution.ppf((np.arange(2000) + 0.5) / 2000)).expand(2, 1, 2000)
    found = torch.zeros(2, 1, 7, dtype=torch.float64, requires_grad=True)
    kappa = torch.tensor([0.0, 0.01], dtype=torch.float64)
    optimizer = torch.optim.Adam([found], lr=0.2)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    for _ in range(500):
        optimizer.zero_grad()
        ops.quantile_huber_loss(found, target, kappa).sum().backward()
        optimizer.step()
        schedule.step()
    expected = torch.from_numpy(distribution.ppf(ops.quantile_midpoints(7, dtype=torch.float64).numpy()))
    torch.testing.assert_close(found.detach(), expected.expand(2, 1, 7), rtol=0, atol=0.03)


def reference_loss(quantiles: list[float], target: list[float], kappa: float) -> float:
    """The double sum of the paper, one scalar at a time."""
    total = 0.0
    for i, quantile in enumerate(quantiles):
        tau = (i + 0.5) / len(quantiles)
        for t in target:
            u = t - quantile
            weight = abs(tau - (1.0 if u < 0 else 0.0))
            huber = 0.5 * u * u if abs(u) <= kappa else kappa * (abs(u) - 0.5 * kappa)
            total += weight * (abs(u) if kappa == 0 else huber / kappa)
    return total / (len(quantiles) * len(target))


@settings(deadline=None, max_examples=25)
@given(
    quantiles=st.lists(st.floats(-3, 3), min_size=1, max_size=5),
    target=st.lists(st.floats(-3, 3), min_size=1, max_size=4),
    kappa=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
)
def test_loss_equals_the_double_sum(quantiles: list[float], target: list[float], kappa: float) -> None:
    prediction = torch.tensor([[quantiles]], dtype=torch.float64)
    samples = torch.tensor([[target]], dtype=torch.float64)
    expected = reference_loss(quantiles, target, kappa)
    assert ops.quantile_huber_loss(prediction, samples, kappa).item() == pytest.approx(expected, abs=1e-12)
    stacked = torch.tensor([kappa], dtype=torch.float64)
    assert ops.quantile_huber_loss(prediction, samples, stacked).item() == pytest.approx(expected, abs=1e-12)


def test_loss_shapes_and_one_kappa_for_each_member() -> None:
    prediction, single, many = torch.randn(2, 3, 5, 7), torch.randn(2, 3, 5), torch.randn(2, 3, 5, 11)
    kappa = torch.tensor([0.0, 1.0])
    assert ops.quantile_huber_loss(prediction, many, kappa).shape == (2, 3, 5)
    loss = ops.quantile_huber_loss(prediction, single, kappa)
    torch.testing.assert_close(loss, ops.quantile_huber_loss(prediction, single[..., None], kappa))
    for i in range(2):
        alone = ops.quantile_huber_loss(prediction[i : i + 1], single[i : i + 1], float(kappa[i]))
        torch.testing.assert_close(loss[i : i + 1], alone)


def test_loss_does_not_grow_with_the_number_of_quantiles() -> None:
    one = ops.quantile_huber_loss(torch.zeros(1, 1, 1), torch.ones(1, 1), 1.0)
    many = ops.quantile_huber_loss(torch.zeros(1, 1, 101), torch.ones(1, 1), 1.0)
    torch.testing.assert_close(one, many)


def test_loss_refuses_a_target_of_another_batch() -> None:
    with pytest.raises(ValueError, match=r"target has shape \(2, 5\): allowed are \(2, 3\) and \(2, 3, 'K'\)"):
        ops.quantile_huber_loss(torch.zeros(2, 3, 7), torch.zeros(2, 5), 1.0)


@pytest.mark.parametrize("kappa", [0.0, 1.0])
def test_gradient_is_finite_everywhere(kappa: float) -> None:
    prediction = torch.zeros(1, 1, 3, requires_grad=True)
    ops.quantile_huber_loss(prediction, torch.tensor([[[0.0, 1.0, -50.0]]]), torch.tensor([kappa])).sum().backward()
    assert prediction.grad is not None and prediction.grad.isfinite().all()


def test_mean() -> None:
    assert ops.expected_value(torch.tensor([[1.0, 2.0, 6.0]])).tolist() == [3.0]
