"""The LSTM over whole sequences in the compiled library, for float32 on the CPU.

The library is built when Hardy is installed, if there is a C++ compiler that can. This part of it, `_recurrence.cpp`, cuts the
sequences at their episode starts and runs the pieces side by side without padding, one call for all members and threads,
forward or backward, and releases the interpreter lock. Without it, or with ``HARDY_COMPILED=0`` in the environment, PyTorch's
kernels give the same results.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hardy.compiled import NEWEST_INSTRUCTIONS, Function

VERSION = 3
"""Of `_Problem`; a library built from sources of another version is not used."""
SMALLEST_PART = 2_000_000
"""Multiplications below which a part of a layer's forward pass is not worth a thread (measured)."""


class _Problem(ctypes.Structure):
    """What a call works on; mirrors `Problem` in `_recurrence.cpp`, which explains the fields."""

    _sizes = "members steps envs inputs hidden state_stride parts threads level"
    _tensors = (
        "x is_first state_hidden state_cell weight_ih weight_hh bias_ih bias_hh output gates cell "
        "grad_output grad_x grad_weight_ih grad_weight_hh grad_bias"
    )
    _fields_ = [*((name, ctypes.c_int64) for name in _sizes.split()), *((name, ctypes.c_void_p) for name in _tensors.split())]


_lstm = Function("hardy_lstm", VERSION)
available = _lstm.available


def supports(*tensors: Tensor) -> bool:
    """Whether the library can be used on inputs, state and weights like these: float32 on the CPU."""
    return available() and all(tensor.dtype is torch.float32 and tensor.device.type == "cpu" for tensor in tensors)


def lstm_layer(
    inputs: Float[Tensor, "P T E I"],
    state: Float[Tensor, "P E S"],
    is_first: Bool[Tensor, "P T E"],
    layer: int,
    weights: Sequence[Tensor],
    threads: int,
    level: int = NEWEST_INSTRUCTIONS,
) -> Float[Tensor, "P T E H"]:
    """One layer of an LSTM over sequences that start from ``state``, which is reset before every step with ``is_first``.

    Gradients flow to the inputs and the weights and stop at ``state``.

    Args:
        state: of all layers: the hidden vectors of each, then the cell vectors of each.
        layer: whose state to take.
        weights: ``weight_ih [P, 4 H, I]``, ``weight_hh [P, 4 H, H]``, ``bias_ih [P, 4 H]``, ``bias_hh [P, 4 H]``.
        threads: at most that many; they change no result, gradients included.
        level: the newest instruction set to use, 0 for what every CPU has; newer ones are used only where they exist.

    Raises:
        ValueError: the shapes do not belong together.
        MemoryError: no memory for the working space.
    """
    _check_shapes(inputs, state, is_first, layer, weights)
    tensors = [tensor.contiguous() for tensor in (inputs, state.detach(), is_first.bool(), *weights)]
    hidden = weights[1].shape[2]
    places = layer * hidden, (state.shape[2] // hidden // 2 + layer) * hidden
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        output: Tensor = _Layer.apply(places, threads, level, *tensors)  # type: ignore[no-untyped-call]  # not annotated
        return output
    return LSTMCall(places, threads, level, tensors).forward(empty)[0]


def _check_shapes(inputs: Tensor, state: Tensor, is_first: Tensor, layer: int, weights: Sequence[Tensor]) -> None:
    # The library follows bare addresses: what would be an error in PyTorch would be somebody else's memory here.
    members, steps, envs, width = inputs.shape
    hidden = weights[1].shape[-1]
    wanted = [(members, 4 * hidden, width), (members, 4 * hidden, hidden), (members, 4 * hidden), (members, 4 * hidden)]
    if [tuple(weight.shape) for weight in weights] != wanted:
        raise ValueError(
            f"weights of shapes {[tuple(weight.shape) for weight in weights]}: inputs and hidden size want {wanted}"
        )
    if is_first.shape != (members, steps, envs):
        raise ValueError(f"is_first of shape {tuple(is_first.shape)}: inputs want {(members, steps, envs)}")
    if (
        state.shape[:-1] != (members, envs)
        or state.shape[-1] % (2 * hidden)
        or not 0 <= layer < state.shape[-1] // (2 * hidden)
    ):
        raise ValueError(
            f"state of shape {tuple(state.shape)}: layer {layer} wants {(members, envs)} and at least {layer + 1} times "
            f"2 * {hidden} numbers"
        )


Empty = Callable[..., Tensor]
"""A shape to a tensor of float32 that holds any numbers, as `empty`."""


def empty(*shape: int) -> Tensor:
    """What the library can write to, whatever the user's default dtype and device."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


class LSTMCall:
    """One layer's sizes and addresses, as the library wants them.

    Args:
        places: where in the state of an environment its hidden and its cell vector begin.
        threads, level: as for `lstm_layer`.
        tensors: inputs, state, ``is_first`` and the four weights, of shapes that belong together and without gaps in memory.
    """

    def __init__(self, places: tuple[int, int], threads: int, level: int, tensors: Sequence[Tensor]) -> None:
        self.inputs, state, is_first, *self.weights = tensors
        members, steps, envs, width = self.inputs.shape
        hidden = self.weights[1].shape[2]
        work = steps * envs * 4 * hidden * (width + hidden)
        useful = max(1, min(threads, members * work // SMALLEST_PART))
        # As many tasks as can be shared out evenly; of many members, one task each comes close enough.
        parts = 1 if members >= 4 * useful else useful // math.gcd(members, useful)
        self.problem = _Problem(
            *(members, steps, envs, width, hidden, state.shape[2], parts, useful, level),
            x=self.inputs.data_ptr(),
            is_first=is_first.data_ptr(),
            state_hidden=state.data_ptr() + places[0] * state.itemsize,
            state_cell=state.data_ptr() + places[1] * state.itemsize,
        )
        for name, weight in zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), self.weights, strict=True):
            setattr(self.problem, name, weight.data_ptr())

    def run(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            setattr(self.problem, name, tensor.data_ptr())
        _lstm(self.problem, lambda: f"the LSTM over inputs of shape {tuple(self.inputs.shape)}")

    def forward(self, empty: Empty) -> tuple[Tensor, Tensor, Tensor]:
        """The outputs, and what `backward` needs besides: activated gates and cell vectors."""
        members, steps, envs, _ = self.inputs.shape
        hidden = self.problem.hidden
        output, gates, cell = (empty(members, steps, envs, width * hidden) for width in (1, 4, 1))
        self.restore((output, gates, cell))
        return output, gates, cell

    def restore(self, made: Sequence[Tensor]) -> None:
        """Fill once more what `forward` returned, before another `backward`: a graph may be kept."""
        output, gates, cell = made
        self.run(output=output, gates=gates, cell=cell)

    def backward(
        self, made: Sequence[Tensor], grad_output: Tensor, empty: Empty, grad_x: Tensor | None, adds: bool = False
    ) -> list[Tensor]:
        """Gradients of the four weights; those of the inputs are written into ``grad_x`` where that is given, or added to it.

        Args:
            made: what `forward` returned. The gates are written over with their gradients: that much less passes through the
                caches.
        """
        written = grad_x if grad_x is None or not adds else empty(*self.inputs.shape)
        grads = [torch.empty_like(weight) for weight in self.weights[:3]]
        optional = {} if written is None else {"grad_x": written}
        output, gates, cell = made
        self.run(
            output=output, gates=gates, cell=cell, grad_output=grad_output,
            grad_weight_ih=grads[0], grad_weight_hh=grads[1], grad_bias=grads[2], **optional,
        )  # fmt: skip
        if grad_x is not None and written is not None and adds:
            grad_x += written
        # Both biases have the same gradient, but not the same memory: who scales gradients in place must not do it twice.
        return [*grads, grads[2].clone()]


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, places: tuple[int, int], threads: int, level: int, *tensors: Tensor) -> Tensor:
        ctx.places, ctx.threads, ctx.level, ctx.spent = places, threads, level, False
        output, gates, cell = LSTMCall(places, threads, level, tensors).forward(empty)
        ctx.save_for_backward(*tensors, output, gates, cell)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, output, gates, cell = ctx.saved_tensors
        grad_x = torch.empty_like(tensors[0]) if ctx.needs_input_grad[3] else None
        call = LSTMCall(ctx.places, ctx.threads, ctx.level, tensors)
        if ctx.spent:
            call.restore((output, gates, cell))
        ctx.spent = True
        grads = call.backward((output, gates, cell), grad_outputs[0].contiguous(), empty, grad_x)
        return (None, None, None, grad_x, None, None, *grads)
