"""Stacked linear layers, layer norm and multilayer perceptrons: P independent ones as one batched operation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

Activation = Literal["tanh", "relu", "elu", "silu"]
ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "elu": functional.elu, "silu": functional.silu}
HIDDEN_GAIN = math.sqrt(2.0)


class StackedLinear(nn.Module):
    """``P`` independent linear layers: ``weight [P, O, I]`` (each as in `torch.nn.Linear`), ``bias [P, O]``.

    Args:
        generators: one random generator per member.
        gain: scale of the orthogonal initial weights (Saxe et al. 2014); biases start at zero.
    """

    def __init__(
        self, input_size: int, output_size: int, generators: Sequence[torch.Generator], gain: float = HIDDEN_GAIN
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(len(generators), output_size, input_size))
        self.bias = nn.Parameter(torch.zeros(len(generators), output_size))
        with torch.no_grad():
            for weight, generator in zip(self.weight, generators, strict=True):
                nn.init.orthogonal_(weight, gain=gain, generator=generator)

    def forward(self, inputs: Float[Tensor, "P *batch I"]) -> Float[Tensor, "P *batch O"]:
        """Apply each member's layer to that member's inputs."""
        flat = inputs.reshape(inputs.shape[0], -1, inputs.shape[-1])
        outputs = torch.baddbmm(self.bias.unsqueeze(1), flat, self.weight.mT)
        return outputs.view(*inputs.shape[:-1], outputs.shape[-1])


class StackedLayerNorm(nn.Module):
    """``P`` independent layer norms over the last axis (Ba et al. 2016): ``weight [P, H]``, ``bias [P, H]``."""

    def __init__(self, size: int, members: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(members, size))
        self.bias = nn.Parameter(torch.zeros(members, size))

    def forward(self, inputs: Float[Tensor, "P *batch H"]) -> Float[Tensor, "P *batch H"]:
        """Normalise the last axis and apply each member's scale and shift."""
        shape = (inputs.shape[0], *([1] * (inputs.ndim - 2)), inputs.shape[-1])
        normal = functional.layer_norm(inputs, inputs.shape[-1:])
        return torch.addcmul(self.bias.view(shape), normal, self.weight.view(shape))


class StackedMLP(nn.Module):
    """Linear layers, each followed by layer norm (optional) and the activation; no layers is the identity."""

    def __init__(
        self,
        input_size: int,
        sizes: Sequence[int],
        generators: Sequence[torch.Generator],
        activation: Activation = "tanh",
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        widths = [input_size, *sizes]
        self.output_size = widths[-1]
        self.activation: Activation = activation
        self.linears = nn.ModuleList(StackedLinear(i, o, generators) for i, o in zip(widths, sizes, strict=False))
        self.norms = nn.ModuleList(StackedLayerNorm(size, len(generators)) for size in sizes if layer_norm)

    def forward(self, inputs: Float[Tensor, "P *batch I"]) -> Float[Tensor, "P *batch O"]:
        """The output of the last layer, activated."""
        outputs = inputs
        for index, linear in enumerate(self.linears):
            outputs = linear(outputs)
            if self.norms:
                outputs = self.norms[index](outputs)
            outputs = ACTIVATIONS[self.activation](outputs)
        return outputs
