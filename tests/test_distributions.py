"""Action distributions against torch.distributions, values and gradients; sampling by frequency; spaces."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete, Space
from torch import Tensor
from torch.distributions import Categorical as TorchCategorical
from torch.distributions import Independent, Normal, kl_divergence

from hardy.nn.distributions import (
    ActionDistribution,
    Categorical,
    DiagonalGaussian,
    action_noise,
    distribution_head_size,
    make_distribution,
)

BATCH, A = (2, 3, 5), 7
SHAPE = (*BATCH, A)
BELOW_ONE = 1 - 2.0**-24  # the largest number a float32 generator draws


def parameter(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def assert_same_with_gradient(actual: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    assert actual.shape == BATCH
    torch.testing.assert_close(actual, expected)
    weight = torch.randn(BATCH, dtype=torch.float64)
    mine = torch.autograd.grad((actual * weight).sum(), inputs, allow_unused=True, retain_graph=True)
    theirs = torch.autograd.grad((expected * weight).sum(), inputs, allow_unused=True, retain_graph=True)
    for left, right, value in zip(mine, theirs, inputs, strict=True):
        zero = torch.zeros_like(value)
        torch.testing.assert_close(zero if left is None else left, zero if right is None else right)


def test_categorical_equals_torch() -> None:
    logits, other_logits = parameter(*SHAPE), parameter(*SHAPE)
    mine, theirs = Categorical(logits), TorchCategorical(logits=logits)
    action = torch.randint(0, A, BATCH)
    assert_same_with_gradient(mine.log_prob(action), theirs.log_prob(action), [logits])
    assert_same_with_gradient(mine.entropy(), theirs.entropy(), [logits])
    expected = kl_divergence(theirs, TorchCategorical(logits=other_logits))
    assert_same_with_gradient(mine.kl(Categorical(other_logits)), expected, [logits, other_logits])
    assert torch.equal(mine.mode(), theirs.mode)


def test_gaussian_equals_torch() -> None:
    mean, log_std = parameter(*SHAPE), parameter(2, 1, 1, A)
    other_mean, other_log_std = parameter(*SHAPE), parameter(2, 1, 1, A)
    mine, theirs = DiagonalGaussian(mean, log_std), Independent(Normal(mean, log_std.exp()), 1)
    other = Independent(Normal(other_mean, other_log_std.exp()), 1)
    action = torch.randn(SHAPE, dtype=torch.float64)
    assert_same_with_gradient(mine.log_prob(action), theirs.log_prob(action), [mean, log_std])
    assert_same_with_gradient(mine.entropy(), theirs.entropy(), [log_std])
    inputs = [mean, log_std, other_mean, other_log_std]
    assert_same_with_gradient(mine.kl(DiagonalGaussian(other_mean, other_log_std)), kl_divergence(theirs, other), inputs)
    assert torch.equal(mine.mode(), mean)


def test_categorical_sampling_inverts_the_cumulated_probabilities() -> None:
    distribution = Categorical(torch.tensor([0.2, 0.5, 0.3]).log().expand(5, 3))
    action = distribution.sample(torch.tensor([0.0, 0.19, 0.21, 0.71, BELOW_ONE]))
    assert action.tolist() == [0, 0, 1, 2, 2]
    assert action.dtype == torch.int64


def test_categorical_frequencies() -> None:
    draws = 40_000
    logits = torch.randn(3, 1, A)
    distribution = Categorical(logits.expand(3, draws, A))
    action = distribution.sample(torch.rand(distribution.noise_shape))
    frequency = torch.stack([torch.bincount(row, minlength=A) for row in action]) / draws
    probability = logits[:, 0].softmax(-1)
    deviation = (probability * (1 - probability) / draws).sqrt()
    assert ((frequency - probability).abs() < 5 * deviation).all()


def test_gaussian_moments() -> None:
    draws = 40_000
    mean, log_std = torch.tensor([1.0, -2.0]), torch.tensor([0.0, -1.0])
    distribution = DiagonalGaussian(mean.expand(draws, 2), log_std)
    action = distribution.sample(torch.randn(distribution.noise_shape))
    torch.testing.assert_close(action.mean(0), mean, rtol=0, atol=5 / math.sqrt(draws))
    torch.testing.assert_close(action.std(0), log_std.exp(), rtol=0.02, atol=0)


@pytest.mark.parametrize("noise", [0.0, 0.3, 0.5, BELOW_ONE])
def test_forbidden_actions_are_never_drawn_and_leave_everything_finite(noise: float) -> None:
    logits = torch.tensor([[-torch.inf, 0.1, -torch.inf, 0.2, 0.3, -torch.inf]], requires_grad=True)
    distribution = Categorical(logits)
    action = distribution.sample(torch.tensor([noise]))
    assert action.item() in (1, 3, 4)
    allowed = Categorical(torch.tensor([[0.1, 0.2, 0.3]]))
    torch.testing.assert_close(distribution.entropy(), allowed.entropy())
    kl = distribution.kl(Categorical(logits.detach() * 2))
    loss = distribution.entropy() + distribution.log_prob(action) + kl
    (gradient,) = torch.autograd.grad(loss.sum(), [logits])
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


def test_the_last_number_of_the_generator_draws_an_allowed_action_for_any_logits() -> None:
    """Cumulated probabilities round to a little more or less than 1; the last action is forbidden in every row."""
    logits = torch.randn(5000, 11)
    logits[:, -1] = -torch.inf
    assert Categorical(logits).sample(torch.full((5000,), BELOW_ONE)).max().item() == 9


def test_samples_carry_no_gradient() -> None:
    gaussian = DiagonalGaussian(parameter(*SHAPE), parameter(A))
    assert not gaussian.sample(torch.randn(SHAPE, dtype=torch.float64)).requires_grad


@pytest.mark.parametrize(
    ("space", "size", "kind", "event"),
    [(Discrete(5), 5, "uniform", ()), (Discrete(5, start=2), 5, "uniform", ()), (Box(-1, 1, (3,)), 3, "normal", (3,))],
)
def test_space_sizes_and_noise(space: Space[object], size: int, kind: str, event: tuple[int, ...]) -> None:
    assert distribution_head_size(space) == size
    assert action_noise(space) == (kind, event)
    log_std = torch.zeros(2, size) if isinstance(space, Box) else None
    distribution = make_distribution(space, torch.randn(2, 3, size), log_std)
    assert distribution.noise_kind == kind
    assert distribution.noise_shape == (2, 3, *event)
    noise = torch.rand(2, 3, *event)
    action = distribution.sample(noise)
    assert action.shape == distribution.mode().shape == (2, 3, *event)
    assert distribution.log_prob(action).shape == distribution.entropy().shape == distribution.kl(distribution).shape == (2, 3)
    assert torch.equal(distribution.kl(distribution), torch.zeros(2, 3))


@pytest.mark.parametrize("batch", [(), (3,), (11, 3)])
def test_each_member_has_its_own_standard_deviation(batch: tuple[int, ...]) -> None:
    log_std = torch.randn(2, 5)
    distribution = make_distribution(Box(-1, 1, (5,)), torch.zeros(2, *batch, 5), log_std)
    action = distribution.sample(torch.ones(distribution.noise_shape))
    for member in range(2):
        torch.testing.assert_close(action[member], log_std[member].exp().expand(*batch, 5))


@pytest.mark.parametrize(
    "space", [MultiDiscrete([2, 3]), Box(-1, 1, (2, 3)), Box(-1, 1, ()), Box(0, 9, (3,), dtype=np.int64)], ids=str
)
def test_unsupported_spaces_are_named(space: Space[object]) -> None:
    for refuse in (
        lambda: distribution_head_size(space),
        lambda: action_noise(space),
        lambda: make_distribution(space, torch.zeros(1, 1)),
    ):
        with pytest.raises(ValueError, match=r"not supported: allowed are Discrete\(n\) and a floating Box") as error:
            refuse()
        assert str(space) in str(error.value)


def test_wrong_parameters_are_refused() -> None:
    box = Box(-1, 1, (3,))
    with pytest.raises(ValueError, match=r"params has 4 outputs: Discrete\(5\) needs 5"):
        make_distribution(Discrete(5), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="log_std is given"):
        make_distribution(Discrete(5), torch.zeros(2, 5), torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"log_std is None.*\(2, 3\)"):
        make_distribution(box, torch.zeros(2, 3))


def test_kl_between_families_is_refused() -> None:
    categorical, gaussian = Categorical(torch.zeros(2, 3)), DiagonalGaussian(torch.zeros(2, 3), torch.zeros(3))
    with pytest.raises(TypeError, match="other is a DiagonalGaussian"):
        categorical.kl(gaussian)
    with pytest.raises(TypeError, match="other is a Categorical"):
        gaussian.kl(categorical)


def test_the_family_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        ActionDistribution()  # type: ignore[abstract]
