"""How able a network still is to learn: pure functions, one number per member, NaN where the input is not finite."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def dormant_fraction(activations: Float[Tensor, "P N H"], threshold: float = 0.025) -> Float[Tensor, "P"]:
    """Share of the units that hardly respond: s_i = E|h_i| / mean_j E|h_j| <= threshold.

    Sokar et al. 2023 (arXiv:2302.12902), definition 3.1. A layer that is silent altogether is wholly dormant.

    Args:
        activations: of one layer, over N inputs.
        threshold: τ, in units of the layer's mean response.
    """
    response = activations.abs().mean(1)
    level = response.mean(1, keepdim=True)
    fraction = (response <= threshold * level).to(activations.dtype).mean(1)
    return torch.where(level.isfinite().squeeze(1), fraction, torch.nan)


def effective_rank(features: Float[Tensor, "P N H"]) -> Float[Tensor, "P"]:
    """Number of directions that features really use: exp(H(p)), p = σ/Σσ of the singular values σ; 0 if all are zero.

    Roy and Vetterli 2007, section 2: 1 if all inputs give the same direction, min(N, H) if all directions are used alike.

    Args:
        features: of N inputs, not centred.
    """
    finite = features.flatten(1).isfinite().all(1)
    # The decomposition fails for all members if one holds NaN.
    singular = torch.linalg.svdvals(torch.where(finite[:, None, None], features, 0.0))
    total = singular.sum(1, keepdim=True)
    entropy = torch.special.entr(singular / total).sum(1)
    rank = torch.where(total.squeeze(1) > 0, entropy.exp(), 0.0)
    return torch.where(finite, rank, torch.nan)
