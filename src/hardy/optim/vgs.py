"""Variance gradient scaler (VGS): shrink an update by how noisy its gradient is.

With E[g] the mean and Var the elementwise variance of the gradient *over updates*, summed over a scope of tensors,
``NSR = tr Var / ‖E g‖²`` and the factor is ``clamp(1/(1 + alpha·NSR), min_scale, 1)``. At alpha = 1 that is the c that
minimises ``E‖c·g − E g‖²``.

Both parts are measured on the raw gradient of an update, before clip and scale, summed over the scope first and divided
last (McCandlish et al. 2018, App. A.1). The signal is never taken below ``signal_floor`` times the second moment
``tr Var + ‖E g‖²``, so the NSR is at most ``1/signal_floor``, whatever the scale of the loss. Two estimators:

* ``ema``: averages m̂ of g and ŝ of ‖g‖² with the same weights. m̂ still holds the share ``c = Σ weights²`` of the
  variance, hence ``tr Var = (ŝ − ‖m̂‖²)/(1 − c)`` and ``‖E g‖² = (‖m̂‖² − c·ŝ)/(1 − c)``.
* ``microbatch``: from the K contributions d_k that add up to one update's gradient g: with
  ``S = (Σ‖d_k‖² − ‖g‖²/K)/(K − 1)``, ``tr Var = K·S`` and ``‖E g‖² = ‖g‖² − K·S``, each averaged over updates with
  ``beta``. It is the variance of the update, whatever K.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from hardy.graphs import may_ask
from hardy.optim.settings import Estimator, Scope
from hardy.optim.transforms import Step, Transform, columns, tensor_norms
from hardy.optim.validation import require_one_of
from hardy.population import copied, training_state
from hardy.profiling import phase

ESTIMATORS = get_args(Estimator)
SCOPES = get_args(Scope)


@training_state
class VGSState:
    """Gradient statistics of each member.

    Attributes:
        steps: updates in which each tensor was measured, ``[P, K]``.
        mean: average gradient, name to ``[P, ...]``; empty for the microbatch estimator.
        second_moment: average of ‖g‖², ``[P, K]``.
        variance, signal: latest estimates of tr Var and ‖E g‖², ``[P, K]``.
        microbatches: contributions observed since the last update, ``[P]``.
        microbatch_squares: sum of their squared norms, ``[P, K]``.
    """

    steps: Int[Tensor, "P K"] = copied()
    mean: dict[str, Float[Tensor, "P ..."]] = copied()
    second_moment: Float[Tensor, "P K"] = copied()
    variance: Float[Tensor, "P K"] = copied()
    signal: Float[Tensor, "P K"] = copied()
    microbatches: Int[Tensor, "P"] = copied()
    microbatch_squares: Float[Tensor, "P K"] = copied()


class Scopes:
    """Which tensors share one factor.

    Args:
        names: the tensors' names.
        scope: ``global`` one for all, ``tensor`` one each, ``module`` one per first component of the name
            (``actor.head.weight`` belongs to ``actor``).

    Raises:
        ValueError: an unknown ``scope``.
    """

    def __init__(self, names: Sequence[str], scope: str) -> None:
        require_one_of("scope", scope, SCOPES)
        labels = ["all" if scope == "global" else name if scope == "tensor" else name.split(".")[0] for name in names]
        self.names = list(dict.fromkeys(labels))
        self.index = torch.tensor([self.names.index(name) for name in labels])
        self._index_on = {self.index.device: self.index}

    def _index(self, device: torch.device) -> Int[Tensor, "K"]:
        # Kept: a captured step can bring nothing from the host.
        if device not in self._index_on:
            self._index_on[device] = self.index.to(device)
        return self._index_on[device]

    def total(self, matrix: Float[Tensor, "P K"]) -> Float[Tensor, "P S"]:
        """Sum over the tensors of each scope."""
        total = torch.zeros(matrix.shape[0], len(self.names), dtype=matrix.dtype, device=matrix.device)
        return total.index_add_(1, self._index(matrix.device), matrix)

    def spread(self, matrix: Float[Tensor, "P S"]) -> Float[Tensor, "P K"]:
        """Give every tensor the entry of its scope."""
        return matrix.index_select(1, self._index(matrix.device))

    def steps(self, steps: Int[Tensor, "P K"]) -> Int[Tensor, "P S"]:
        """Updates measured in each scope: those of its most measured tensor."""
        most = torch.zeros(steps.shape[0], len(self.names), dtype=steps.dtype, device=steps.device)
        return most.scatter_reduce_(1, self._index(steps.device).expand_as(steps), steps, "amax")


def average_weights(
    beta: Float[Tensor, "P #K"], count: Int[Tensor, "P K"]
) -> tuple[Float[Tensor, "P K"], Float[Tensor, "P K"]]:
    """Weight of the newest value in a bias-corrected exponential average of ``count`` values, and Σ of all squared weights.

    They are ``(1−β)/(1−βᵗ)`` and ``(1−β)(1+βᵗ)/((1+β)(1−βᵗ))``.
    """
    power = beta**count
    newest = (1 - beta) / (1 - power)
    return newest, newest * ((1 + power) / (1 + beta))


def moments_from_averages(
    mean_square: Float[Tensor, "P K"], second_moment: Float[Tensor, "P K"], share: Float[Tensor, "P K"]
) -> tuple[Float[Tensor, "P K"], Float[Tensor, "P K"]]:
    """Variance and squared mean from ‖m̂‖², ŝ and the share c of the variance left in m̂; one value has no variance (c = 1)."""
    variance = torch.where(share < 1, (second_moment - mean_square) / (1 - share), 0.0)
    return variance, second_moment - variance


def moments_from_microbatches(
    squares: Float[Tensor, "P K"], total_square: Float[Tensor, "P K"], count: Int[Tensor, "P 1"]
) -> tuple[Float[Tensor, "P K"], Float[Tensor, "P K"]]:
    """Variance and squared mean of a sum of ``count`` contributions, from Σ‖d_k‖² and ‖Σ d_k‖²."""
    variance = count * (squares - total_square / count) / (count - 1)
    return variance, total_square - variance


def noise_to_signal_ratio(
    variance: Float[Tensor, "P S"], signal: Float[Tensor, "P S"], signal_floor: Float[Tensor, "P 1"]
) -> Float[Tensor, "P S"]:
    """``tr Var / ‖E g‖²``, the signal floored at a share of the second moment; 0 where there is no gradient at all."""
    noise = variance.clamp(min=0)
    floor = (signal_floor * (variance + signal)).clamp(min=torch.finfo(signal.dtype).tiny)
    return noise / torch.maximum(signal, floor)


def shrinkage(
    ratio: Float[Tensor, "P S"], alpha: Float[Tensor, "P 1"], min_scale: Float[Tensor, "P 1"]
) -> Float[Tensor, "P S"]:
    """``max(1/(1 + alpha·NSR), min_scale)``."""
    return torch.maximum(1 / (1 + alpha * ratio), min_scale)


def init_state(weights: Mapping[str, Tensor], estimator: str) -> VGSState:
    """Statistics of no gradient yet, for named, stacked weights."""
    first = next(iter(weights.values()))
    size = first.shape[0]
    zeros = torch.zeros(size, len(weights), dtype=torch.float64, device=first.device)
    mean = {name: torch.zeros_like(weight) for name, weight in weights.items()} if estimator == "ema" else {}
    count = torch.zeros(size, dtype=torch.int64, device=first.device)
    steps = torch.zeros(size, len(weights), dtype=torch.int64, device=first.device)
    return VGSState(steps, mean, zeros, zeros.clone(), zeros.clone(), count, zeros.clone())


@torch.no_grad()
def observe_microbatch_(state: VGSState, gradients: Sequence[Tensor], at: Int[Tensor, "K"] | None = None) -> None:
    """Record one contribution: the gradients it adds to the update's, ``[P, ...]`` each.

    Args:
        state: written in place.
        gradients: contribution to each tensor.
        at: positions of these tensors in the state; None means all.
    """
    squares = tensor_norms(gradients).square()
    if at is None:
        state.microbatch_squares += squares
    else:
        state.microbatch_squares[:, at] += squares
    state.microbatches += 1


def contributions(state: VGSState) -> Int[Tensor, "P"]:
    """Microbatches recorded since the last update.

    Raises:
        RuntimeError: fewer than the two that a variance needs.
    """
    if may_ask(state.microbatches) and bool((state.microbatches < 2).any()):
        seen = int(state.microbatches.min())
        raise RuntimeError(f"estimator='microbatch' needs at least 2 recorded microbatches per update, got {seen}")
    return state.microbatches


def update_statistics_(
    state: VGSState,
    names: Sequence[str],
    gradients: Sequence[Tensor],
    norms: Float[Tensor, "P K"],
    beta: Float[Tensor, "P 1"],
    estimator: str,
    at: Int[Tensor, "K"] | None = None,
) -> None:
    """Take one update's raw gradient into the statistics, in place.

    Raises:
        RuntimeError: the microbatch estimator has seen fewer than two contributions.
    """
    count = _taken(state.steps, at) + 1
    _put_(state.steps, count, at)
    weight, share = average_weights(beta, count)
    square = norms.square()
    second_moment = _taken(state.second_moment, at).lerp(square, weight)
    _put_(state.second_moment, second_moment, at)
    if estimator == "ema":
        means = [state.mean[name] for name in names]
        torch._foreach_lerp_(means, list(gradients), columns(weight, means))
        variance, signal = moments_from_averages(tensor_norms(means).square(), second_moment, share)
    else:
        latest = moments_from_microbatches(_taken(state.microbatch_squares, at), square, contributions(state)[:, None])
        variance = _taken(state.variance, at).lerp(latest[0], weight)
        signal = _taken(state.signal, at).lerp(latest[1], weight)
        state.microbatches.zero_()
        state.microbatch_squares.zero_()
    _put_(state.variance, variance, at)
    _put_(state.signal, signal, at)


def _taken(matrix: Shaped[Tensor, "P all"], at: Int[Tensor, "K"] | None) -> Shaped[Tensor, "P K"]:
    return matrix if at is None else matrix[:, at]


def _put_(matrix: Shaped[Tensor, "P all"], values: Shaped[Tensor, "P K"], at: Int[Tensor, "K"] | None) -> None:
    matrix.copy_(values) if at is None else matrix.index_copy_(1, at, values)


def scope_factors(
    state: VGSState,
    scopes: Scopes,
    alpha: Float[Tensor, "P 1"],
    min_scale: Float[Tensor, "P 1"],
    signal_floor: Float[Tensor, "P 1"],
    warmup_steps: int,
) -> tuple[Float[Tensor, "P S"], Float[Tensor, "P S"]]:
    """The factor and the NSR of each scope, from the statistics alone; the factor is 1 during the warm-up."""
    ratio = noise_to_signal_ratio(scopes.total(state.variance), scopes.total(state.signal), signal_floor)
    warm = scopes.steps(state.steps) > warmup_steps
    return torch.where(warm, shrinkage(ratio, alpha, min_scale), 1.0), ratio


def measure(scopes: Scopes, warmup_steps: int, estimator: str) -> Transform:
    """First transformation of a chain: take the raw gradient into the statistics and set the step's factor."""

    def update(step: Step, state: VGSState) -> None:
        hyper = step.hyper
        with phase("VGS"):
            beta = hyper["vgs.beta"]
            update_statistics_(state, step.names, step.gradients, step.gradient_norms, beta, estimator, step.columns)
            factor, ratio = scope_factors(
                state, scopes, hyper["vgs.alpha"], hyper["vgs.min_scale"], hyper["vgs.signal_floor"], warmup_steps
            )
            step.factor = step.pick(scopes.spread(factor))
            record_factors(step, scopes.names, factor, ratio)

    return Transform(lambda weights: init_state(weights, estimator), update)


def record_factors(step: Step, scopes: Sequence[str], factor: Float[Tensor, "P S"], ratio: Float[Tensor, "P S"]) -> None:
    """Enter the factor and the NSR of each scope, and their means, among the step's metrics."""
    for name, values in (("vgs/scaling_factor", factor), ("vgs/normalized_variance", ratio)):
        step.metrics[name] = values.mean(1)
        step.metrics |= {f"{name}/{scope}": value for scope, value in zip(scopes, values.unbind(1), strict=True)}
