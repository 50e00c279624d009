"""Stacked LSTM and GRU with exact resets inside a sequence.

One step (`StackedRecurrent.step`) runs the whole population on the stacked axis. On a CUDA device so does a sequence
(`StackedRecurrent.forward`), step by step (see `hardy.nn.stepped`). On the CPU it runs as rows (see `hardy.nn.rows`), members
and parts of the environments in threads: the LSTM in float32 through Hardy's compiled library where there is one (see
`hardy.nn.compiled`), everything else through PyTorch's fused kernels.

The recurrent state of one environment is one vector of ``state_size`` numbers: the hidden vectors of all layers, then,
for the LSTM, the cell vectors. Zero is the initial state.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hardy.nn import compiled, stepped
from hardy.nn.rows import RowGroup, plan_rows
from hardy.parallel import WorkerPool, pool

CellKind = Literal["lstm", "gru"]
GATES: dict[str, int] = {"lstm": 4, "gru": 3}
STEPPED = ("cuda",)
"""Types of devices on which a sequence runs step by step."""
WORTH_THREADS = 200_000_000
"""Multiplications of a forward pass, of all members and layers, below which Python threads cost more than they give."""


class StackedRecurrent(nn.Module):
    """``P`` independent LSTMs or GRUs of the same size; parameters as in `torch.nn.LSTM` with P in front.

    Args:
        kind: "lstm" (Hochreiter & Schmidhuber 1997, with forget gate) or "gru" (Cho et al. 2014, PyTorch's variant).
        input_size: width of the input.
        hidden_size: width of the hidden state H.
        layers: number of layers, each fed with the output of the one below.
        generators: one random generator per member, for the initial weights.

    Weights start orthogonal for each gate, those of an input narrower than H scaled by √(H/I): a unit's drive then has the
    size of the input's entries. Biases start at zero, but for the LSTM's forget gate, which starts at 1
    (Jozefowicz et al. 2015, section 3): an agent that forgets by default has to learn to remember before it can learn.
    """

    def __init__(
        self, kind: CellKind, input_size: int, hidden_size: int, layers: int, generators: Sequence[torch.Generator]
    ) -> None:
        super().__init__()
        self.kind = kind
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.layers = layers
        self.state_size = layers * hidden_size * (2 if kind == "lstm" else 1)
        members, gates = len(generators), GATES[kind]
        for layer in range(layers):
            width = input_size if layer == 0 else hidden_size
            self.register_parameter(f"weight_ih_l{layer}", nn.Parameter(torch.empty(members, gates * hidden_size, width)))
            self.register_parameter(f"weight_hh_l{layer}", nn.Parameter(torch.empty(members, gates * hidden_size, hidden_size)))
            self.register_parameter(f"bias_ih_l{layer}", nn.Parameter(torch.zeros(members, gates * hidden_size)))
            self.register_parameter(f"bias_hh_l{layer}", nn.Parameter(torch.zeros(members, gates * hidden_size)))
        self._initialise(generators)

    @torch.no_grad()
    def _initialise(self, generators: Sequence[torch.Generator]) -> None:
        for layer in range(self.layers):
            weight_ih, weight_hh, bias_ih, _ = self.layer_weights(layer)
            for member, generator in enumerate(generators):
                for weight in (weight_ih, weight_hh):
                    for gate in weight[member].chunk(GATES[self.kind]):
                        # Orthogonal columns of length 1 would spread a narrow input thin over many units.
                        gain = math.sqrt(max(1.0, gate.shape[0] / gate.shape[1]))
                        nn.init.orthogonal_(gate, gain=gain, generator=generator)
            if self.kind == "lstm":
                bias_ih[:, self.hidden_size : 2 * self.hidden_size] = 1.0

    def layer_weights(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``weight_ih [P, G*H, I]``, ``weight_hh [P, G*H, H]``, ``bias_ih [P, G*H]``, ``bias_hh [P, G*H]`` of one layer."""
        return (
            self.get_parameter(f"weight_ih_l{layer}"),
            self.get_parameter(f"weight_hh_l{layer}"),
            self.get_parameter(f"bias_ih_l{layer}"),
            self.get_parameter(f"bias_hh_l{layer}"),
        )

    def step(
        self, inputs: Float[Tensor, "P E I"], state: Float[Tensor, "P E S"]
    ) -> tuple[Float[Tensor, "P E H"], Float[Tensor, "P E S"]]:
        """One time step of every environment of every member. The caller has reset the state where an episode starts."""
        parts = list(state.split(self.hidden_size, dim=-1))
        output = inputs
        for layer in range(self.layers):
            weight_ih, weight_hh, bias_ih, bias_hh = self.layer_weights(layer)
            hidden = parts[layer]
            from_input = torch.baddbmm(bias_ih.unsqueeze(1), output, weight_ih.mT)
            if self.kind == "lstm":
                gates = torch.baddbmm(bias_hh.unsqueeze(1) + from_input, hidden, weight_hh.mT)
                output, parts[self.layers + layer] = _lstm_cell(gates, parts[self.layers + layer])
            else:
                output = _gru_cell(from_input, torch.baddbmm(bias_hh.unsqueeze(1), hidden, weight_hh.mT), hidden)
            parts[layer] = output
        return output, torch.cat(parts, dim=-1)

    def forward(
        self, inputs: Float[Tensor, "P T E I"], state: Float[Tensor, "P E S"], is_first: Bool[Tensor, "P T E"]
    ) -> Float[Tensor, "P T E H"]:
        """Outputs of whole sequences that start from ``state``, which is reset before every step with ``is_first``.

        Gradients flow to the inputs and the weights and stop at ``state`` (truncated backpropagation through time).
        """
        if inputs.device.type in STEPPED:
            return self._forward_by_steps(inputs, state.detach(), is_first)
        weights = [weight for layer in range(self.layers) for weight in self.layer_weights(layer)]
        if self.kind == "lstm" and compiled.supports(inputs, state, *weights):
            output = inputs
            for layer in range(self.layers):
                output = compiled.lstm_layer(output, state, is_first, layer, self.layer_weights(layer), pool().threads)
            return output
        return self._forward_by_torch(inputs, state, is_first, weights)

    def _forward_by_steps(self, inputs: Tensor, state: Tensor, is_first: Tensor) -> Tensor:
        parts, output = state.split(self.hidden_size, dim=-1), inputs
        for layer in range(self.layers):
            weight_ih, weight_hh, bias_ih, bias_hh = self.layer_weights(layer)
            hidden = parts[layer]
            if self.kind == "lstm":
                from_input = torch.baddbmm((bias_ih + bias_hh).unsqueeze(1), output.flatten(1, 2), weight_ih.mT)
                from_input = from_input.unflatten(1, output.shape[1:3])
                output = stepped.lstm_layer(from_input, hidden, parts[self.layers + layer], is_first, weight_hh)
                continue
            from_input = torch.baddbmm(bias_ih.unsqueeze(1), output.flatten(1, 2), weight_ih.mT).unflatten(1, output.shape[1:3])
            outputs = []
            for step, begins in zip(from_input.unbind(1), is_first.unsqueeze(-1).unbind(1), strict=True):
                hidden = torch.where(begins, 0.0, hidden)
                hidden = _gru_cell(step, torch.baddbmm(bias_hh.unsqueeze(1), hidden, weight_hh.mT), hidden)
                outputs.append(hidden)
            output = torch.stack(outputs, dim=1)
        return output

    def _forward_by_torch(self, inputs: Tensor, state: Tensor, is_first: Tensor, weights: list[Tensor]) -> Tensor:
        work = is_first[0].numel() * sum(weight.numel() for weight in weights)
        workers = pool() if work >= WORTH_THREADS else WorkerPool(1)
        tasks = _plan_tasks(is_first, workers.threads, inputs.device)
        if torch.is_grad_enabled() and (inputs.requires_grad or any(weight.requires_grad for weight in weights)):
            output: Tensor = _RowsFunction.apply(  # type: ignore[no-untyped-call]  # torch leaves it unannotated
                self._run_group, workers, tasks, inputs.contiguous(), state.detach(), *weights
            )
            return output
        flat = inputs.detach().flatten(1, 2)
        output = inputs.new_empty(flat.shape[0], flat.shape[1], self.hidden_size)

        def run(index: int) -> None:
            member, group = tasks[index]
            with torch.no_grad():
                rows, initial = _gather(group, flat[member], state[member])
                _scatter(group, self._run_group(rows, initial, [weight[member] for weight in weights]), output[member])

        workers.map(run, len(tasks))
        return output.view(*inputs.shape[:3], self.hidden_size)

    def _run_group(
        self, rows: Float[Tensor, "L B I"], initial: Float[Tensor, "B S"], weights: Sequence[Tensor]
    ) -> Float[Tensor, "L B H"]:
        states = initial.unflatten(1, (-1, self.hidden_size)).transpose(0, 1).contiguous()
        arguments: tuple[Any, ...] = (list(weights), True, self.layers, 0.0, True, False, False)
        if self.kind == "lstm":
            hidden, cell = states.split(self.layers)
            return torch.lstm(rows, (hidden, cell), *arguments)[0]
        return torch.gru(rows, states, *arguments)[0]


def _lstm_cell(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    size = cell.shape[-1]
    # Input and forget gate lie side by side: one call for both, since a step is bound by the number of calls.
    input_forget, candidate, output_gate = gates.split([2 * size, size, size], dim=-1)
    input_gate, forget_gate = torch.sigmoid(input_forget).split(size, dim=-1)
    cell = torch.addcmul(input_gate * torch.tanh(candidate), forget_gate, cell)
    return torch.sigmoid(output_gate) * torch.tanh(cell), cell


def _gru_cell(from_input: Tensor, from_hidden: Tensor, hidden: Tensor) -> Tensor:
    input_reset, input_update, input_new = from_input.chunk(3, dim=-1)
    hidden_reset, hidden_update, hidden_new = from_hidden.chunk(3, dim=-1)
    new = torch.tanh(input_new + torch.sigmoid(input_reset + hidden_reset) * hidden_new)
    return torch.lerp(new, hidden, torch.sigmoid(input_update + hidden_update))


Task = tuple[int, RowGroup]


def _plan_tasks(is_first: Tensor, threads: int, device: torch.device) -> list[Task]:
    """One task per member and group of rows, of each part of the environments; longest first, so that threads end together."""
    members, _, envs = is_first.shape
    starts = is_first.cpu().numpy()
    parts = min(envs, max(1, math.ceil(threads / members)))
    bounds = [envs * part // parts for part in range(parts + 1)]
    tasks = [
        (member, group)
        for member in range(members)
        for low, high in itertools.pairwise(bounds)
        for group in plan_rows(starts[member], low, high, device)
    ]
    return sorted(tasks, key=lambda task: -task[1].length * task[1].rows)


def _gather(group: RowGroup, flat: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    rows = flat.index_select(0, group.gather).view(group.length, group.rows, flat.shape[1])
    initial = state.new_zeros(group.rows, state.shape[1])
    if len(group.env):
        initial.index_copy_(0, group.continues, state.index_select(0, group.env))
    return rows, initial


def _scatter(group: RowGroup, rows: Tensor, flat: Tensor) -> None:
    values = rows.flatten(0, 1)
    flat.index_copy_(0, group.target, values if group.kept is None else values.index_select(0, group.kept))


class _RowsFunction(torch.autograd.Function):
    """Runs the groups of rows in threads, forward and backward; each keeps a graph of its own in between."""

    @staticmethod
    def forward(
        ctx: Any, run_group: Callable[..., Tensor], workers: WorkerPool, tasks: list[Task], inputs: Tensor, state: Tensor,
        *weights: Tensor,
    ) -> Tensor:  # fmt: skip
        flat = inputs.flatten(1, 2)
        leaves = [[weight[member].detach().requires_grad_() for weight in weights] for member in range(inputs.shape[0])]

        def run(index: int) -> tuple[Tensor, Tensor]:
            member, group = tasks[index]
            rows, initial = _gather(group, flat[member], state[member])
            with torch.enable_grad():
                rows.requires_grad_()
                return rows, run_group(rows, initial, leaves[member])

        ctx.graphs = workers.map(run, len(tasks))
        ctx.leaves = leaves
        ctx.tasks = tasks
        ctx.workers = workers
        ctx.shape = inputs.shape
        output = inputs.new_empty(flat.shape[0], flat.shape[1], ctx.graphs[0][1].shape[-1])
        for (member, group), (_, rows) in zip(tasks, ctx.graphs, strict=True):
            _scatter(group, rows.detach(), output[member])
        return output.view(*inputs.shape[:3], output.shape[-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_flat = grad_outputs[0].contiguous().flatten(1, 2)
        grad_inputs = grad_flat.new_empty(*grad_flat.shape[:2], ctx.shape[-1])

        def run(index: int) -> tuple[Tensor, ...]:
            member, group = ctx.tasks[index]
            rows, output = ctx.graphs[index]
            grad = grad_flat[member].index_select(0, group.target)
            if group.kept is not None:
                grad = grad.new_zeros(group.length * group.rows, grad.shape[1]).index_copy_(0, group.kept, grad)
            grads = torch.autograd.grad(output, [rows, *ctx.leaves[member]], grad.view_as(output))
            _scatter(group, grads[0], grad_inputs[member])
            return grads[1:]

        per_task = ctx.workers.map(run, len(ctx.tasks))
        grad_weights = [weight.new_zeros(len(ctx.leaves), *weight.shape) for weight in ctx.leaves[0]]
        for (member, _), grads in zip(ctx.tasks, per_task, strict=True):
            for total, grad in zip(grad_weights, grads, strict=True):
                total[member] += grad
        del ctx.graphs
        return (None, None, None, grad_inputs.unflatten(1, ctx.shape[1:3]), None, *grad_weights)
