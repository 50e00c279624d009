"""Gradient transformations on stacked tensors: an update is a chain of (init, update) pairs that pass one `Step` along.

Every tensor starts with the population axis P and every number that acts on tensor k of member p is entry [p, k] of a
matrix, so parameter groups, members and bias corrections all broadcast in the same way. The direction of the update and its
size are kept apart (``update = coefficient * direction``), so scaling costs nothing until the weights move.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from hardy.graphs import may_ask

Gating = Literal["global", "local", "none"]
StandardNormal = Callable[[Sequence[Tensor]], list[Tensor]]
"""Takes the tensors that want noise, returns standard-normal numbers of the same shapes."""


class TensorOptions(NamedTuple):
    """How one tensor takes part in the update: choices of structure, the same for all members."""

    gating: Gating = "global"
    protecting: bool = True
    adaptive_noise: bool = True
    noise: bool = True


@dataclasses.dataclass
class Step:
    """One update on its way through the chain: K tensors that have a gradient, P members.

    Args:
        names: K names, the keys of the states' mappings.
        weights: K tensors ``[P, ...]``, changed in place by `descend` only.
        gradients: K tensors ``[P, ...]``, raw at first; replaced by the clipped ones, never written to.
        hyper: matrices that broadcast to ``[P, K]``, float64.
        options: K choices of structure.
        standard_normal: source of the noise.
        columns: positions of the K tensors in the states' ``[P, all]`` matrices; None means all of them.
    """

    names: Sequence[str]
    weights: list[Tensor]
    gradients: list[Tensor]
    hyper: Mapping[str, Float[Tensor, "#P #K"]]
    options: Sequence[TensorOptions]
    standard_normal: StandardNormal
    columns: Int[Tensor, "K"] | None = None

    def __post_init__(self) -> None:
        weight = self.weights[0]
        self.shape = (weight.shape[0], len(self.weights))
        ones = torch.ones(self.shape, dtype=torch.float64, device=weight.device)
        self.factor = ones
        self.direction = self.gradients
        self.coefficient = ones
        self.gates: dict[int, Tensor] = {}
        self.noise: dict[int, Tensor] = {}
        self.noise_coefficient = ones
        self.metrics: dict[str, Tensor] = {}

    @functools.cached_property
    def gradient_norms(self) -> Float[Tensor, "P K"]:
        """Norms of the raw gradients; to be asked for before they are replaced."""
        return tensor_norms(self.gradients)

    def pick(self, matrix: Shaped[Tensor, "P all"]) -> Shaped[Tensor, "P K"]:
        """The columns of a state's matrix that belong to this step's tensors."""
        return matrix if self.columns is None else matrix[:, self.columns]

    def count_(self, steps: Int[Tensor, "P all"]) -> Int[Tensor, "P K"]:
        """Add one to the update counts of this step's tensors, in place; returns them."""
        if self.columns is None:
            return steps.add_(1)
        steps[:, self.columns] += 1
        return steps[:, self.columns]


class Transform(NamedTuple):
    """A gradient transformation.

    ``init`` makes the state from named, stacked weights (None where there is nothing to remember); ``update`` changes the step
    and that state in place.
    """

    init: Callable[[Mapping[str, Tensor]], Any]
    update: Callable[[Step, Any], None]


def stateless(update: Callable[[Step], None]) -> Transform:
    """A transformation that remembers nothing."""
    return Transform(lambda weights: None, lambda step, state: update(step))


def chain(*transforms: Transform) -> Transform:
    """Apply transformations in the order given; the state is the tuple of theirs."""

    def init(weights: Mapping[str, Tensor]) -> tuple[Any, ...]:
        return tuple(transform.init(weights) for transform in transforms)

    def update(step: Step, states: Sequence[Any]) -> None:
        for transform, state in zip(transforms, states, strict=True):
            transform.update(step, state)

    return Transform(init, update)


def columns(matrix: Shaped[Tensor, "#P #K"], like: Sequence[Tensor]) -> list[Tensor]:
    """Column k of a matrix in the shape and dtype that broadcast against tensor k: ``[P, 1, ..., 1]``."""
    dtype = like[0].dtype
    if matrix.shape[0] == 1 and all(tensor.dtype is dtype for tensor in like):
        entries = matrix.to(dtype).unbind(1)  # one element broadcasts against any shape
        return list(entries) if len(entries) > 1 else [entries[0]] * len(like)
    shaped: dict[tuple[torch.dtype, int], tuple[Tensor, ...]] = {}
    found = []
    for k, tensor in enumerate(like):
        kind = tensor.dtype, tensor.ndim
        if kind not in shaped:
            shaped[kind] = matrix.to(kind[0]).view(*matrix.shape, *[1] * (kind[1] - 1)).unbind(1)
        found.append(shaped[kind][k if matrix.shape[1] > 1 else 0])
    return found


def tensor_norms(tensors: Sequence[Shaped[Tensor, "P ..."]]) -> Float[Tensor, "P K"]:
    """Euclidean norm of each member's row of each tensor, float64."""
    if tensors[0].shape[0] == 1:  # a whole tensor at a time, in one call
        return torch.stack(torch._foreach_norm(list(tensors))).double()[None]
    return torch.stack([torch.linalg.vector_norm(rows, dim=1) for rows in _rows(tensors)], dim=1).double()


def tensor_maxima(tensors: Sequence[Shaped[Tensor, "P ..."]]) -> Float[Tensor, "P K"]:
    """Largest entry of each member's row of each tensor, float64."""
    if tensors[0].shape[0] == 1:
        return torch.stack(torch._foreach_max(list(tensors))).double()[None]
    return torch.stack([rows.amax(1) for rows in _rows(tensors)], dim=1).double()


def _rows(tensors: Sequence[Shaped[Tensor, "P ..."]]) -> list[Shaped[Tensor, "P N"]]:
    return [tensor.reshape(tensor.shape[0], -1) for tensor in tensors]


@functools.cache  # and never dropped: a captured graph goes on reading these addresses
def positions(chosen: tuple[int, ...], device: torch.device) -> Int[Tensor, "K"]:
    """Some of a step's tensors as an index; made once, since a captured step can bring nothing from the host."""
    return torch.tensor(chosen, device=device)


def pick_columns(matrix: Shaped[Tensor, "P K"], chosen: Sequence[int]) -> Shaped[Tensor, "P G"]:
    """The columns of some of a step's tensors."""
    return matrix if len(chosen) == matrix.shape[1] else matrix.index_select(1, positions(tuple(chosen), matrix.device))


def where_chosen(step: Step, chosen: Sequence[int], inside: Tensor, outside: Tensor) -> Float[Tensor, "P K"]:
    """``inside`` in the columns of the chosen tensors, ``outside`` in the others'."""
    if len(chosen) == step.shape[1]:
        return inside
    mask = positions(tuple([int(k in chosen) for k in range(step.shape[1])]), step.coefficient.device)
    return torch.where(mask > 0, inside, outside) if chosen else outside


def clip_by_member_norm(step: Step) -> None:
    """Shrink each member's gradient, all tensors together, to norm ``max_grad_norm`` at most (Pascanu et al. 2013, §3.2)."""
    norm = torch.linalg.vector_norm(step.gradient_norms, dim=1, keepdim=True)
    step.metrics["train/grad_norm"] = norm[:, 0]
    limit = step.hyper.get("max_grad_norm")
    if limit is None:
        return
    above = norm > limit
    if not may_ask(above) or bool(above.any()):
        shrink = torch.where(above, limit / norm, 1.0)
        step.gradients = list(torch._foreach_mul(step.gradients, columns(shrink, step.gradients)))
        step.direction = step.gradients


def scale(step: Step) -> None:
    """Multiply the update, not the gradient, by the variance scaling factor: in front of m/√v or of a clip it would cancel."""
    step.coefficient = step.coefficient * step.factor


def descend(step: Step) -> None:
    """Move the weights in place: ``w ← (1 − lr·decay)·w − lr·(update + noise)``, the decay only where it is decoupled."""
    back = -step.hyper["lr"]
    decay = step.hyper.get("decoupled_decay")
    if decay is not None and (not may_ask(decay) or bool(decay.any())):
        torch._foreach_mul_(step.weights, columns(1 + back * decay, step.weights))
    torch._foreach_addcmul_(step.weights, step.direction, columns(back * step.coefficient, step.weights))
    if step.noise:
        noisy = list(step.noise)
        weights = [step.weights[k] for k in noisy]
        amount = pick_columns(back * step.noise_coefficient, noisy)
        torch._foreach_addcmul_(weights, list(step.noise.values()), columns(amount, weights))
