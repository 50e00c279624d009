"""The distributional critic: what the outputs of the value heads mean, and the loss that trains them.

Everything that reads the outputs (advantages, bootstrapping, loss, risk, logging) does so through one `Critic`, so that the
distribution used is the one trained, with the same aggregation of twin critics everywhere.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from hardy.config import Settings, tunable
from hardy.ops.categorical import atoms, project
from hardy.ops.quantiles import expected_value, quantile_huber_loss, quantile_midpoints
from hardy.population import per_member


class CriticSettings(Settings):
    """The value heads.

    ``quantile`` fits quantiles of the return (Dabney et al. 2018), ``categorical`` probabilities of fixed atoms (C51, Bellemare
    et al. 2017), ``scalar`` the mean alone by squared error.
    """

    kind: Literal["quantile", "categorical", "scalar"] = "quantile"
    quantiles: int = Field(32, ge=1)
    atoms: int = Field(51, ge=2)
    huber_threshold: float = Field(1.0, ge=0)
    """kappa of the quantile Huber loss, in units of the scaled return; 0 is the plain quantile loss."""
    twin: bool = False
    """Two critics with independent heads."""
    aggregation: Literal["mean", "min", "single"] = "mean"
    """What twin critics say together, everywhere: their average, the one with the lower mean, or the first."""
    value_clip: float = tunable(0.0, ge=0)
    """How far each quantile may move from its own old value, in scaled returns; 0 is no limit."""
    bootstrap: Literal["auto", "mean", "distribution"] = "auto"
    """What ends a λ-return: the mean of the next state's distribution, or its quantiles. ``auto``: those where risk counts."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.value_clip > 0 and self.kind == "categorical":
            raise ValueError(
                f"critic.value_clip = {self.value_clip}: must be 0 with critic.kind = 'categorical', whose atoms do not move"
            )
        if self.bootstrap == "distribution" and self.kind == "scalar":
            raise ValueError("critic.bootstrap = 'distribution': critic.kind = 'scalar' has none; allowed are auto and mean")
        return self


@dataclasses.dataclass(frozen=True)
class ReturnDistribution:
    """A distribution of returns for every step: ascending locations ``[P, *batch, N]`` and their probabilities."""

    locations: Float[Tensor, "P *batch N"]
    probabilities: Float[Tensor, "P *batch N"]


class Critic:
    """Reads the outputs of the value heads, ``[P, *batch, K]``: those of the first critic, then those of its twin.

    Args:
        settings: what the outputs are.
        support: ``[P, 2]`` ends of the atoms, for the categorical critic only; read at every call.
    """

    def __init__(self, settings: CriticSettings, support: Float[Tensor, "P 2"] | None = None) -> None:
        self.settings = settings
        self.support = support
        self.heads = 2 if settings.twin else 1

    @staticmethod
    def head_size(settings: CriticSettings) -> int:
        """Outputs of one critic."""
        return {"quantile": settings.quantiles, "categorical": settings.atoms, "scalar": 1}[settings.kind]

    def mean(self, outputs: Float[Tensor, "P *batch K"]) -> Float[Tensor, "P *batch"]:
        """Mean of the predicted return, twin critics aggregated: the value of the state."""
        apart = self._apart(outputs)
        means = self._means(apart)
        return self._choose(means.unsqueeze(-1), means).squeeze(-1)

    def distribution(self, outputs: Float[Tensor, "P *batch K"]) -> ReturnDistribution:
        """The predicted distribution, twin critics aggregated: quantile functions, or probabilities, are averaged or chosen.

        Its mean is `mean`, to rounding. Quantiles that cross are sorted.
        """
        apart = self._apart(outputs)
        means = self._means(apart)
        if self.settings.kind == "categorical":
            probabilities = self._choose(apart.softmax(-1), means)
            return ReturnDistribution(self._atoms(probabilities.ndim).expand_as(probabilities), probabilities)
        locations = self._choose(apart.sort(-1).values, means)
        return ReturnDistribution(locations, torch.full_like(locations, 1 / locations.shape[-1]))

    def samples(self, outputs: Float[Tensor, "P *batch K"]) -> Float[Tensor, "P *batch N"]:
        """N equally probable samples of the predicted distribution, ascending: its quantiles at the levels (i + ½)/N.

        Those of a categorical critic are shifted together so that their mean is that of the distribution.
        """
        found = self.distribution(outputs)
        if self.settings.kind != "categorical":
            return found.locations
        count = self.settings.atoms
        level = quantile_midpoints(count, dtype=outputs.dtype, device=outputs.device)
        cumulated = found.probabilities.cumsum(-1).contiguous()
        index = torch.searchsorted(cumulated, level.expand_as(cumulated).contiguous()).clamp(max=count - 1)
        quantiles = found.locations.gather(-1, index)
        mean = (found.locations * found.probabilities).sum(-1, keepdim=True)
        return quantiles + (mean - quantiles.mean(-1, keepdim=True))

    def loss(
        self,
        outputs: Float[Tensor, "P *batch K"],
        target: Float[Tensor, "P *batch G"],
        old: Float[Tensor, "P *batch K"],
        clip: Float[Tensor, "P"],
    ) -> Float[Tensor, "P *batch"]:
        """Loss of each step, averaged over the critics: each is trained on the same targets.

        Args:
            outputs: the prediction.
            target: G samples of the return, without gradient.
            old: what the critics said when the data were collected.
            clip: how far each quantile may move from its own old value; read only where ``settings.value_clip`` is above 0. The
                larger of the clipped and the unclipped loss counts (Schulman et al. 2017's reference code), for each critic by
                itself, before the average.
        """
        apart = self._apart(outputs)
        each = self._each_loss(apart, target)
        if self.settings.value_clip > 0:
            before = self._apart(old)
            reach = per_member(clip, apart.ndim)
            near = before + torch.maximum(torch.minimum(apart - before, reach), -reach)
            each = torch.maximum(each, self._each_loss(near, target))
        return each.mean(-1)

    def _each_loss(self, apart: Float[Tensor, "P *batch C N"], target: Float[Tensor, "P *batch G"]) -> Tensor:
        if self.settings.kind == "categorical":
            assert self.support is not None
            wanted = project(target, self.support, self.settings.atoms).unsqueeze(-2)
            cross_entropy: Tensor = -(wanted * apart.log_softmax(-1)).sum(-1)
            return cross_entropy
        if self.settings.kind == "scalar":
            return 0.5 * (target.unsqueeze(-2) - apart).square().mean(-1)
        spread = target.unsqueeze(-2).expand(*apart.shape[:-1], target.shape[-1])
        return quantile_huber_loss(apart, spread, self.settings.huber_threshold)

    def _apart(self, outputs: Tensor) -> Tensor:
        apart: Tensor = outputs.unflatten(-1, (self.heads, -1))
        return apart

    def _atoms(self, ndim: int) -> Tensor:
        assert self.support is not None
        place = atoms(self.support, self.settings.atoms)
        return place.reshape(place.shape[0], *([1] * (ndim - 2)), place.shape[1])

    def _means(self, apart: Float[Tensor, "P *batch C N"]) -> Float[Tensor, "P *batch C"]:
        if self.settings.kind == "categorical":
            return (apart.softmax(-1) * self._atoms(apart.ndim)).sum(-1)
        return expected_value(apart)

    def _choose(self, each: Float[Tensor, "P *batch C N"], means: Float[Tensor, "P *batch C"]) -> Float[Tensor, "P *batch N"]:
        """What the critics say together; ``min`` takes everything from the critic with the lower mean."""
        if self.heads == 1 or self.settings.aggregation == "single":
            return each.select(-2, 0)
        if self.settings.aggregation == "mean":
            return each.mean(-2)
        lower = means.argmin(-1)[..., None, None].expand(*each.shape[:-2], 1, each.shape[-1])
        chosen: Tensor = each.gather(-2, lower).squeeze(-2)
        return chosen
