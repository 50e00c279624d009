"""Utility-based perturbed gradient descent (Elsayed & Mahmood, ICLR 2024): keep the weights that matter, perturb the others.

First-order utility of a weight: ``M = −g∘w``, what the loss would rise by if the weight were removed. Its average U,
relative to the largest utility η, sets the gate ``1 − sigmoid(U/η)`` in front of the update and of the noise.

Decisions where the paper and the published code leave a choice:

* U and η are bias-corrected alike, so the gate depends on U/η only (published code: corrected U, raw η, `raw_maximum`).
* η ≤ 0 is replaced by ``max |U|``, which keeps the order; if that is 0 too, or too small to divide by, the gate is ½.
* M uses the clipped gradient without weight decay: decay is no part of the loss whose rise M predicts.
* `step_factor` multiplies the gate wherever it acts, in front of the update (protecting) and in front of the noise.
* Utilities are averaged for ungated tensors too, so that a state is ready when gating is switched on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hardy.graphs import may_ask
from hardy.optim.transforms import Step, Transform, columns, pick_columns, positions, tensor_maxima, tensor_norms, where_chosen
from hardy.population import copied, training_state

OptimizerName = Literal["AdaptiveUPGD", "UPGD", "UPGDW"]


@training_state
class UPGDState:
    """Per-member state of UPGD; the format does not depend on gating, noise or clipping.

    Attributes:
        step: updates each tensor has received, ``[P, K]``.
        utility: uncorrected average of −g∘w, name to ``[P, ...]``.
        first_moment, second_moment: uncorrected averages of g and g², empty unless the update is preconditioned.
    """

    step: Int[Tensor, "P K"] = copied()
    utility: dict[str, Float[Tensor, "P ..."]] = copied()
    first_moment: dict[str, Float[Tensor, "P ..."]] = copied()
    second_moment: dict[str, Float[Tensor, "P ..."]] = copied()


def upgd(name: OptimizerName, *, raw_maximum: bool = False) -> Transform:
    """Utility, precondition and gate (Algorithms 1, 2 and 5 of the paper).

    Args:
        name: ``UPGD`` couples the decay into the gradient, as Adam does; ``UPGDW`` and ``AdaptiveUPGD`` leave it to `descend`;
            ``AdaptiveUPGD`` preconditions as Adam.
        raw_maximum: divide the corrected utility by the uncorrected, unguarded maximum, as the published code does.
    """

    def init(weights: Mapping[str, Tensor]) -> UPGDState:
        def zeros() -> dict[str, Tensor]:
            return {key: torch.zeros_like(weight) for key, weight in weights.items()}

        first = next(iter(weights.values()))
        step = torch.zeros(first.shape[0], len(weights), dtype=torch.int64, device=first.device)
        adaptive = name == "AdaptiveUPGD"
        return UPGDState(step, zeros(), zeros() if adaptive else {}, zeros() if adaptive else {})

    def update(step: Step, state: UPGDState) -> None:
        count = step.count_(state.step)
        utilities = [state.utility[key] for key in step.names]
        _average_utility(step, utilities)
        step.gates = _gates(step, utilities, _bias_correction(step.hyper["beta_utility"], count), raw_maximum)
        if name == "AdaptiveUPGD":
            first = [state.first_moment[key] for key in step.names]
            second = [state.second_moment[key] for key in step.names]
            _precondition(step, first, second, count)
        elif "coupled_decay" in step.hyper:
            decay = columns(step.hyper["coupled_decay"], step.weights)
            step.direction = list(torch._foreach_addcmul(step.direction, step.weights, decay))
        _apply_gates(step)

    return Transform(init, update)


def _bias_correction(beta: Float[Tensor, "#P #K"], count: Int[Tensor, "P K"]) -> Float[Tensor, "P K"]:
    return 1 - beta**count


def _average_utility(step: Step, utilities: list[Tensor]) -> None:
    instant = torch._foreach_mul(step.gradients, step.weights)
    torch._foreach_neg_(instant)
    torch._foreach_lerp_(utilities, instant, columns(1 - step.hyper["beta_utility"], utilities))


def _gates(step: Step, utilities: list[Tensor], correction: Float[Tensor, "P K"], raw_maximum: bool) -> dict[int, Tensor]:
    """``1 − sigmoid(U/η)`` of every gated tensor, by position."""
    by_gating: dict[str, list[int]] = {"global": [], "local": [], "none": []}
    for k, option in enumerate(step.options):
        by_gating[option.gating].append(k)
    logits: dict[int, Tensor] = {}
    if chosen := by_gating["global"]:
        among = [utilities[k] for k in chosen]
        eta, inverse = _inverse_scale(among, pick_columns(correction, chosen), raw_maximum)
        logits.update(zip(chosen, torch._foreach_mul(among, columns(-inverse, among)), strict=True))
    else:
        eta = torch.zeros_like(correction[:, 0])
    step.metrics["upgd/utility_max"] = eta
    for k in by_gating["local"]:
        logits[k] = _unit_rows(utilities[k]).neg_()
    if logits:
        torch._foreach_sigmoid_(list(logits.values()))
    return logits


def _inverse_scale(
    utilities: list[Tensor], correction: Float[Tensor, "P G"], raw_maximum: bool
) -> tuple[Float[Tensor, "P"], Float[Tensor, "P G"]]:
    """The largest utility η of each member, and what turns each uncorrected utility into U/η."""

    largest = tensor_maxima(utilities)
    if raw_maximum:
        eta = largest.amax(1)
        return eta, 1 / (correction * eta[:, None])
    used = eta = (largest / correction).amax(1)
    if not may_ask(eta) or bool((eta <= 0).any()):
        # Where no utility is positive, the largest magnitude is that of the smallest utility.
        smallest = tensor_maxima(torch._foreach_neg(utilities))
        used = torch.where(eta > 0, eta, (smallest / correction).amax(1))
    # The inverse must be finite in the utilities' own type: infinity times a utility of 0 is NaN.
    uncorrected = used[:, None] * correction
    tiny = torch.finfo(utilities[0].dtype).tiny
    return eta, torch.where(uncorrected > tiny, 1 / uncorrected, 0.0)


def _unit_rows(utility: Tensor) -> Tensor:
    """Utilities at unit L2 norm along the last axis (a scalar parameter is its own row); bias correction cancels here."""
    rows = utility if utility.ndim > 1 else utility[:, None]
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return (rows / torch.where(norm == 0, 1.0, norm)).view_as(utility)


def _precondition(step: Step, first: list[Tensor], second: list[Tensor], count: Int[Tensor, "P K"]) -> None:
    """Adam's ``m̂/(√v̂ + ε)`` (Kingma & Ba 2015, Algorithm 1), its bias corrections folded into ε and the coefficient."""
    beta1, beta2 = step.hyper["beta1"], step.hyper["beta2"]
    torch._foreach_lerp_(first, step.gradients, columns(1 - beta1, first))
    squares = torch._foreach_mul(step.gradients, step.gradients)
    torch._foreach_lerp_(second, squares, columns(1 - beta2, second))
    root_correction = _bias_correction(beta2, count).sqrt()
    denominator = torch._foreach_sqrt(second)
    torch._foreach_add_(denominator, columns(step.hyper["eps"] * root_correction, denominator))
    step.direction = list(torch._foreach_div(first, denominator))
    step.coefficient = step.coefficient * root_correction / _bias_correction(beta1, count)


def _apply_gates(step: Step) -> None:
    chosen = [k for k in step.gates if step.options[k].protecting]
    if not chosen:
        return
    if step.direction is step.gradients:
        step.direction = [gradient.clone() if k in chosen else gradient for k, gradient in enumerate(step.gradients)]
    torch._foreach_mul_([step.direction[k] for k in chosen], [step.gates[k] for k in chosen])
    step.coefficient = where_chosen(step, chosen, step.coefficient * step.hyper["step_factor"], step.coefficient)


def perturb(step: Step) -> None:
    """Add gated noise to the finished update.

    Adaptive: ``gate · ε · σ · RMS(update)/RMS(gate)``, per tensor and member, so that the noise-to-signal ratio is σ in
    expectation, whatever scaled the update and without lag; an update of zero gets none. Otherwise the published
    ``gate · ε · σ``, which no factor in front of the gradient scales down.
    """
    sigma = step.hyper["sigma"].expand(step.shape)
    noisy = noisy_tensors(step)
    if not noisy:
        step.metrics["upgd/noise_to_signal"] = torch.zeros_like(sigma[:, 0])
        return
    noise = step.standard_normal([step.weights[k] for k in noisy])
    step.noise = dict(zip(noisy, noise, strict=True))
    gated = [k for k in noisy if k in step.gates]
    gates = [step.gates[k] for k in gated]
    if gated:
        torch._foreach_mul_([step.noise[k] for k in gated], gates)
    norms = tensor_norms([*step.direction, *noise, *gates]).split([step.shape[1], len(noisy), len(gated)], dim=1)
    update_norm = norms[0] * step.coefficient.abs()
    fixed = where_chosen(step, gated, sigma * step.hyper["step_factor"], sigma)
    adaptive = [k for k, option in enumerate(step.options) if option.adaptive_noise]
    step.noise_coefficient = where_chosen(step, adaptive, sigma * update_norm / _gate_norms(step, gated, norms[2]), fixed)
    noise_norm = torch.linalg.vector_norm(norms[1] * pick_columns(step.noise_coefficient, noisy), dim=1)
    ratio = noise_norm / torch.linalg.vector_norm(update_norm, dim=1)
    step.metrics["upgd/noise_to_signal"] = torch.where(noise_norm > 0, ratio, 0.0)


def _gate_norms(step: Step, gated: list[int], norms: Float[Tensor, "P G"]) -> Float[Tensor, "P K"]:
    """The norm of each tensor's gates, those of some given; without gates it is that of ones."""
    if len(gated) == step.shape[1]:
        return norms
    sizes = positions(tuple(weight[0].numel() for weight in step.weights), norms.device).double()
    ones = sizes.sqrt().repeat(step.shape[0], 1)
    return ones.index_copy_(1, positions(tuple(gated), norms.device), norms) if gated else ones


def noisy_tensors(step: Step) -> list[int]:
    """Positions of the tensors to which some member may add noise; where sigma cannot be looked at, a sigma of 0 adds zeros."""
    sigma = step.hyper["sigma"]
    by_tensor = zip(*sigma.tolist(), strict=True) if may_ask(sigma) else [(1.0,)]
    wanted = [any(value > 0 for value in values) for values in by_tensor]
    wanted *= step.shape[1] // len(wanted)
    return [k for k, option in enumerate(step.options) if option.noise and wanted[k]]
