"""The clipped policy loss of PPO and the measures that belong to it."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hardy.population import member_mean, per_member

MAX_LOG_RATIO = 50.0
"""Far beyond any meaningful ratio; keeps exp finite in float32, for 0 · inf in the clipped branch's gradient is NaN."""


def log_ratio(log_prob: Float[Tensor, "P *batch"], old_log_prob: Float[Tensor, "P *batch"]) -> Float[Tensor, "P *batch"]:
    """Logarithm of the ratio r of an action's new to its old probability, at most `MAX_LOG_RATIO`."""
    return (log_prob - old_log_prob).clamp(max=MAX_LOG_RATIO)


def clipped_surrogate(
    log_ratio: Float[Tensor, "P *batch"], advantage: Float[Tensor, "P *batch"], clip_range: Float[Tensor, "P"]
) -> Float[Tensor, "P *batch"]:
    """Negative clipped surrogate objective, elementwise (Schulman et al. 2017, arXiv:1707.06347, eq. 7).

    That is ``−min(r·A, clip(r, 1 − clip_range, 1 + clip_range)·A)``.

    Args:
        log_ratio: as `log_ratio` gives it.
        advantage: A, without gradient.
        clip_range: how far from 1 the ratio may gain anything.
    """
    clip = per_member(clip_range, advantage.ndim)
    # Above the range only a positive advantage is clipped, below it only a negative one: one clamp instead of two products
    # and the lesser of them, whose gradients are the longest part of a small loss.
    rises = advantage > 0
    lowest, highest = torch.where(rises, -torch.inf, 1 - clip), torch.where(rises, 1 + clip, torch.inf)
    return -(log_ratio.exp().clamp(lowest, highest) * advantage)


@torch.no_grad()
def approx_kl(log_ratio: Float[Tensor, "P *batch"]) -> Float[Tensor, "P *batch"]:
    """Elementwise estimate ``(r − 1) − log r ≥ 0`` in nats, whose mean over the old policy's actions is KL(old ‖ new).

    Unbiased, with a smaller variance than ``−log r``: the k3 estimator (Schulman 2020, "Approximating KL Divergence").
    """
    return log_ratio.expm1() - log_ratio


@torch.no_grad()
def beyond_clip(log_ratio: Float[Tensor, "P *batch"], clip_range: Float[Tensor, "P"]) -> Bool[Tensor, "P *batch"]:
    """Where the ratio lies outside ``1 ± clip_range``."""
    return (log_ratio.exp() - 1).abs() > per_member(clip_range, log_ratio.ndim)


@torch.no_grad()
def normalize_advantage(
    advantage: Float[Tensor, "P *batch"], valid: Bool[Tensor, "P *batch"], epsilon: float = 1e-8
) -> Float[Tensor, "P *batch"]:
    """Each member's advantages shifted to mean 0 and scaled to standard deviation 1 over its valid entries.

    The standard deviation divides by the number of entries, so a single valid entry, like equal entries, becomes 0.
    Entries that are not valid become 0.

    Args:
        advantage: in any units; the result has none.
        valid: entries that count.
        epsilon: added to the standard deviation.
    """
    wide = advantage.double()  # equal float32 values then have a mean without rounding, hence no spurious spread
    centred = wide - per_member(member_mean(wide, valid), wide.ndim)
    deviation = member_mean(centred.square(), valid).sqrt()
    scaled = centred / (per_member(deviation, wide.ndim) + epsilon)
    return torch.where(valid, scaled, 0.0).to(advantage.dtype)


@torch.no_grad()
def explained_variance(
    value: Float[Tensor, "P *batch"], returns: Float[Tensor, "P *batch"], valid: Bool[Tensor, "P *batch"]
) -> Float[Tensor, "P"]:
    """``1 − Var(returns − value) / Var(returns)`` of each member over its valid entries.

    1 is a perfect critic, 0 one no better than a constant, below 0 worse. NaN where the returns do not vary: undefined.
    """
    spread = _variance(returns.double(), valid)
    unexplained = _variance(returns.double() - value.double(), valid)
    return torch.where(spread > 0, 1 - unexplained / spread, torch.nan).to(value.dtype)


def _variance(value: Tensor, valid: Tensor) -> Tensor:
    centred = value - per_member(member_mean(value, valid), value.ndim)
    return member_mean(centred.square(), valid)
