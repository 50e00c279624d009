"""Distributions as probabilities of fixed atoms (C51, Bellemare, Dabney & Munos 2017, arXiv:1707.06887)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

FIRST_SUPPORT = (-1.0, 1.0)
"""Before any return was seen; scaled returns are of this order."""
MARGIN = 0.1
"""Share of the returns' range that the support reaches beyond it at either end."""
SHRINK = 0.01
"""Share of its excess that the support gives back per update: slow beside the critic, which relearns what an atom means."""
MIN_WIDTH = 0.1
"""Of the range, in scaled returns: returns that are all alike still need atoms on both sides."""


def atoms(support: Float[Tensor, "P 2"], count: int) -> Float[Tensor, "P N"]:
    """``count`` locations, evenly spaced from the lower end of each member's support to the upper."""
    position = torch.linspace(0, 1, count, dtype=support.dtype, device=support.device)
    return torch.lerp(support[:, :1], support[:, 1:], position)


def project(
    samples: Float[Tensor, "P *batch K"], support: Float[Tensor, "P 2"], count: int, weights: Float[Tensor, "..."] | None = None
) -> Float[Tensor, "P *batch N"]:
    """Probabilities of the atoms that stand for a set of samples (Bellemare et al. 2017, eq. 7).

    A sample between two atoms is shared out in proportion to its distance from the other one, which keeps its mean exactly; one
    beyond an end counts as that end.

    Args:
        samples: K samples, in the units of the support.
        support: lower and upper end of each member.
        count: number of atoms N, at least 2.
        weights: probability of each sample, broadcastable to ``samples``; equal ones if ``None``.
    """
    ends = support.reshape(-1, *([1] * (samples.ndim - 1)), 2)
    low, high = ends[..., 0], ends[..., 1]
    # NaN has no place: it stays out of the index and makes the probabilities NaN.
    place = ((samples - low) / (high - low) * (count - 1)).clamp(0, count - 1)
    left = place.nan_to_num().floor().clamp(max=count - 2)
    share = place - left
    weight = torch.full_like(samples, 1 / samples.shape[-1]) if weights is None else weights.expand_as(samples)
    found = samples.new_zeros(*samples.shape[:-1], count)
    index = left.long()
    found.scatter_add_(-1, index, weight * (1 - share))
    return found.scatter_add_(-1, index + 1, weight * share)


@torch.no_grad()
def follow_(support: Float[Tensor, "P 2"], returns: Float[Tensor, "P T E"], valid: Bool[Tensor, "P T E"]) -> None:
    """Move each member's support after the returns of one rollout, in place: it grows at once and shrinks slowly.

    Called between an update and the next rollout only: collecting, advantages and loss then read one and the same support.

    Args:
        returns: the scaled rewards to the end of the episode or of the rollout, discounted, and then the value: the mean of a
            distribution, for its outermost atoms would drive the support away. A member without a finite one keeps its support.
        valid: steps that count.
    """
    counted = valid & returns.isfinite()
    infinity = float("inf")
    lowest = torch.where(counted, returns, infinity).flatten(1).amin(1)
    highest = torch.where(counted, returns, -infinity).flatten(1).amax(1)
    width = (highest - lowest).clamp(min=MIN_WIDTH)
    low, high = lowest - MARGIN * width, highest + MARGIN * width
    moved = torch.stack(
        [
            torch.where(low < support[:, 0], low, torch.lerp(support[:, 0], low, SHRINK)),
            torch.where(high > support[:, 1], high, torch.lerp(support[:, 1], high, SHRINK)),
        ],
        dim=1,
    )
    support.copy_(torch.where(counted.flatten(1).any(1, keepdim=True), moved, support))
