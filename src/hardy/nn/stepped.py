"""A recurrence over whole sequences step by step, the whole population in each: what runs on a CUDA device.

What PyTorch's fused kernels run (`hardy.nn.reset_steps`) is planned by the host from the episode starts, and each member is a
call of its own. So it waits for the device, no graph can hold it, and P members are P sequences of calls. Here a mask resets
the state, and every step is one batched matrix product for all members and one pointwise kernel, whatever P and the
episodes: about 4 T kernels forward and 5 T backward, which a captured graph repeats without Python. Each takes a microsecond or
two at least, so a small population is bound by T; a large one by the products.

G is the 4 H gates, in PyTorch's order: input, forget, candidate, output.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def lstm_layer(
    from_input: Float[Tensor, "P T E G"],
    hidden: Float[Tensor, "P E H"],
    cell: Float[Tensor, "P E H"],
    is_first: Bool[Tensor, "P T E"],
    weight_hh: Float[Tensor, "P G H"],
) -> Float[Tensor, "P T E H"]:
    """One LSTM layer over sequences that start from a state, which is reset before every step with ``is_first``.

    Gradients flow to ``from_input`` and ``weight_hh`` and stop at the state.

    Args:
        from_input: what input and biases add to the gates.
    """
    output: Tensor = _Steps.apply(from_input, hidden, cell, is_first, weight_hh)  # type: ignore[no-untyped-call]
    return output


def cell_forward(
    from_input: Float[Tensor, "P E G"], from_hidden: Float[Tensor, "P E G"], cell: Float[Tensor, "P E H"]
) -> tuple[Float[Tensor, "P E H"], Float[Tensor, "P E H"], Float[Tensor, "P E G"]]:
    """Hidden state, cell and the gates' activations after a step: by one fused kernel on a CUDA device."""
    if from_input.is_cuda:
        flat = (from_input.flatten(0, 1), from_hidden.flatten(0, 1), cell.flatten(0, 1))
        hidden, following, gates = torch.ops.aten._thnn_fused_lstm_cell(*flat)
        return hidden.view_as(cell), following.view_as(cell), gates.view_as(from_hidden)
    size = cell.shape[-1]
    gates = from_input + from_hidden
    gates[..., : 2 * size].sigmoid_()
    gates[..., 2 * size : 3 * size].tanh_()
    gates[..., 3 * size :].sigmoid_()
    enter, forget, candidate, leave = gates.chunk(4, dim=-1)
    following = torch.addcmul(enter * candidate, forget, cell)
    return leave * following.tanh(), following, gates


def cell_backward(
    grad_hidden: Float[Tensor, "P E H"],
    grad_cell: Float[Tensor, "P E H"],
    cell: Float[Tensor, "P E H"],
    following: Float[Tensor, "P E H"],
    gates: Float[Tensor, "P E G"],
) -> tuple[Float[Tensor, "P E G"], Float[Tensor, "P E H"]]:
    """Gradients by the gates before their activation and by the cell before the step, from those by both states after it.

    Args:
        cell, following: the cell before and after the step.
        gates: as `cell_forward` returned them.
    """
    if gates.is_cuda:
        states = (tensor.flatten(0, 1) for tensor in (grad_hidden, grad_cell, cell, following, gates))
        grad_gates, before, _ = torch.ops.aten._thnn_fused_lstm_cell_backward_impl(*states, False)
        return grad_gates.view_as(gates), before.view_as(cell)
    enter, forget, candidate, leave = gates.chunk(4, dim=-1)
    bent = following.tanh()
    grad_cell = torch.addcmul(grad_cell, grad_hidden * leave, 1 - bent.square())
    grad_gates = torch.cat(
        [
            grad_cell * candidate * enter * (1 - enter),
            grad_cell * cell * forget * (1 - forget),
            grad_cell * enter * (1 - candidate.square()),
            grad_hidden * bent * leave * (1 - leave),
        ],
        dim=-1,
    )
    return grad_gates, grad_cell * forget


class _Steps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, from_input: Tensor, hidden: Tensor, cell: Tensor, is_first: Tensor, weight_hh: Tensor) -> Tensor:
        members, steps, envs, size = *from_input.shape[:3], hidden.shape[-1]
        # T first, so that what a step reads and writes lies together.
        begins = is_first.transpose(0, 1).unsqueeze(-1)
        inputs = from_input.transpose(0, 1).contiguous()
        starts, cells, outputs = (hidden.new_empty(steps, members, envs, size) for _ in range(3))
        befores, gates = torch.empty_like(cells), hidden.new_empty(steps, members, envs, 4 * size)
        for t in range(steps):
            hidden = torch.where(begins[t], torch.zeros_like(hidden), hidden, out=starts[t])
            cell = torch.where(begins[t], torch.zeros_like(cell), cell, out=befores[t])
            hidden, cell, active = cell_forward(inputs[t], torch.bmm(hidden, weight_hh.mT), cell)
            outputs[t], cells[t], gates[t] = hidden, cell, active
        ctx.save_for_backward(is_first, weight_hh, starts, befores, cells, gates)
        return outputs.transpose(0, 1).contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        is_first, weight_hh, starts, befores, cells, gates = ctx.saved_tensors
        begins = is_first.transpose(0, 1).unsqueeze(-1)
        grad_output = grad_outputs[0].transpose(0, 1)
        grad_hidden = grad_cell = zeros = torch.zeros_like(cells[0])
        grad_gates = torch.empty_like(gates)
        for t in reversed(range(len(gates))):
            found, grad_cell = cell_backward(grad_output[t] + grad_hidden, grad_cell, befores[t], cells[t], gates[t])
            grad_gates[t] = found
            grad_hidden = torch.where(begins[t], zeros, torch.bmm(found, weight_hh))
            grad_cell = torch.where(begins[t], zeros, grad_cell)
        by_member = grad_gates.transpose(0, 1)
        rows = starts.transpose(0, 1).flatten(1, 2)
        grad_weight = torch.bmm(by_member.flatten(1, 2).mT, rows)
        return by_member, None, None, None, grad_weight
