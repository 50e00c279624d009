"""The recurrence of `hardy.nn.stepped` as two Triton kernels: a whole sequence in one launch forward and one backward.

A program takes some environments of one member through all T steps. Each step reads what the input adds to the gates and the
recurrent weights, which a cache can hold, and writes what the backward pass needs. The weights' gradient is one batched product
afterwards. So a sequence costs a few launches, whatever T.

A step's product goes part by part through the sum, so that the weights of a wide layer need not fit into a program at once.
Since registers cannot be indexed, it reads the states (forward) and the gates' gradients (backward) again from where they were
just written; a barrier stands in between.

The kernels have been run in Triton's interpreter only, and compiled, but never run on a graphics card. That is why
`hardy.nn.lstm_choice` checks the first call of each shape against the stepped path, and uses them only where they agree with it
and are faster.

Triton is optional, so this module is imported only inside functions. With TRITON_INTERPRET=1 in the environment at that moment,
its kernels take tensors on the CPU.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float
from torch import Tensor

from hardy.nn.lstm_choice import LARGEST, reduced_precision

SMALLEST_BLOCK = 16
"""Rows and columns that `tl.dot` needs at least."""
LARGEST_BLOCK = 64
ENTRIES = 4096
"""Of one gate in a program, at most: 16 for each of 256 threads, which with four gates and the cell fit into its registers."""
PROGRAMS = 128
"""About as many as a large card runs side by side; only beyond that is it worth it that a program takes more environments."""
PART = 16
"""Terms of a product that are read at once: the fewest that `tl.dot` takes, so that they fill the fewest registers."""


def lstm_layer(
    from_input: Float[Tensor, "P T E G"],
    hidden: Float[Tensor, "P E H"],
    cell: Float[Tensor, "P E H"],
    is_first: Bool[Tensor, "P T E"],
    weight_hh: Float[Tensor, "P G H"],
) -> Float[Tensor, "P T E H"]:
    """What `hardy.nn.stepped.lstm_layer` computes, for float32 and H of at most `hardy.nn.lstm_choice.LARGEST`.

    Gradients flow to ``from_input`` and ``weight_hh`` and stop at the state.

    Args:
        from_input: what input and biases add to the gates.

    Raises:
        ValueError: a tensor is not of float32, or H is too large.
    """
    for name, tensor in (("from_input", from_input), ("hidden", hidden), ("cell", cell), ("weight_hh", weight_hh)):
        if tensor.dtype is not torch.float32:
            raise ValueError(f"{name} is of {tensor.dtype}: the kernels take torch.float32")
    if hidden.shape[-1] > LARGEST:
        raise ValueError(f"the hidden state has {hidden.shape[-1]} entries: the kernels take at most {LARGEST}")
    output: Tensor = _Sequence.apply(from_input, hidden, cell, is_first, weight_hh)  # type: ignore[no-untyped-call]
    return output


def blocks(members: int, envs: int, size: int) -> tuple[int, int, int]:
    """Environments of a program, columns of a state (both powers of two, padded), and warps.

    More environments share each weight that is read, as long as there remain programs for the whole card.
    """
    columns = max(SMALLEST_BLOCK, triton.next_power_of_2(size))
    rows = SMALLEST_BLOCK
    while 2 * rows <= min(LARGEST_BLOCK, ENTRIES // columns) and members * triton.cdiv(envs, 2 * rows) >= PROGRAMS:
        rows *= 2
    return rows, columns, 4 if rows * columns <= ENTRIES // 2 else 8


# The import hook of the tests would wrap what Triton has to read as source; no_type_check keeps it away.
# Of Triton only what is built in: tl.sigmoid and tl.zeros are kernels themselves, which the interpreter refuses if Triton was
# imported before TRITON_INTERPRET was set.
@no_type_check
@triton.jit
def _sigmoid(x):
    small = tl.exp(-tl.abs(x))  # never above 1
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


# Written out, since the interpreter has no libdevice. The quotient loses its leading digits near 0; there the series, whose
# next term is below 1e-8 of the value.
@no_type_check
@triton.jit
def _tanh(x):
    small = tl.exp(-2.0 * tl.abs(x))
    away = (1.0 - small) / (1.0 + small)
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -away, away))


@no_type_check
@triton.jit
def _forward(
    from_input, hidden, cell, is_first, weight, outputs, cells, gates, steps, envs,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PART: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    member = tl.program_id(1).to(tl.int64)  # all offsets follow from it: P T E 4 H may be above 2**31
    env = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    in_rows, in_columns = env < envs, column < SIZE
    inside = in_rows[:, None] & in_columns[None, :]
    initial = (member * envs + env)[:, None] * SIZE
    c = tl.load(cell + initial + column[None, :], mask=inside, other=0.0)
    for t in range(steps):
        row = (member * steps + t) * envs + env
        begins = tl.load(is_first + row, mask=in_rows, other=0)[:, None] != 0
        at = row[:, None] * (4 * SIZE) + column[None, :]
        enter = tl.load(from_input + at, mask=inside, other=0.0)
        forget = tl.load(from_input + at + SIZE, mask=inside, other=0.0)
        candidate = tl.load(from_input + at + 2 * SIZE, mask=inside, other=0.0)
        leave = tl.load(from_input + at + 3 * SIZE, mask=inside, other=0.0)
        for first in range(0, SIZE, PART):
            part = first + tl.arange(0, PART)
            there = in_rows[:, None] & (part < SIZE)[None, :]
            previous = outputs + (row - envs)[:, None] * SIZE + part[None, :]
            h = tl.load(previous, mask=there & (t > 0), other=0.0)
            h += tl.load(hidden + initial + part[None, :], mask=there & (t == 0), other=0.0)
            h = tl.where(begins, 0.0, h)
            # Transposed: rows are entries of the hidden state, columns those of a gate.
            own = weight + member * (4 * SIZE * SIZE) + column[None, :] * SIZE + part[:, None]
            square = (part < SIZE)[:, None] & in_columns[None, :]
            enter = tl.dot(h, tl.load(own, mask=square, other=0.0), enter, input_precision=PRECISION)
            own += SIZE * SIZE
            forget = tl.dot(h, tl.load(own, mask=square, other=0.0), forget, input_precision=PRECISION)
            own += SIZE * SIZE
            candidate = tl.dot(h, tl.load(own, mask=square, other=0.0), candidate, input_precision=PRECISION)
            own += SIZE * SIZE
            leave = tl.dot(h, tl.load(own, mask=square, other=0.0), leave, input_precision=PRECISION)
        enter, forget, candidate, leave = _sigmoid(enter), _sigmoid(forget), _tanh(candidate), _sigmoid(leave)
        c = forget * tl.where(begins, 0.0, c) + enter * candidate
        tl.store(gates + at, enter, mask=inside)
        tl.store(gates + at + SIZE, forget, mask=inside)
        tl.store(gates + at + 2 * SIZE, candidate, mask=inside)
        tl.store(gates + at + 3 * SIZE, leave, mask=inside)
        at = row[:, None] * SIZE + column[None, :]
        tl.store(cells + at, c, mask=inside)
        tl.store(outputs + at, leave * _tanh(c), mask=inside)
        tl.debug_barrier()  # the next step reads the outputs in other threads than those which wrote them


@no_type_check
@triton.jit
def _backward(
    grad_output, gates, cells, cell, is_first, weight, grad_gates, steps, envs,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PART: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    member = tl.program_id(1).to(tl.int64)
    env = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    in_rows, in_columns = env < envs, column < SIZE
    inside = in_rows[:, None] & in_columns[None, :]
    dh = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    dc = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    row = (member * steps + steps - 1) * envs + env
    after = tl.load(cells + row[:, None] * SIZE + column[None, :], mask=inside, other=0.0)
    for back in range(steps):
        t = steps - 1 - back
        row = (member * steps + t) * envs + env
        begins = tl.load(is_first + row, mask=in_rows, other=0)[:, None] != 0
        # The cell before the step: that after the step before, or the state's at the very beginning. The step's number fills a
        # block, since the interpreter makes no mask of a block and a number.
        step = t + tl.full((ROWS, 1), 0, tl.int32)
        kept = tl.load(cells + (row - envs)[:, None] * SIZE + column[None, :], mask=inside & (step > 0), other=0.0)
        initial = (member * envs + env)[:, None] * SIZE + column[None, :]
        kept += tl.load(cell + initial, mask=inside & (step == 0), other=0.0)
        at = row[:, None] * (4 * SIZE) + column[None, :]
        enter = tl.load(gates + at, mask=inside, other=0.0)
        forget = tl.load(gates + at + SIZE, mask=inside, other=0.0)
        candidate = tl.load(gates + at + 2 * SIZE, mask=inside, other=0.0)
        leave = tl.load(gates + at + 3 * SIZE, mask=inside, other=0.0)
        dh += tl.load(grad_output + row[:, None] * SIZE + column[None, :], mask=inside, other=0.0)
        bent = _tanh(after)
        dc += dh * leave * (1.0 - bent * bent)
        tl.store(grad_gates + at, dc * candidate * enter * (1.0 - enter), mask=inside)
        tl.store(grad_gates + at + SIZE, dc * tl.where(begins, 0.0, kept) * forget * (1.0 - forget), mask=inside)
        tl.store(grad_gates + at + 2 * SIZE, dc * enter * (1.0 - candidate * candidate), mask=inside)
        tl.store(grad_gates + at + 3 * SIZE, dh * bent * leave * (1.0 - leave), mask=inside)
        tl.debug_barrier()  # the products read them in other threads than those which wrote them
        dh = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
        for first in range(0, 4 * SIZE, PART):
            part = first + tl.arange(0, PART)  # of the four gates' entries, one after the other
            there = in_rows[:, None] & (part < 4 * SIZE)[None, :]
            found = tl.load(grad_gates + row[:, None] * (4 * SIZE) + part[None, :], mask=there, other=0.0)
            own = weight + (member * (4 * SIZE) + part)[:, None] * SIZE + column[None, :]
            w = tl.load(own, mask=(part < 4 * SIZE)[:, None] & in_columns[None, :], other=0.0)
            dh = tl.dot(found, w, dh, input_precision=PRECISION)
        dh = tl.where(begins, 0.0, dh)
        dc = tl.where(begins, 0.0, dc * forget)
        after = kept


def _packed(tensor: Tensor) -> Tensor:
    """Contiguous, from an address that wide reads may start at: any other needs a kernel more compiled, maybe in a capture."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _launch(kernel: Any, tensors: tuple[Tensor, ...], members: int, steps: int, envs: int, size: int) -> None:
    rows, columns, warps = blocks(members, envs, size)
    with torch.cuda.device_of(tensors[0]):  # Triton launches on the current device
        # One stage, that is, no read of a later part moves before a barrier. Fusion as Triton's default used to be; it warns
        # where it is not told.
        kernel[(triton.cdiv(envs, rows), members)](
            *tensors, steps, envs, SIZE=size, ROWS=rows, COLUMNS=columns, PART=PART,
            PRECISION="tf32" if reduced_precision() else "ieee", num_warps=warps, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip


class _Sequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, from_input: Tensor, hidden: Tensor, cell: Tensor, is_first: Tensor, weight_hh: Tensor) -> Tensor:
        given = [_packed(tensor) for tensor in (from_input, hidden, cell, is_first, weight_hh)]
        from_input, hidden, cell, is_first, weight_hh = given
        sizes = (*is_first.shape, hidden.shape[-1])
        outputs, cells, gates = hidden.new_empty(sizes), hidden.new_empty(sizes), torch.empty_like(from_input)
        tensors = (from_input, hidden, cell, is_first.view(torch.uint8), weight_hh, outputs, cells, gates)
        _launch(_forward, tensors, *sizes)
        ctx.save_for_backward(hidden, cell, is_first, weight_hh, outputs, cells, gates)
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, cell, is_first, weight_hh, outputs, cells, gates = ctx.saved_tensors
        grad_gates = torch.empty_like(gates)
        tensors = (_packed(grad_outputs[0]), gates, cells, cell, is_first.view(torch.uint8), weight_hh, grad_gates)
        _launch(_backward, tensors, *outputs.shape)
        if not ctx.needs_input_grad[4]:
            return grad_gates, None, None, None, None
        before = torch.cat([hidden.unsqueeze(1), outputs[:, :-1]], dim=1).masked_fill(is_first.unsqueeze(-1), 0.0)
        grad_weight = torch.bmm(grad_gates.flatten(1, 2).mT, before.flatten(1, 2))
        return grad_gates, None, None, None, grad_weight
