"""Divergences between two policies at one state, in closed form, with gradient to both sides."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def categorical_kl(logits: Float[Tensor, "*batch A"], other_logits: Float[Tensor, "*batch A"]) -> Float[Tensor, "*batch"]:
    """KL(p ‖ q) in nats of the categorical distributions with these unnormalised log-probabilities.

    An action with probability 0 under p (logit −inf) contributes 0, whatever q gives it.
    """
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    difference = torch.where(p > 0, log_p - other_logits.log_softmax(-1), 0.0)
    return (p * difference).sum(-1)


def diagonal_gaussian_kl(
    mean: Float[Tensor, "*batch A"],
    log_std: Float[Tensor, "..."],
    other_mean: Float[Tensor, "*batch A"],
    other_log_std: Float[Tensor, "..."],
) -> Float[Tensor, "*batch"]:
    """KL(p ‖ q) in nats of Gaussians with diagonal covariance, p with ``mean``, q with ``other_mean``.

    Args:
        mean: of p.
        log_std: log standard deviations of p, broadcastable to ``mean``.
        other_mean: of q.
        other_log_std: log standard deviations of q, broadcastable to ``mean``.
    """
    log_variance_ratio = 2 * (log_std - other_log_std)
    shift = (mean - other_mean).square() * (-2 * other_log_std).exp()
    # expm1 keeps the result 0 to rounding where p and q agree.
    return 0.5 * (log_variance_ratio.expm1() - log_variance_ratio + shift).sum(-1)


def mahalanobis_divergence(
    mean: Float[Tensor, "*batch A"], other_mean: Float[Tensor, "*batch A"], log_std: Float[Tensor, "..."]
) -> Float[Tensor, "*batch"]:
    """``½ (μ' − μ)ᵀ Σ⁻¹ (μ' − μ)``: the KL of two Gaussians that share the diagonal covariance Σ.

    The regulariser of state-adversarial PPO (Zhang et al. 2020, arXiv:2003.08938, §3.2) before its maximum over states.

    Args:
        mean: μ of the policy at the state.
        other_mean: μ' at the perturbed state.
        log_std: log standard deviations of both, broadcastable to ``mean``.
    """
    return 0.5 * ((other_mean - mean).square() * (-2 * log_std).exp()).sum(-1)
