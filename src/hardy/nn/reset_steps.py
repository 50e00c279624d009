"""Resets inside sequences for PyTorch's fused recurrent kernels, which know none: one step more in front of a new episode.

Two more inputs do it. One is 1 at every real step and carries the bias. The other is 1 at a reset step, whose real inputs are
0, and its weight closes gates: an LSTM's input and forget gate become exactly 0, and with them the cell and the hidden state; a
GRU's reset and update gate become 0, its candidate tanh(0), and so its hidden state. What was before cannot be felt afterwards,
nor can a gradient pass: at such a step the derivative by every weight that is the network's own is 0.

So P·E sequences of T steps are rows of T steps and one for each reset, all in one call without padding but at the end.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

CLOSED = -1e9
"""What a gate sees at a reset step: beyond what weights of any size in use can add to it, and finite."""
LENGTHS = 8
"""Rows are as long as a multiple of this: the first call with a new length costs as much as hundreds of steps."""
GATES: dict[str, int] = {"lstm": 4, "gru": 3}
"""Blocks of rows in the weights: input, forget, candidate and output of the LSTM; reset, update and candidate of the GRU."""
MORE_INPUTS = 2
"""The constant that carries the bias, and the reset."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """How ``E`` sequences of ``T`` steps lie in rows of ``length`` steps, step by step.

    Attributes:
        place: for each step of each sequence, ``t * E + e``, its flat place ``l * E + e`` in the rows.
    """

    length: int
    envs: int
    place: Int[Tensor, "steps"]

    def spread(self, inputs: Float[Tensor, "T E I"]) -> Float[Tensor, "L E I2"]:
        """The inputs in their places, with the two inputs of `MORE_INPUTS`; all else is reset steps."""
        size = inputs.shape[-1]
        rows = inputs.new_zeros(self.length * self.envs, size + MORE_INPUTS)
        rows[:, size + 1] = 1
        real = functional.pad(inputs.flatten(0, 1), (0, MORE_INPUTS))
        real[:, size] = 1
        return rows.index_copy_(0, self.place, real).view(self.length, self.envs, -1)

    def take(self, rows: Float[Tensor, "L E H"]) -> Float[Tensor, "T E H"]:
        """What the rows hold at the places of the real steps."""
        return rows.flatten(0, 1).index_select(0, self.place).view(-1, self.envs, rows.shape[-1])

    def put(self, values: Float[Tensor, "T E H"]) -> Float[Tensor, "L E H"]:
        """The reverse of `take`, zeros elsewhere."""
        rows = values.new_zeros(self.length * self.envs, values.shape[-1])
        rows.index_copy_(0, self.place, values.flatten(0, 1))
        return rows.view(self.length, self.envs, -1)


def lay_out(is_first: Bool[np.ndarray, "T E"], device: torch.device) -> Rows:
    """Room for a reset step in front of each step with ``is_first`` but the first: there the caller resets the state."""
    steps, envs = is_first.shape
    resets = np.zeros((steps, envs), dtype=np.int64)
    np.cumsum(is_first[1:], axis=0, out=resets[1:])
    place = (np.arange(steps)[:, None] + resets) * envs + np.arange(envs)
    length = steps + int(resets[-1].max())
    return Rows(-(-length // LENGTHS) * LENGTHS, envs, torch.from_numpy(place.ravel()).to(device))


def input_weights(kind: str, weight_ih: Float[Tensor, "G I"], bias_ih: Float[Tensor, "G"]) -> Float[Tensor, "G I2"]:
    """The weights of the inputs that `Rows.spread` makes; the kernel gets no input bias beside them."""
    closing = torch.zeros_like(bias_ih)
    for gate in closing.chunk(GATES[kind])[:2]:  # the LSTM's input and forget gate, the GRU's reset and update gate
        gate.fill_(CLOSED)
    return torch.cat([weight_ih, bias_ih[:, None], closing[:, None]], dim=1)
