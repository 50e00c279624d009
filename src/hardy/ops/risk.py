"""Risk in the objective: settings, the Lagrange multiplier of the CVaR limit, and the advantage that follows from both."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Literal, Self

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor

from hardy.config import Settings, tunable
from hardy.ops.critic import Critic, ReturnDistribution
from hardy.ops.distortion import cvar_distortion, distorted_mean, influence, wang_distortion
from hardy.population import copied, member_mean, per_member, training_state

SMOOTH_QUANTILES = 0.1
SMOOTH_QUANTILES_WARNING = (
    "risk with critic.huber_threshold = {given}: below that error the quantile loss is quadratic and draws all quantiles "
    "towards the mean, so the tail looks better than it is; use at most {largest}"
)


class RiskSettings(Settings):
    """How much the bad end of the returns counts, as part of the objective (``weight``) or as a limit (``cvar_limit``)."""

    cvar_alpha: float = tunable(0.25, gt=0, le=1)
    """The worst fraction of the returns whose mean CVaR is."""
    weight: float = tunable(0.0, ge=0, le=1)
    """Share of the risk measure in the objective ``(1 − weight)·mean + weight·risk``."""
    distortion: Literal["cvar", "wang"] = "cvar"
    wang_shift: float = tunable(0.75, ge=0)
    cvar_limit: float | None = None
    """In the units of the reward: CVaR of the discounted return from the start of an episode is to stay above it."""
    multiplier_lr: float = tunable(0.1, ge=0)
    """Step of the multiplier, per deviation of the discounted return and iteration."""
    multiplier_max: float = Field(100.0, gt=0)

    @property
    def used(self) -> bool:
        """Whether risk counts at all."""
        return self.weight > 0 or self.cvar_limit is not None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.distortion == "wang" and self.weight == 0:
            raise ValueError("risk.distortion = 'wang': needs risk.weight above 0; a limit is always on CVaR")
        return self


@training_state
class RiskState:
    """The Lagrange multiplier of each member's CVaR limit, ``[P]``: in proportion to the objective, hence without unit."""

    multiplier: Float[Tensor, "P"] = copied()

    @torch.no_grad()
    def adapt_(
        self, shortfall: Float[Tensor, "P"], deviation: Float[Tensor, "P"], rate: Float[Tensor, "P"], largest: float
    ) -> None:
        """One step of dual ascent, in place: up while CVaR is below the limit, down to 0 while it is above.

        Args:
            shortfall: limit − CVaR, in the units of the reward; a member for which it is not finite keeps its multiplier.
            deviation: of the discounted return, in the units of the reward: the step does not depend on those units.
            rate: step for a shortfall of one deviation.
            largest: the multiplier goes no further.
        """
        moved = (self.multiplier + rate * (shortfall / deviation).clamp(-1, 1)).clamp(0, largest)
        self.multiplier.copy_(torch.where(moved.isfinite(), moved, self.multiplier))


def risk_advantage(
    advantage: Float[Tensor, "P T E"],
    samples: Float[Tensor, "P T E G"],
    state: ReturnDistribution,
    hyper: Mapping[str, Tensor],
    multiplier: Float[Tensor, "P"],
    distortion: Literal["cvar", "wang"],
) -> Float[Tensor, "P T E"]:
    """The advantage for ``[(1 − w)·mean + w·risk + multiplier·CVaR] / (1 + multiplier)``.

    The risk measure's part is its derivative by the policy: the mean influence of the returns that followed the action on the
    measure of the state's distribution (`hardy.ops.distortion.influence`). Members without risk keep theirs bit for bit.

    Args:
        advantage: for the mean alone, from GAE.
        samples: of the return after the action.
        state: the distribution of the return before it.
        hyper: with ``risk.weight``, ``risk.cvar_alpha``, ``risk.wang_shift``.
        multiplier: of the CVaR limit; the division keeps the size of the advantage.
        distortion: the risk measure that ``risk.weight`` weighs.
    """
    weight, tail = hyper["risk.weight"], cvar_distortion(hyper["risk.cvar_alpha"])
    total = 1 + multiplier
    on_cvar = multiplier / total if distortion == "wang" else (weight + multiplier) / total
    parts = (1 - weight) / total
    mixed = per_member(parts, 3) * advantage
    mixed = mixed + per_member(on_cvar, 3) * influence(samples, state.locations, state.probabilities, tail)
    if distortion == "wang":
        wang = influence(samples, state.locations, state.probabilities, wang_distortion(hyper["risk.wang_shift"]))
        mixed = mixed + per_member(weight / total, 3) * wang
    return torch.where(per_member((weight > 0) | (multiplier > 0), 3), mixed, advantage)


class Objective:
    """What a member is trained for besides the mean of its return, and what it stands at.

    Args:
        critic: reads the distribution of the return.
        settings: the risk that counts.
        state: the multipliers, written in place.
    """

    def __init__(self, critic: Critic, settings: RiskSettings, state: RiskState) -> None:
        self.critic = critic
        self.settings = settings
        self.state = state
        bootstrap, threshold = critic.settings.bootstrap, critic.settings.huber_threshold
        if settings.used and critic.settings.kind == "quantile" and threshold > SMOOTH_QUANTILES:
            warnings.warn(SMOOTH_QUANTILES_WARNING.format(given=threshold, largest=SMOOTH_QUANTILES), UserWarning, stacklevel=2)
        self.samples_returns = bootstrap == "distribution" or (bootstrap == "auto" and settings.used)
        """Whether the critic is fitted to samples of the return, which end in the next distribution and not in its mean."""

    def advantage(
        self,
        advantage: Float[Tensor, "P T E"],
        samples: Float[Tensor, "P T E G"],
        outputs: Float[Tensor, "P T E K"],
        hyper: Mapping[str, Tensor],
    ) -> Float[Tensor, "P T E"]:
        """`risk_advantage` where any member has risk in its objective; ``outputs`` are the critics' before the action."""
        if not bool(((hyper["risk.weight"] > 0) | (self.state.multiplier > 0)).any()):
            return advantage
        state = self.critic.distribution(outputs)
        return risk_advantage(advantage, samples, state, hyper, self.state.multiplier, self.settings.distortion)

    @torch.no_grad()
    def cvar(
        self, outputs: Float[Tensor, "P T E K"], where: Bool[Tensor, "P T E"], hyper: Mapping[str, Tensor]
    ) -> Float[Tensor, "P"]:
        """Mean CVaR at the chosen steps, in units of the scaled return; NaN for a member that has none there."""
        asked = where.any(0)  # by any member: a small part, where they are starts of episodes
        state = self.critic.distribution(outputs[:, asked])
        found = outputs.new_zeros(where.shape)
        found[:, asked] = distorted_mean(state.locations, state.probabilities, cvar_distortion(hyper["risk.cvar_alpha"]))
        return torch.where(where.flatten(1).any(1), member_mean(found, where), torch.nan)

    def adapt_(
        self, cvar: Float[Tensor, "P"], deviation: Float[Tensor, "P"], hyper: Mapping[str, Tensor]
    ) -> dict[str, Float[Tensor, "P"]]:
        """Move the multipliers towards the limit, if there is one; returns the metrics.

        Args:
            cvar: of the return from the start of an episode, in the units of the reward.
            deviation: of the discounted return, in those units.
        """
        limit = self.settings.cvar_limit
        if limit is None:
            return {"risk/cvar": cvar}
        shortfall = limit - cvar
        self.state.adapt_(shortfall, deviation, hyper["risk.multiplier_lr"], self.settings.multiplier_max)
        violation = torch.where(shortfall.isnan(), shortfall, shortfall.clamp(min=0))
        return {"risk/cvar": cvar, "risk/lambda": self.state.multiplier.clone(), "risk/violation": violation}
