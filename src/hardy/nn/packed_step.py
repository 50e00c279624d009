"""One time step of a policy (linear layers and LSTM cells) by PyTorch's operations, from weights packed once.

What `hardy.nn.compiled_step` is where there is no compiled library, and wherever that one does not apply. A rollout takes many
small steps with the same weights, and each is bound by the number of calls and by products with transposed matrices: here the
weights are transposed beforehand, the three gates with a sigmoid lie side by side, and a cell's two products are one, as are
those of the heads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hardy.nn.linear import ACTIVATIONS, StackedLinear, StackedMLP
from hardy.nn.recurrent import StackedRecurrent

OBSERVATION = -1
"""Stands for the layer below the first."""
_SIGMOIDS_FIRST = (0, 1, 3, 2)
"""Input, forget and output gate, then the candidate."""

Act = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]
"""Observation as it comes ``[P, E, O]``, state, ``is_first``, the action's noise to the action and a `PolicyStep`'s results."""


class Layers(ABC):
    """A policy made layer by layer in the order of computation."""

    @abstractmethod
    def add_linear(self, source: int, linear: StackedLinear, activation: str = "linear") -> int:
        """A linear layer on the output of the layer ``source``; returns its own number."""

    @abstractmethod
    def add_lstm(self, source: int, memory: StackedRecurrent, state_at: int) -> int:
        """The cells of an LSTM whose state begins at ``state_at``; returns the number of the last."""

    def add_mlp(self, source: int, mlp: StackedMLP) -> int:
        """All layers of a multilayer perceptron without layer norm; returns the number of the last (``source`` without any)."""
        for linear in mlp.linears:
            assert isinstance(linear, StackedLinear)
            source = self.add_linear(source, linear, mlp.activation)
        return source

    @abstractmethod
    def pack(self, actor: int, *critics: int) -> Self:
        """Make ready for calls that return the outputs of these linear layers."""


class PolicyStep(Layers):
    """A time step of a policy, called for many steps with the weights that the layers had when it was packed."""

    @abstractmethod
    def __call__(
        self, obs: Float[Tensor, "P E O"], state: Float[Tensor, "P E S"], is_first: Bool[Tensor, "P E"]
    ) -> tuple[Float[Tensor, "P E A"], Float[Tensor, "P E K"], Float[Tensor, "P E S"]]:
        """The actor's outputs, the critics' side by side, and the state after this step, reset first where ``is_first``."""


class PackedStep(PolicyStep):
    """By PyTorch's operations, to be called without gradients; a layer has the weights of the moment it was added."""

    def __init__(self) -> None:
        self._layers: list[tuple[int, _Linear | _LSTM]] = []
        self._results: list[int] = []
        self._actor_width: int | None = None
        """Where one layer gives all results side by side: the first so many are the actor's."""
        self._room: _Room | None = None

    def add_linear(self, source: int, linear: StackedLinear, activation: str = "linear") -> int:
        bend = None if activation == "linear" else ACTIVATIONS[activation]
        return self._add(source, _Linear(_packed(linear.weight), linear.bias.detach().unsqueeze(1).clone(), bend))

    def add_lstm(self, source: int, memory: StackedRecurrent, state_at: int) -> int:
        for layer in range(memory.layers):
            begins = (state_at + vector * memory.hidden_size for vector in (layer, memory.layers + layer))
            source = self._add(source, _LSTM.packed(memory.layer_weights(layer), *begins))
        return source

    def _add(self, source: int, layer: _Linear | _LSTM) -> int:
        self._layers.append((source, layer))
        return len(self._layers) - 1

    def pack(self, actor: int, *critics: int) -> Self:
        self._results = [actor, *critics]
        first = len(self._layers) - len(self._results)
        heads = self._layers[first:]
        linear = [head for _, head in heads if isinstance(head, _Linear) and head.bend is None]
        last = self._results == list(range(first, len(self._layers))) and len(linear) == len(heads)
        if last and len({source for source, _ in heads}) == 1:
            joined = _Linear.joined(linear)
            self._actor_width = linear[0].bias.shape[-1]
            self._layers[first:] = [(heads[0][0], joined)]
        return self

    def __call__(
        self, obs: Float[Tensor, "P E O"], state: Float[Tensor, "P E S"], is_first: Bool[Tensor, "P E"]
    ) -> tuple[Float[Tensor, "P E A"], Float[Tensor, "P E K"], Float[Tensor, "P E S"]]:
        if self._room is None or self._room.state.shape != state.shape:
            self._room = _Room(state, [layer for _, layer in self._layers])
        room = self._room
        room.state.copy_(state).masked_fill_(is_first.unsqueeze(-1), 0.0)
        outputs: list[Tensor] = []
        for (source, layer), vectors in zip(self._layers, room.vectors, strict=True):
            inputs = obs if source == OBSERVATION else outputs[source]
            outputs.append(layer(inputs) if isinstance(layer, _Linear) else layer(inputs, *vectors))
        after = room.state.clone()
        if self._actor_width is not None:
            return outputs[-1][..., : self._actor_width], outputs[-1][..., self._actor_width :], after
        actor, *critics = (outputs[index] for index in self._results)
        return actor, critics[0] if len(critics) == 1 else torch.cat(critics, dim=-1), after


class _Linear(NamedTuple):
    weight: Float[Tensor, "P I O"]
    bias: Float[Tensor, "P 1 O"]
    bend: Callable[[Tensor], Tensor] | None

    @classmethod
    def joined(cls, layers: Sequence[_Linear]) -> Self:
        """One for several on the same inputs, without activation."""
        return cls(torch.cat([layer.weight for layer in layers], -1), torch.cat([layer.bias for layer in layers], -1), None)

    def __call__(self, inputs: Float[Tensor, "P E I"]) -> Float[Tensor, "P E O"]:
        outputs = torch.baddbmm(self.bias, inputs, self.weight)
        return outputs if self.bend is None else self.bend(outputs)


class _LSTM(NamedTuple):
    """A layer of cells; G is the four gates, those with a sigmoid first."""

    weight: Float[Tensor, "P I+H G"]
    bias: Float[Tensor, "P 1 G"]
    hidden_at: int
    cell_at: int

    @classmethod
    def packed(cls, weights: tuple[Tensor, Tensor, Tensor, Tensor], hidden_at: int, cell_at: int) -> Self:
        size, order = weights[1].shape[-1], list(_SIGMOIDS_FIRST)
        weight_ih, weight_hh, bias_ih, bias_hh = (w.detach().unflatten(1, (4, size))[:, order].flatten(1, 2) for w in weights)
        return cls(_packed(torch.cat([weight_ih, weight_hh], -1)), (bias_ih + bias_hh).unsqueeze(1), hidden_at, cell_at)

    def __call__(self, inputs: Float[Tensor, "P E I"], hidden: Tensor, cell: Tensor, gates: _Gates) -> Float[Tensor, "P E H"]:
        """A step; the cells' two vectors ``[P, E, H]`` are overwritten."""
        gates.inputs.copy_(inputs)
        gates.hidden.copy_(hidden)
        torch.baddbmm(self.bias, gates.given, self.weight, out=gates.all)
        gates.sigmoids.sigmoid_()
        gates.candidate.tanh_()
        cell.mul_(gates.forget).addcmul_(gates.enter, gates.candidate)
        output = torch.tanh(cell).mul_(gates.leave)
        hidden.copy_(output)
        return output


class _Gates(NamedTuple):
    """Room for one layer's gates ``[P, E, G]`` and what they are given, ``[P, E, I + H]``, and where each part lies in it.

    Slices in every step would cost as much as gates.
    """

    given: Tensor
    inputs: Tensor
    hidden: Tensor
    all: Tensor
    sigmoids: Tensor
    enter: Tensor
    forget: Tensor
    leave: Tensor
    candidate: Tensor


class _Room:
    """What the steps of so many environments write to, made once.

    Attributes:
        state: ``[P, E, S]`` before the step, and behind each layer after it.
        vectors: for each layer of cells its hidden vectors, its cells and its gates; nothing for the others.
    """

    def __init__(self, like: Float[Tensor, "P E S"], layers: Sequence[_Linear | _LSTM]) -> None:
        self.state = torch.empty_like(like)
        self.vectors: list[tuple[Any, ...]] = []
        for layer in layers:
            if isinstance(layer, _Linear):
                self.vectors.append(())
                continue
            width, size = layer.weight.shape[1], layer.weight.shape[2] // 4
            given, gates = like.new_empty(*like.shape[:2], width), like.new_empty(*like.shape[:2], 4 * size)
            inputs, hidden = given.split_with_sizes([width - size, size], dim=-1)
            parts = _Gates(given, inputs, hidden, gates, gates[..., : 3 * size], *gates.chunk(4, dim=-1))
            places = (self.state[..., at : at + size] for at in (layer.hidden_at, layer.cell_at))
            self.vectors.append((*places, parts))


def _packed(weight: Float[Tensor, "P O I"]) -> Float[Tensor, "P I O"]:
    return weight.detach().mT.contiguous()
