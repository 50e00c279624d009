"""Distributions as N equally weighted quantiles: the loss that fits them, and their mean."""

from __future__ import annotations

import functools

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from hardy.population import per_member


def quantile_midpoints(
    count: int, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Float[Tensor, "Q"]:
    """The levels ``τ_i = (i + ½) / count`` whose quantiles lie closest to a distribution (Dabney et al. 2018, lemma 2).

    Raises:
        ValueError: ``count`` is not positive.
    """
    if count < 1:
        raise ValueError(f"count = {count}: a distribution needs at least 1 quantile")
    return (torch.arange(count, dtype=dtype, device=device) + 0.5) / count


@functools.cache  # and never dropped: a captured graph goes on reading these addresses
def _weights(count: int, dtype: torch.dtype, device: torch.device) -> tuple[Float[Tensor, "Q"], Float[Tensor, "Q"]]:
    """Of errors below and above 0, for each quantile; the same in every minibatch."""
    tau = quantile_midpoints(count, dtype=dtype, device=device)
    return 1 - tau, tau


def quantile_huber_loss(
    quantiles: Float[Tensor, "P *batch Q"], target: Float[Tensor, "P ..."], kappa: float | Float[Tensor, "P"]
) -> Float[Tensor, "P *batch"]:
    """Quantile Huber loss (Dabney et al. 2018, "Distributional RL with Quantile Regression", eq. 10).

    With ``u = target − quantile``, the loss of one pair is ``|τ − 1{u < 0}| · Huber_κ(u) / κ``; as κ goes to 0 it becomes
    the pure quantile loss ``|τ − 1{u < 0}| · |u|``, which is what κ = 0 gives.

    The mean is taken over the targets *and* over the quantiles, so that the size of the loss, and with it the meaning of a
    value coefficient, does not grow with the number of quantiles.

    Args:
        quantiles: the prediction; quantile i is fitted to level ``(i + ½) / Q``.
        target: one target ``[P, *batch]`` or K samples or quantiles of the target distribution ``[P, *batch, K]``.
        kappa: width of the quadratic zone in the units of ``quantiles``, a number or one for each member, at least 0.

    Raises:
        ValueError: the shape of ``target`` does not fit.
    """
    if target.shape == quantiles.shape[:-1]:
        target = target.unsqueeze(-1)
    elif target.shape[:-1] != quantiles.shape[:-1]:
        batch = tuple(quantiles.shape[:-1])
        raise ValueError(f"target has shape {tuple(target.shape)}: allowed are {batch} and {(*batch, 'K')}")
    wanted, predicted = torch.broadcast_tensors(target.unsqueeze(-1), quantiles.unsqueeze(-2))
    below, above = _weights(quantiles.shape[-1], quantiles.dtype, quantiles.device)
    weight = torch.where(wanted < predicted, below, above)
    return (weight * _scaled_huber(wanted, predicted, kappa)).mean((-2, -1))


def _scaled_huber(wanted: Tensor, predicted: Tensor, kappa: float | Tensor) -> Tensor:
    """``Huber_κ(error) / κ``, and its limit ``|error|`` at κ = 0."""
    if not isinstance(kappa, Tensor) and kappa > 0:  # the usual case, in one operation
        loss = functional.huber_loss(predicted, wanted, reduction="none", delta=kappa)
        return loss if kappa == 1 else loss / kappa
    size = (wanted - predicted).abs()
    if not isinstance(kappa, Tensor):
        return size
    width = per_member(kappa.to(size), size.ndim) if kappa.ndim == 1 else kappa.to(size)
    inside = torch.minimum(size, width)
    positive = width > 0
    return torch.where(positive, inside * (size - 0.5 * inside) / torch.where(positive, width, 1.0), size)


def expected_value(quantiles: Float[Tensor, "P *batch Q"]) -> Float[Tensor, "P *batch"]:
    """Mean of the distribution, in the units of the quantiles."""
    return quantiles.mean(-1)
