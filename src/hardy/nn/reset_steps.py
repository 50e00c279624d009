"""Resets inside sequences for PyTorch's fused recurrent kernels, which know none: one step more in front of a new episode.

Two more inputs do it. One is 1 at every real step and carries the bias. The other is 1 at a reset step, whose real inputs are
0, and its weight closes gates: an LSTM's input and forget gate become exactly 0, and with them the cell and the hidden state; a
GRU's reset and update gate become 0, its candidate tanh(0), and so its hidden state. What was before cannot be felt afterwards,
nor can a gradient pass: at such a step the derivative by every weight that is the network's own is 0. (What is not finite
would be felt: `hardy.nn.recurrent` keeps such inputs and states out. Finite ones that overflow inside a row may reach the other
episodes of that row; the member's update is lost then in any case.)

So rows of one call hold sequences of several episodes without padding but at the end. An episode that begins within a sequence
may lie anywhere: where there are few sequences and their episodes are short, more and shorter rows take less time.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

CLOSED = -1e9
"""What a gate sees at a reset step: beyond what weights of any size in use can add to it, and finite."""
LENGTHS = 8
"""Rows are as long as a multiple of this: the first call with a new length costs as much as hundreds of steps."""
ENOUGH_ROWS = 8
"""Side by side; a step of more takes as much longer as there are more."""
STEP_COST = 1.3
"""What a step costs beside its rows, in the time of one row (measured: oneDNN's LSTM of 128 units, 2 to 8 rows)."""
GATES: dict[str, int] = {"lstm": 4, "gru": 3}
"""Blocks of rows in the weights: input, forget, candidate and output of the LSTM; reset, update and candidate of the GRU."""
MORE_INPUTS = 2
"""The constant that carries the bias, and the reset."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """How the steps of ``E`` sequences of ``T`` steps lie in ``R`` rows of ``L`` steps, step by step.

    Row e < E begins as sequence e does, from its state; the other rows begin with an episode.

    Attributes:
        place: for each step of each sequence, ``t * E + e``, its flat place ``l * R + r`` in the rows.
        step: the reverse, for each place; ``T * E`` at a reset step.
    """

    length: int
    width: int
    envs: int
    place: Int[Tensor, "steps"]
    step: Int[Tensor, "places"]

    def spread(self, inputs: Float[Tensor, "T E I"]) -> Float[Tensor, "L R I2"]:
        """The inputs in their places, with the two inputs of `MORE_INPUTS`; all else is reset steps."""
        moved: Tensor = _Spread.apply(inputs, self)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        return moved

    def take(self, rows: Float[Tensor, "L R H"]) -> Float[Tensor, "T E H"]:
        """What the rows hold at the places of the real steps."""
        moved: Tensor = _Take.apply(rows, self)  # type: ignore[no-untyped-call]
        return moved

    def initial(self, state: Float[Tensor, "K E H"]) -> Float[Tensor, "K R H"]:
        """States at the begin of the rows."""
        return functional.pad(state, (0, 0, 0, self.width - self.envs))


class _Spread(torch.autograd.Function):
    """`Rows.spread`; the reverse of an index in one call, which PyTorch adds up row by row."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, rows: Rows) -> Tensor:
        ctx.rows, ctx.size = rows, inputs.shape[-1]
        steps = functional.pad(inputs.flatten(0, 1), (0, MORE_INPUTS, 0, 1))
        steps[:-1, ctx.size] = 1
        steps[-1, ctx.size + 1] = 1
        return _placed(steps, rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _taken(grads[0], ctx.rows)[..., : ctx.size], None


class _Take(torch.autograd.Function):
    """`Rows.take`, likewise."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return _taken(values, rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _placed(functional.pad(grads[0].flatten(0, 1), (0, 0, 0, 1)), ctx.rows), None


def _placed(steps: Tensor, rows: Rows) -> Tensor:
    """Steps in their places; the last one, behind those of all sequences, is a reset step."""
    return steps.index_select(0, rows.step).view(rows.length, rows.width, -1)


def _taken(values: Tensor, rows: Rows) -> Tensor:
    return values.flatten(0, 1).index_select(0, rows.place).view(-1, rows.envs, values.shape[-1])


def lay_out(is_first: Bool[np.ndarray, "T E"], device: torch.device) -> Rows:
    """Rows with a reset step in front of each step with ``is_first`` but the first: there the caller resets the state."""
    steps, envs = is_first.shape
    starts = is_first.T.copy()
    starts[:, 0] = True
    begin = starts.ravel().nonzero()[0]  # of each piece of a sequence, e * T + t
    size = np.diff(begin, append=starts.size)
    continues = begin % steps == 0
    packing = _cheapest(size[continues].tolist(), size[~continues].tolist(), (begin // steps)[~continues].tolist())
    row, offset = np.empty_like(begin), np.zeros_like(begin)
    row[continues], row[~continues], offset[~continues] = np.arange(envs), packing.rows, packing.offsets
    every = np.arange(steps * envs)
    place = (every + (offset - begin).repeat(size)) * packing.width + row.repeat(size)
    place = place.reshape(envs, steps).T.ravel()
    length = _rounded(packing.length)
    step = np.full(length * packing.width, steps * envs)
    step[place] = every
    return Rows(length, packing.width, envs, torch.from_numpy(place).to(device), torch.from_numpy(step).to(device))


class _Packing(NamedTuple):
    """Pieces of sequences in ``width`` rows of ``length`` steps: the row and the first step of each that begins no sequence."""

    length: int
    width: int
    rows: list[int]
    offsets: list[int]

    @property
    def cost(self) -> float:
        """In the time of one step of one row."""
        return _cost(self.length, self.width)


def _rounded(length: int) -> int:
    return -(-length // LENGTHS) * LENGTHS


def _cost(length: int, width: int) -> float:
    return _rounded(length) * (width + STEP_COST)


def _cheapest(first: list[int], others: list[int], env: list[int]) -> _Packing:
    """The packing that takes least time among a sequence to a row and the longest first for each width.

    Args:
        first: steps of the pieces that begin rows 0 to E - 1.
        others: steps of the pieces with a reset step in front, unless they begin a row.
        env: the sequence of each of those, whose pieces follow one another in time.
    """
    envs = len(first)
    longest, taken = max([*first, *others]), sum(first) + sum(others) + len(others) + envs
    # No packing into so many rows takes less; those that begin a row save the reset step.
    least = {width: _cost(max(longest, -(-taken // width) - 1), width) for width in range(envs, max(envs, ENOUGH_ROWS) + 1)}
    packings = [_in_order(first, others, env)]
    for width in sorted(least, key=least.__getitem__):
        if min(packing.cost for packing in packings) <= least[width]:
            break
        packings.append(_longest_first(first, others, width))
    return min(packings, key=lambda packing: packing.cost)


def _in_order(first: list[int], others: list[int], env: list[int]) -> _Packing:
    """A sequence to a row."""
    ends, offsets = list(first), []
    for steps, row in zip(others, env, strict=True):
        offsets.append(ends[row] + 1)
        ends[row] += 1 + steps
    return _Packing(max(ends), len(first), env, offsets)


def _longest_first(first: list[int], others: list[int], width: int) -> _Packing:
    """Each piece into the row that is shortest so far, the longest piece first."""
    ends = [(steps, row) for row, steps in enumerate(first)] + [(-1, row) for row in range(len(first), width)]
    heapq.heapify(ends)
    rows, offsets = [0] * len(others), [0] * len(others)
    for piece in sorted(range(len(others)), key=others.__getitem__, reverse=True):
        end, row = ends[0]
        rows[piece], offsets[piece] = row, end + 1
        heapq.heapreplace(ends, (end + 1 + others[piece], row))
    return _Packing(max(ends)[0], width, rows, offsets)


@functools.lru_cache(maxsize=8)
def _closing(kind: str, size: int, like: tuple[torch.dtype, torch.device]) -> Float[Tensor, "G 1"]:
    """Weights of the reset: they close the LSTM's input and forget gate, the GRU's reset and update gate."""
    gates = torch.zeros(GATES[kind], size // GATES[kind], dtype=like[0], device=like[1])
    gates[:2] = CLOSED
    return gates.view(-1, 1)


def input_weights(kind: str, weight_ih: Float[Tensor, "G I"], bias_ih: Float[Tensor, "G"]) -> Float[Tensor, "G I2"]:
    """The weights of the inputs that `Rows.spread` makes; the kernel gets no input bias beside them."""
    closing = _closing(kind, len(bias_ih), (bias_ih.dtype, bias_ih.device))
    return torch.cat([weight_ih, bias_ih[:, None], closing], dim=1)
