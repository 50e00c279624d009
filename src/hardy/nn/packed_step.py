"""One time step of a policy (linear layers and LSTM cells) by PyTorch's operations, from weights packed once.

What `hardy.nn.compiled_step` is where there is no compiled library, and wherever that one does not apply. A rollout takes many
small steps with the same weights, and each is bound by the number of calls and by products with transposed matrices: here the
weights are transposed beforehand, and the three gates with a sigmoid lie side by side.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hardy.nn.linear import ACTIVATIONS, StackedLinear, StackedMLP
from hardy.nn.recurrent import StackedRecurrent

OBSERVATION = -1
"""Stands for the layer below the first."""
_SIGMOIDS_FIRST = (0, 1, 3, 2)
"""Input, forget and output gate, then the candidate."""

Layer = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Input, state before and state after the step (written by LSTM cells) to output."""
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
    """By PyTorch's operations, without gradients; a layer has the weights of the moment it was added."""

    def __init__(self) -> None:
        self._layers: list[tuple[int, Layer]] = []
        self._results: list[int] = []

    def add_linear(self, source: int, linear: StackedLinear, activation: str = "linear") -> int:
        weight, bias = _packed(linear.weight), linear.bias.detach().unsqueeze(1).clone()
        bend = None if activation == "linear" else ACTIVATIONS[activation]

        def layer(inputs: Tensor, before: Tensor, after: Tensor) -> Tensor:
            outputs = torch.baddbmm(bias, inputs, weight)
            return outputs if bend is None else bend(outputs)

        return self._add(source, layer)

    def add_lstm(self, source: int, memory: StackedRecurrent, state_at: int) -> int:
        for layer in range(memory.layers):
            begins = (state_at + vector * memory.hidden_size for vector in (layer, memory.layers + layer))
            hidden, cell = (slice(begin, begin + memory.hidden_size) for begin in begins)
            source = self._add(source, _lstm(memory.layer_weights(layer), hidden, cell))
        return source

    def _add(self, source: int, layer: Layer) -> int:
        self._layers.append((source, layer))
        return len(self._layers) - 1

    def pack(self, actor: int, *critics: int) -> Self:
        self._results = [actor, *critics]
        return self

    @torch.no_grad()
    def __call__(
        self, obs: Float[Tensor, "P E O"], state: Float[Tensor, "P E S"], is_first: Bool[Tensor, "P E"]
    ) -> tuple[Float[Tensor, "P E A"], Float[Tensor, "P E K"], Float[Tensor, "P E S"]]:
        before, after = state.masked_fill(is_first.unsqueeze(-1), 0.0), torch.empty_like(state)
        outputs: list[Tensor] = []
        for source, layer in self._layers:
            outputs.append(layer(obs if source == OBSERVATION else outputs[source], before, after))
        actor, *critics = (outputs[index] for index in self._results)
        return actor, critics[0] if len(critics) == 1 else torch.cat(critics, dim=-1), after


def _packed(weight: Float[Tensor, "P O I"]) -> Float[Tensor, "P I O"]:
    return weight.detach().mT.contiguous()


def _lstm(weights: tuple[Tensor, Tensor, Tensor, Tensor], hidden: slice, cell: slice) -> Layer:
    size = hidden.stop - hidden.start
    order = list(_SIGMOIDS_FIRST)
    weight_ih, weight_hh, bias_ih, bias_hh = (w.detach().unflatten(1, (4, size))[:, order].flatten(1, 2) for w in weights)
    from_input, from_hidden, bias = _packed(weight_ih), _packed(weight_hh), (bias_ih + bias_hh).unsqueeze(1)

    def layer(inputs: Tensor, before: Tensor, after: Tensor) -> Tensor:
        gates = torch.baddbmm(bias, inputs, from_input).baddbmm_(before[..., hidden], from_hidden)
        gates[..., : 3 * size].sigmoid_()
        gates[..., 3 * size :].tanh_()
        enter, forget, leave, candidate = gates.chunk(4, dim=-1)
        following = torch.mul(forget, before[..., cell], out=after[..., cell]).addcmul_(enter, candidate)
        return torch.mul(leave, following.tanh(), out=after[..., hidden])

    return layer
