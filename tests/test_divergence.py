"""Closed-form divergences against torch.distributions, values and gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, Normal, kl_divergence

from hardy.ops.divergence import categorical_kl, diagonal_gaussian_kl, mahalanobis_divergence

SHAPE = (2, 3, 5, 7)


def parameters(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]


def assert_same_with_gradient(actual: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    assert actual.shape == SHAPE[:-1]
    torch.testing.assert_close(actual, expected)
    weight = torch.randn_like(actual)
    mine = torch.autograd.grad((actual * weight).sum(), inputs)
    torch.testing.assert_close(mine, torch.autograd.grad((expected * weight).sum(), inputs))


def test_categorical_kl() -> None:
    p, q = parameters(SHAPE, SHAPE)
    expected = kl_divergence(Categorical(logits=p), Categorical(logits=q))
    assert_same_with_gradient(categorical_kl(p, q), expected, [p, q])


def test_categorical_kl_of_forbidden_actions() -> None:
    forbidden = torch.tensor([True, False, False])
    p, q = parameters((3,), (3,))
    masked = categorical_kl(p.masked_fill(forbidden, -torch.inf), q.masked_fill(forbidden, -torch.inf))
    torch.testing.assert_close(masked, categorical_kl(p[1:], q[1:]))
    gradients = torch.autograd.grad(masked, [p, q])
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in gradients)
    assert categorical_kl(p, q.masked_fill(forbidden, -torch.inf)).item() == torch.inf


def test_diagonal_gaussian_kl() -> None:
    mean, log_std, other_mean, other_log_std = inputs = parameters(SHAPE, (2, 1, 1, 7), SHAPE, (7,))
    expected = kl_divergence(
        Independent(Normal(mean, log_std.exp()), 1), Independent(Normal(other_mean, other_log_std.exp().expand(SHAPE)), 1)
    )
    assert_same_with_gradient(diagonal_gaussian_kl(*inputs), expected, inputs)


def test_gaussian_kl_near_equality_keeps_its_digits() -> None:
    """With x the difference of the log standard deviations KL is x² to second order, which float32 loses without expm1."""
    zero = torch.zeros(1, 1)
    for x in (1e-3, 3e-4, 1e-4):
        kl = diagonal_gaussian_kl(zero, zero + x, zero, zero)
        torch.testing.assert_close(kl, torch.tensor([x * x]), rtol=2e-3, atol=0)
    assert diagonal_gaussian_kl(zero + 3, zero - 2, zero + 3, zero - 2).item() == 0


def test_mahalanobis_is_the_kl_of_equal_covariances() -> None:
    mean, other, log_std = inputs = parameters(SHAPE, SHAPE, (2, 1, 1, 7))
    std = log_std.detach().exp()
    expected = kl_divergence(Independent(Normal(mean, std), 1), Independent(Normal(other, std), 1))
    actual = mahalanobis_divergence(*inputs)
    assert_same_with_gradient(actual, expected, [mean, other])
    by_hand = mahalanobis_divergence(torch.tensor([1.0, 0.0]), torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.5]).log())
    assert by_hand.item() == 0.5 * (1 + 4)
