"""Risk measures of a discrete distribution as distorted means, and how one more sample would move them.

A distortion g maps levels in [0, 1] to levels, increasing from 0 to 1; the risk measure is the mean under the distorted
distribution function, ``ρ_g = Σ z_i [g(F_i) − g(F_{i−1})]`` (Dabney et al. 2018, arXiv:1806.06923, section 3). The identity
gives the mean, ``min(u/α, 1)`` CVaR, and ``Φ(Φ⁻¹(u) + β)`` Wang's measure (Wang 2000, "A class of distortion operators").
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from hardy.population import per_member

Distortion = Callable[[Tensor], Tensor]
_NARROWEST = 1e-4
"""Levels closer than this count as this far apart where a slope is taken between them."""


def cvar_distortion(alpha: Float[Tensor, "P"]) -> Distortion:
    """CVaR: the mean of the worst fraction ``alpha`` of each member; 1 is the mean, and towards 0 the lowest outcome.

    The outcome at the end of the tail counts with the fraction that reaches into it (Acerbi & Tasche 2002, def. 2.6). A number
    outside (0, 1] acts as the nearer end.
    """

    def distort(level: Tensor) -> Tensor:
        tail = per_member(alpha, level.ndim).clamp(min=torch.finfo(level.dtype).tiny, max=1)
        return (level / tail).clamp(max=1)

    return distort


def wang_distortion(shift: Float[Tensor, "P"]) -> Distortion:
    """Wang's measure: every outcome's normal score lowered by ``shift``; positive is averse to risk, 0 the mean."""

    def distort(level: Tensor) -> Tensor:
        distorted: Tensor = torch.special.ndtr(torch.special.ndtri(level) + per_member(shift, level.ndim))
        return distorted

    return distort


def distorted_mean(
    locations: Float[Tensor, "P *batch N"], probabilities: Float[Tensor, "P *batch N"], distortion: Distortion
) -> Float[Tensor, "P *batch"]:
    """``ρ_g`` of ascending ``locations``, exact for the discrete distribution, in its units."""
    upper = _levels(probabilities)
    reached = distortion(upper)
    weight = reached - torch.cat([torch.zeros_like(reached[..., :1]), reached[..., :-1]], dim=-1)
    return (locations * weight).sum(-1)


def influence(
    samples: Float[Tensor, "P *batch K"],
    locations: Float[Tensor, "P *batch N"],
    probabilities: Float[Tensor, "P *batch N"],
    distortion: Distortion,
) -> Float[Tensor, "P *batch"]:
    """How the samples, together, would move ``ρ_g`` of the distribution: the mean of its influence function over them.

    The influence function has the slope ``g'(F(x))`` (Huber 1981, "Robust Statistics", section 3.2) and mean 0 under the
    distribution; here ``F`` is interpolated between the middles of the steps. For the mean it is ``x − mean``; for CVaR
    ``−(q − x)⁺/α`` up to a constant, q being the α-quantile. If an action's returns are ``samples`` and ``locations`` those of
    the state, this is the derivative of the state's ρ_g by the probability of the action: its advantage.

    Args:
        samples: K samples; in the units of the locations, as the result is.
        locations: ascending.
        probabilities: of the locations.
    """
    middle = _levels(probabilities) - 0.5 * probabilities
    lower = torch.cat([torch.zeros_like(middle[..., :1]), middle], dim=-1)
    upper = torch.cat([middle, torch.ones_like(middle[..., :1])], dim=-1)
    width = (upper - lower).clamp(min=_NARROWEST)
    start = torch.minimum(lower, 1 - width)
    slope = (distortion((start + width).clamp(max=1)) - distortion(start)) / width
    gaps = locations.diff(dim=-1) * slope[..., 1:-1]
    height = torch.cat([torch.zeros_like(gaps[..., :1]), gaps.cumsum(-1)], dim=-1) if gaps.shape[-1] else locations * 0
    index = torch.searchsorted(locations.contiguous(), samples.contiguous())
    node = (index - 1).clamp(min=0)
    found = height.gather(-1, node) + slope.gather(-1, index) * (samples - locations.gather(-1, node))
    return found.mean(-1) - (height * probabilities).sum(-1)


def _levels(probabilities: Tensor) -> Tensor:
    """Cumulated probabilities, scaled so that rounding does not keep the last from 1."""
    cumulated = probabilities.cumsum(-1)
    return (cumulated / cumulated[..., -1:]).clamp(max=1)
