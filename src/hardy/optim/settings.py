"""Settings of the population's optimizer and of VGS."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hardy.config import Settings, tunable

LARGEST_BETA = 0.999999
"""Nearer to 1 a float32 is 1, and a bias correction 0."""
Scope = Literal["global", "module", "tensor"]
Estimator = Literal["ema", "microbatch"]


class ParameterGroupSettings(Settings):
    """What a group of parameters does differently; None leaves the optimizer's choice."""

    gating: Literal["global", "local", "none"] | None = None
    noise: bool | None = None


class OptimizerSettings(Settings):
    """Settings of a UPGD optimizer; `hardy.optim.upgd` explains the terms.

    ``overrides`` maps prefixes of parameter names (``actor``, ``critic.head``) to what that group does differently; the longer
    prefix wins.
    """

    name: Literal["AdaptiveUPGD", "UPGD", "UPGDW"] = "AdaptiveUPGD"
    lr: float = tunable(4e-3, gt=0)
    weight_decay: float = tunable(0.0, ge=0)
    beta_utility: float = tunable(0.999, ge=0, le=LARGEST_BETA)
    sigma: float = tunable(0.001, ge=0)
    beta1: float = tunable(0.9, ge=0, le=LARGEST_BETA)
    beta2: float = tunable(0.999, ge=0, le=LARGEST_BETA)
    eps: float = tunable(1e-5, gt=0)
    max_grad_norm: float = tunable(0.5, gt=0)
    step_factor: float = tunable(1.0, gt=0)
    adaptive_noise: bool = True
    gating: Literal["global", "local", "none"] = "global"
    protecting: bool = True
    overrides: dict[str, ParameterGroupSettings] = Field(default_factory=dict)


class VGSSettings(Settings):
    """Settings of the variance gradient scaler; `hardy.optim.vgs` explains the terms.

    ``alpha`` is below the 1 that is best for a single gradient: a reinforcement learner's gradients are mostly noise, which
    many small steps average out (docs/optimizers.md compares). ``beta`` = .99 averages over about 200 updates: a window of n
    cannot tell a signal from none where the noise-to-signal ratio is above n. ``warmup_steps`` counts updates during which the
    factor is 1. ``microbatches`` is how many parts each minibatch is cut into for the ``microbatch`` estimator.
    """

    enabled: bool = True
    alpha: float = tunable(0.05, ge=0)
    min_scale: float = tunable(0.01, gt=0, le=1)
    beta: float = tunable(0.99, gt=0, le=LARGEST_BETA)
    signal_floor: float = tunable(1e-4, gt=0, lt=1)
    warmup_steps: int = Field(100, ge=0)
    scope: Literal["global", "module", "tensor"] = "module"
    estimator: Literal["ema", "microbatch"] = "ema"
    microbatches: int = Field(2, ge=2)
