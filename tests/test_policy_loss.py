"""The clipped surrogate and its measures: values and gradients branch by branch, members and masks apart."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardy.ops.policy_loss import (
    approx_kl,
    beyond_clip,
    clipped_surrogate,
    explained_variance,
    log_ratio,
    normalize_advantage,
)

P, T, E = 2, 5, 3


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.4, 0.0),  # good action, far enough already
        (1.5, -2.0, 3.0, 3.0),  # bad action that became likelier: pushed back
        (0.5, -2.0, 1.6, 0.0),
        (0.5, 2.0, -1.0, -1.0),
    ],
)
def test_each_branch(ratio: float, advantage: float, loss: float, slope: float) -> None:
    log_prob = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    old = torch.zeros(1, 1, dtype=torch.float64)
    actual = clipped_surrogate(
        log_ratio(log_prob, old), torch.full_like(old, advantage), torch.tensor([0.2], dtype=torch.float64)
    )
    assert actual.item() == pytest.approx(loss)
    actual.sum().backward()
    assert log_prob.grad is not None and log_prob.grad.item() == pytest.approx(slope)


def test_the_old_policy_has_the_policy_gradient() -> None:
    """At ratio 1 the loss is −A and its gradient −A ∇log π, whatever the clip range."""
    log_prob = torch.randn(P, T, E, requires_grad=True)
    advantage = torch.randn(P, T, E)
    loss = clipped_surrogate(log_ratio(log_prob, log_prob.detach()), advantage, torch.tensor([0.1, 0.3]))
    torch.testing.assert_close(loss, -advantage)
    loss.sum().backward()
    torch.testing.assert_close(log_prob.grad, -advantage)


def test_each_member_has_its_own_clip_range() -> None:
    log_prob, old, advantage = torch.full((P, T, E), math.log(2.0)), torch.zeros(P, T, E), torch.ones(P, T, E)
    loss = clipped_surrogate(log_ratio(log_prob, old), advantage, torch.tensor([0.1, 0.5]))
    torch.testing.assert_close(loss[:, 0, 0], torch.tensor([-1.1, -1.5]))


def test_an_impossible_ratio_leaves_the_clipped_branch_finite() -> None:
    log_prob = torch.tensor([[400.0, 0.0]], requires_grad=True)
    clipped_surrogate(log_ratio(log_prob, torch.zeros(1, 2)), torch.ones(1, 2), torch.tensor([0.2])).sum().backward()
    assert log_prob.grad is not None and log_prob.grad.tolist() == [[0.0, -1.0]]
    assert approx_kl(log_ratio(log_prob, torch.zeros(1, 2))).isfinite().all()


def test_approx_kl_is_unbiased() -> None:
    """Averaged over every action with its old probability, it is the KL divergence itself."""
    old, new = torch.randn(1, 7, dtype=torch.float64).log_softmax(-1), torch.randn(1, 7, dtype=torch.float64).log_softmax(-1)
    exact = (old.exp() * (old - new)).sum()
    torch.testing.assert_close((old.exp() * approx_kl(log_ratio(new, old))).sum(), exact)


def test_approx_kl_is_zero_only_at_the_old_policy_and_exact_near_it() -> None:
    old = torch.randn(1, 1000) * 10
    assert approx_kl(log_ratio(old, old)).eq(0).all()
    near = torch.full((1, 1), 1e-4)
    assert approx_kl(log_ratio(near, torch.zeros(1, 1))).item() == pytest.approx(0.5e-8, rel=1e-2)
    assert approx_kl(log_ratio(old + torch.randn(1, 1000) * 1e-4, old)).ge(0).all()


def test_where_the_ratio_is_beyond_the_clip_range() -> None:
    log_prob = torch.log(torch.tensor([[1.0, 1.15, 0.7, 1.3], [1.0, 1.15, 0.7, 1.3]]))
    old = torch.zeros(2, 4)
    clip_range = torch.tensor([0.1, 0.25])
    expected = [[False, True, True, True], [False, False, True, True]]
    assert beyond_clip(log_ratio(log_prob, old), clip_range).tolist() == expected


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e3), shift=st.floats(-1e3, 1e3))
def test_normalized_advantage(seed: int, scale: float, shift: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    advantage = torch.randn(P, T, E, generator=rng) * scale + shift
    valid = torch.rand(P, T, E, generator=rng) < 0.7
    valid[:, :2] = True
    result = normalize_advantage(torch.where(valid, advantage, torch.nan), valid)
    assert result[~valid].eq(0).all()
    for i in range(P):
        values = advantage[i][valid[i]].double().numpy()
        np.testing.assert_allclose(result[i][valid[i]].numpy(), (values - values.mean()) / values.std(), rtol=1e-3, atol=1e-4)


def test_normalized_advantage_without_spread_is_zero() -> None:
    none, one = torch.zeros(1, T, E, dtype=torch.bool), torch.zeros(1, T, E, dtype=torch.bool)
    one[0, 1, 2] = True
    valid = torch.cat([none, one, torch.ones(1, T, E, dtype=torch.bool)])
    advantage = torch.cat([torch.randn(2, T, E), torch.full((1, T, E), 1.1e6)])
    torch.testing.assert_close(normalize_advantage(advantage, valid), torch.zeros(3, T, E), rtol=0, atol=1e-2)


def test_explained_variance() -> None:
    returns = torch.randn(5, T, E)
    valid = torch.rand(5, T, E) < 0.8
    constant = torch.zeros(T, E)
    value = torch.stack([returns[0] + 7.0, constant, -returns[2], 0.5 * returns[3], constant])
    returns[4] = 3.0
    value, returns = torch.where(valid, value, torch.nan), torch.where(valid, returns, torch.nan)
    measured = explained_variance(value, returns, valid)
    torch.testing.assert_close(measured, torch.tensor([1.0, 0.0, -3.0, 0.75, torch.nan]), equal_nan=True)
