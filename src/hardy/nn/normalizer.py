"""Running statistics that bring observations and rewards to unit scale, updated between rollouts only."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Float64, Shaped
from pydantic import Field
from torch import Tensor

from hardy.config import Settings
from hardy.population import copied, nested, per_member, reset_to, training_state


class NormalizerSettings(Settings):
    """What is normalised, and how.

    Attributes:
        observation: normalise observations to mean 0 and variance 1.
        reward: divide rewards by the standard deviation of the discounted return.
        clip_observation: bound of a normalised observation, in standard deviations.
        clip_reward: bound of a scaled reward.
        epsilon: added to the variances.
    """

    observation: bool = True
    reward: bool = True
    clip_observation: float = Field(10.0, gt=0)
    clip_reward: float = Field(10.0, gt=0)
    epsilon: float = Field(1e-8, gt=0)


@training_state
class RunningMoments:
    """Mean and variance of everything each member has seen, in float64; an exploit copies them.

    Nothing seen yet means mean 0, variance 1, so `normalize` only clips.
    """

    mean: Float64[Tensor, "P ..."] = copied()
    var: Float64[Tensor, "P ..."] = copied()
    count: Float64[Tensor, "P"] = copied()

    @classmethod
    def create(cls, population: int, shape: Sequence[int] = (), device: str | torch.device = "cpu") -> RunningMoments:
        """Statistics of ``population`` members over values of ``shape`` (``()`` for numbers), with nothing seen."""
        full = (population, *shape)
        return cls(
            mean=torch.zeros(full, dtype=torch.float64, device=device),
            var=torch.ones(full, dtype=torch.float64, device=device),
            count=torch.zeros(population, dtype=torch.float64, device=device),
        )

    @torch.no_grad()
    def update_(self, batch: Shaped[Tensor, "P N ..."], valid: Bool[Tensor, "P N"]) -> None:
        """Merge each member's valid rows into its statistics, in place (Chan, Golub & LeVeque 1983, eq. 2.1).

        A row that holds NaN or an infinity anywhere is left out. A member without rows keeps its statistics bit for bit.

        Args:
            batch: N rows for each member.
            valid: rows that count.
        """
        rows = batch.double()
        finite = rows.isfinite().flatten(2).all(2) if rows.ndim > 2 else rows.isfinite()
        used = valid & finite
        count = used.sum(1).double()
        where = used.reshape(*used.shape, *([1] * (rows.ndim - 2)))
        new, old = per_member(count, self.mean.ndim), per_member(self.count, self.mean.ndim)
        mean = torch.where(where, rows, 0.0).sum(1) / new.clamp(min=1)
        squares = torch.where(where, (rows - mean.unsqueeze(1)).square(), 0.0).sum(1)
        total = (old + new).clamp(min=1)
        shift = mean - self.mean
        var = (self.var * old + squares + shift.square() * (old * new / total)) / total
        self.var.copy_(torch.where(new > 0, var, self.var))
        self.mean.add_(shift * (new / total))
        self.count.add_(count)

    def normalize(self, x: Shaped[Tensor, "P ..."], clip: float, epsilon: float = 1e-8) -> Float[Tensor, "P ..."]:
        """``(x − mean) / √(var + epsilon)``, clipped to ±clip.

        The difference is taken in float64: a mean far larger than the spread would otherwise cost the digits that matter.

        Args:
            x: values ``[P, ..., *shape]``, any number of axes between P and the shape of a value.
            clip: bound of the result, in standard deviations.
            epsilon: added to the variance.

        Returns:
            the shape of ``x``, in its dtype if that is floating, else in the default dtype.
        """
        return self.frozen(clip, epsilon)(x)

    def frozen(self, clip: float, epsilon: float = 1e-8) -> FrozenNormalizer:
        """`normalize` by the statistics of this moment, prepared for many calls; later updates do not reach it."""
        return FrozenNormalizer(self.mean.clone(), (self.var + epsilon).rsqrt(), clip)


@dataclasses.dataclass(frozen=True)
class FrozenNormalizer:
    """What `RunningMoments.normalize` does with one set of statistics.

    Attributes:
        mean, inverse: ``[P, *shape]``, and one over the standard deviations.
        clip: bound of the result, in standard deviations.
    """

    mean: Float64[Tensor, "P ..."]
    inverse: Float64[Tensor, "P ..."]
    clip: float

    def __call__(self, x: Shaped[Tensor, "P ..."]) -> Float[Tensor, "P ..."]:
        """Values ``[P, ..., *shape]`` in standard deviations from the mean."""
        size, *shape = self.mean.shape
        view = (size, *([1] * (x.ndim - self.mean.ndim)), *shape)
        normalized = ((x - self.mean.view(view)) * self.inverse.view(view)).clamp_(-self.clip, self.clip)
        return normalized.to(x.dtype if x.is_floating_point() else torch.get_default_dtype())


@training_state
class ReturnNormalizer:
    """Scale of the rewards: the standard deviation of each member's running discounted return. Rewards are not shifted.

    The discounted return so far of each environment's episode starts again after an exploit; the moments are copied.
    """

    running_return: Float64[Tensor, "P E"] = reset_to(0.0)
    moments: RunningMoments = nested()

    @classmethod
    def create(cls, population: int, envs: int, device: str | torch.device = "cpu") -> ReturnNormalizer:
        """For ``population`` members with ``envs`` environments each; scale 1 until something is seen."""
        running_return = torch.zeros(population, envs, dtype=torch.float64, device=device)
        return cls(running_return=running_return, moments=RunningMoments.create(population, device=device))

    @torch.no_grad()
    def update_(
        self,
        reward: Float[Tensor, "P T E"],
        is_end: Bool[Tensor, "P T E"],
        valid: Bool[Tensor, "P T E"],
        gamma: Float[Tensor, "P"],
    ) -> None:
        """Follow the running discounted returns through one rollout and merge them into the moments, in place.

        Args:
            reward: unscaled rewards; a reward that is not finite is left out, and so is its step.
            is_end: the step was the last of its episode (terminated or truncated).
            valid: steps that count.
            gamma: discount of each member.
        """
        used = valid & reward.isfinite()
        added = torch.where(used, reward, 0.0).double()
        # What is left out changes nothing, and behind an end the sum starts again. All is finite, so that factors can say so.
        factor = torch.where(used, gamma.double()[:, None, None], 1.0)
        factor[:, 1:] *= ~is_end[:, :-1]
        history = torch.empty_like(added)
        running = self.running_return
        for added_t, factor_t, history_t in zip(added.unbind(1), factor.unbind(1), history.unbind(1), strict=True):
            running = torch.addcmul(added_t, factor_t, running, out=history_t)
        running = torch.where(is_end[:, -1], 0.0, running)
        self.moments.update_(history.flatten(1), used.flatten(1))
        self.running_return.copy_(running)

    def deviation(self, epsilon: float = 1e-8) -> Float64[Tensor, "P"]:
        """Rewards in one scaled unit: the number that `scale` divides by."""
        return (self.moments.var + epsilon).sqrt()

    def scale(self, reward: Float[Tensor, "P ..."], clip: float, epsilon: float = 1e-8) -> Float[Tensor, "P ..."]:
        """Rewards divided by `deviation` and clipped to ±clip."""
        return (reward / per_member(self.deviation(epsilon), reward.ndim)).clamp(-clip, clip).to(reward.dtype)

    def unscale(self, value: Float[Tensor, "P ..."], epsilon: float = 1e-8) -> Float[Tensor, "P ..."]:
        """Values, returns or quantiles in scaled units brought back to the units of the reward."""
        return (value * per_member(self.deviation(epsilon), value.ndim)).to(value.dtype)
