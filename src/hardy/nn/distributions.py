"""Distributions over actions. Randomness is an argument, so sampling is a pure function of parameters and noise."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import torch
from gymnasium.spaces import Box, Discrete, Space
from jaxtyping import Float, Shaped
from torch import Tensor

NoiseKind = Literal["uniform", "normal"]
_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


class ActionDistribution(ABC):
    """A batch of distributions over actions.

    Attributes:
        noise_kind: what `sample` takes: numbers uniform in [0, 1), or standard normal numbers.
    """

    noise_kind: ClassVar[NoiseKind]

    @property
    @abstractmethod
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of the noise that `sample` takes."""

    @abstractmethod
    def sample(self, noise: Float[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """The action that ``noise`` picks."""

    @abstractmethod
    def mode(self) -> Shaped[Tensor, "..."]:
        """The most probable action."""

    @abstractmethod
    def log_prob(self, action: Shaped[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Log-probability (or log-density) of ``action``, in nats."""

    @abstractmethod
    def entropy(self) -> Float[Tensor, "..."]:
        """Entropy (or differential entropy), in nats."""

    @abstractmethod
    def kl(self, other: ActionDistribution) -> Float[Tensor, "..."]:
        """KL(self ‖ other) in nats, in closed form, with gradient to both sides.

        Raises:
            TypeError: ``other`` is of another family.
        """


class Categorical(ActionDistribution):
    """Categorical distribution over the actions 0 to A−1.

    Args:
        logits: unnormalised log-probabilities; −inf forbids an action.
    """

    noise_kind = "uniform"

    def __init__(self, logits: Float[Tensor, "*batch A"]) -> None:
        self.log_probs = logits.log_softmax(-1)

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """One number for each action to be drawn: ``[...]``."""
        return tuple(self.log_probs.shape[:-1])

    def sample(self, noise: Float[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """Action ``[...]`` (int64) by inversion: the first whose cumulated probability exceeds the uniform ``noise``."""
        cumulated = self.log_probs.detach().exp().cumsum(-1)
        # Scaled by the last entry, which rounding keeps from 1, the threshold stays below it: no forbidden action is drawn.
        threshold = noise.unsqueeze(-1) * cumulated[..., -1:]
        return (cumulated <= threshold).sum(-1)

    def mode(self) -> Shaped[Tensor, "..."]:
        """The most probable action ``[...]`` (int64)."""
        return self.log_probs.argmax(-1)

    def log_prob(self, action: Shaped[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Log-probability ``[...]`` of the actions ``[...]`` (int64)."""
        return self.log_probs.gather(-1, action.unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> Float[Tensor, "..."]:
        """Entropy ``[...]``, from 0 to log A; forbidden actions contribute 0."""
        # Forbidden actions' logarithms become finite, for 0 · inf is NaN.
        return -(self.log_probs.exp() * self.log_probs.clamp(min=torch.finfo(self.log_probs.dtype).min)).sum(-1)

    def kl(self, other: ActionDistribution) -> Float[Tensor, "..."]:
        """KL(self ‖ other) ``[...]``; actions that self forbids contribute 0."""
        if not isinstance(other, Categorical):
            raise TypeError(f"other is a {type(other).__name__}: KL from a Categorical is to another Categorical")
        probs = self.log_probs.exp()
        return (probs * torch.where(probs > 0, self.log_probs - other.log_probs, 0.0)).sum(-1)


class DiagonalGaussian(ActionDistribution):
    """Gaussian with diagonal covariance, unbounded: the environment clips to its bounds, the log-density does not.

    Args:
        mean: location.
        log_std: log standard deviations, broadcastable to ``mean``.
    """

    noise_kind = "normal"

    def __init__(self, mean: Float[Tensor, "*batch A"], log_std: Float[Tensor, "..."]) -> None:
        self.mean = mean
        self.log_std = log_std

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """One number for each component: ``[..., A]``."""
        return tuple(self.mean.shape)

    def sample(self, noise: Float[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """Action ``mean + std · noise``, ``[..., A]``, without gradient."""
        return self.mean.detach() + self.log_std.detach().exp() * noise

    def mode(self) -> Shaped[Tensor, "..."]:
        """The mean, ``[..., A]``."""
        return self.mean

    def log_prob(self, action: Shaped[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Log-density ``[...]`` of the actions ``[..., A]``."""
        standard = (action - self.mean) * (-self.log_std).exp()
        return -(0.5 * standard.square() + self.log_std + _HALF_LOG_TWO_PI).sum(-1)

    def entropy(self) -> Float[Tensor, "..."]:
        """Differential entropy ``[...]``, any sign."""
        return (self.log_std + (0.5 + _HALF_LOG_TWO_PI)).expand_as(self.mean).sum(-1)

    def kl(self, other: ActionDistribution) -> Float[Tensor, "..."]:
        """KL(self ‖ other) ``[...]``."""
        if not isinstance(other, DiagonalGaussian):
            raise TypeError(f"other is a {type(other).__name__}: KL from a DiagonalGaussian is to another DiagonalGaussian")
        log_variance_ratio = 2 * (self.log_std - other.log_std)
        shift = (self.mean - other.mean).square() * (-2 * other.log_std).exp()
        return 0.5 * (log_variance_ratio.expm1() - log_variance_ratio + shift).sum(-1)


def _require_supported(space: Space[Any]) -> Discrete | Box:
    """``space`` itself, if there is an action distribution for it."""
    if isinstance(space, Discrete) or (isinstance(space, Box) and len(space.shape) == 1 and space.dtype.kind == "f"):
        return space
    raise ValueError(f"action space {space} is not supported: allowed are Discrete(n) and a floating Box of shape (A,)")


def distribution_head_size(action_space: Space[Any]) -> int:
    """Number of outputs a policy needs for ``action_space`` (of one environment): logits, or components of the mean.

    Raises:
        ValueError: there is no distribution for the space.
    """
    space = _require_supported(action_space)
    return int(space.n) if isinstance(space, Discrete) else int(space.shape[0])


def action_noise(action_space: Space[Any]) -> tuple[NoiseKind, tuple[int, ...]]:
    """What one action takes from the random generator: the kind of number and its shape, without any batch axis.

    Raises:
        ValueError: there is no distribution for the space.
    """
    space = _require_supported(action_space)
    if isinstance(space, Discrete):
        return Categorical.noise_kind, ()
    return DiagonalGaussian.noise_kind, (int(space.shape[0]),)


def make_distribution(
    action_space: Space[Any], params: Float[Tensor, "P *batch A"], log_std: Float[Tensor, "P A"] | None = None
) -> ActionDistribution:
    """The distribution over the actions of one environment's ``action_space``.

    Args:
        action_space: ``Discrete(n)``, whose actions are drawn as 0 to n−1, or a floating ``Box`` of shape ``(A,)``.
        params: the policy's outputs: logits, or means.
        log_std: log standard deviations of each member, for a ``Box`` only.

    Raises:
        ValueError: there is no distribution for the space, ``params`` has not its size, or ``log_std`` is missing or too much.
    """
    space = _require_supported(action_space)
    size = distribution_head_size(space)
    if params.shape[-1] != size:
        raise ValueError(f"params has {params.shape[-1]} outputs: {space} needs {size}")
    if isinstance(space, Discrete):
        if log_std is not None:
            raise ValueError(f"log_std is given: {space} has no standard deviation, allowed is None")
        return Categorical(params)
    if log_std is None:
        raise ValueError(f"log_std is None: {space} needs one of shape {(params.shape[0], size)}")
    return DiagonalGaussian(params, log_std.reshape(-1, *([1] * (params.ndim - 2)), size))
