"""Settings of population-based training that hold for any algorithm."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from hardy.config import Settings

Select = Literal["truncation", "tournament", "welch"]
NEAREST_TO_ONE = 1 - 2**-23
"""Nearer to 1 a float32, as which hyperparameters are kept, may be 1."""
Explore = Literal["perturb", "resample", "both", "pb2"]


class HyperparameterSpace(Settings):
    """Where one hyperparameter may move, and how.

    ``space`` is the scale on which draws are uniform and steps are even: ``linear``; ``log``; or ``log_one_minus``, the
    logarithm of ``1 − x``, for numbers just below 1 such as a discount, of which ``1 / (1 − x)`` is the horizon.
    """

    low: float
    high: float
    space: Literal["linear", "log", "log_one_minus"] = "log"
    factor: float = Field(1.2, gt=1)
    """A perturbation multiplies or divides the value by this (``log``), or 1 − value (``log_one_minus``), or moves the value by
    ``factor − 1`` of the range (``linear``)."""
    resample_probability: float = Field(0.25, ge=0, le=1)
    """Of a draw from the whole range instead, where ``explore`` is ``both``."""

    @model_validator(mode="after")
    def _a_range(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low = {self.low:g}, high = {self.high:g}: low must be below high")
        if self.space == "log" and self.low <= 0:
            raise ValueError(f"low = {self.low:g}: must be > 0 where space = 'log'; space = 'linear' allows it")
        if self.space == "log_one_minus" and self.high > NEAREST_TO_ONE:
            raise ValueError(f"high = {self.high:g}: must be < 1 by more than 1e-7 where space = 'log_one_minus'")
        with np.errstate(over="ignore"):
            low, high = (float(np.float32(end)) for end in (self.low, self.high))
        if not (low < high < math.inf and low > -math.inf) or low == 0 < self.low:
            raise ValueError(
                f"low = {self.low:g}, high = {self.high:g}: a float32, as which values are kept, has no such range"
            )
        return self

    def to_even(self, value: float) -> float:
        """The value on the scale on which the space is even, increasing with the value."""
        if self.space == "log":
            return math.log(value)
        return -math.log1p(-value) if self.space == "log_one_minus" else value

    def from_even(self, even: float) -> float:
        """The value at a place of that scale, inside the bounds whatever the rounding."""
        value = even
        if self.space == "log":
            value = math.exp(even)
        elif self.space == "log_one_minus":
            value = -math.expm1(-even)
        return min(max(value, self.low), self.high)


class PBTRules(Settings):
    """Who copies whom, and what a copy tries instead (Jaderberg et al. 2017, arXiv:1711.09846)."""

    hyperparams: dict[str, HyperparameterSpace] = Field(
        default_factory=lambda: {
            "optimizer.lr": HyperparameterSpace(low=3e-4, high=3e-2),
            "ppo.clip_range": HyperparameterSpace(low=0.1, high=0.4, space="linear"),
            "ppo.ent_coef": HyperparameterSpace(low=1e-5, high=3e-2),
        },
        min_length=1,
    )
    """Hyperparameters that the population tunes, by dotted path, each with its space."""
    select: Select = "truncation"
    truncation: float = Field(0.25, gt=0, le=0.5)
    """The best share, which is copied from, and with ``select = truncation`` the worst share, which is replaced; at least one
    member each."""
    min_gap: float = Field(2.0, ge=0)
    """A member is replaced only by one whose score is higher by more than this many standard errors of the difference."""
    significance: float = Field(0.05, gt=0, lt=1)
    """Level of the one-sided Welch test, where ``select`` is ``welch``."""
    explore: Explore = "both"
    """What happens to the hyperparameters of a member that copied another: a step, a new draw, one of both, or the choice of a
    Gaussian-process bandit (Parker-Holder et al. 2020, arXiv:2002.02518)."""
    frequencies: tuple[Annotated[int, Field(ge=1)], ...] = Field((1,), min_length=1)
    """One sub-population per entry, which exchanges at every so many-th exchange only, so that hyperparameters that pay off
    late have time to (MF-PBT, arXiv:2506.03225). Members are dealt out in turn."""


class PBTSettings(PBTRules):
    """Population-based training of a population that trains as one program; a single agent has no use for it."""

    exchange: bool = True
    """Whether members replace one another. Without, they are scored, but each keeps its weights and hyperparameters."""
    interval: int = Field(20_000, ge=1)
    """Environment steps of one member between two exchanges, rounded up to whole rollouts."""
    episodes: int = Field(20, ge=2)
    """Episodes of the evaluation that gives each member its score: clean, frozen, the same ones for all."""
    initial: Literal["draw", "configured"] = "draw"
    """Members start from draws of their spaces, or all from the configured values."""
    optimizer_exploit_strategy: Literal["copy", "reset"] = "copy"
    """A member that copies another's weights takes its optimizer's state and VGS statistics too, or starts with fresh ones."""
    after_exploit: Literal["burn_in", "zero", "reset_env"] = "burn_in"
    """The memory of a member with new weights: rebuilt from the recent observations of its running episodes, put to zero, or
    begun anew together with its episodes."""
