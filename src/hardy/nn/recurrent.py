"""Stacked LSTM and GRU with exact resets inside a sequence.

One step (`StackedRecurrent.step`) runs the whole population on the stacked axis. On a CUDA device so does a sequence
(`StackedRecurrent.forward`), step by step (see `hardy.nn.stepped`) or, the LSTM, in a kernel (see `hardy.nn.lstm_choice`). On
the CPU the LSTM in float32 runs through Hardy's compiled library where there is one (see `hardy.nn.compiled`), everything else
through PyTorch's fused kernels (see `hardy.nn.reset_steps`), whose threads `own_threads` chooses.

The recurrent state of one environment is one vector of ``state_size`` numbers: the hidden vectors of all layers, then,
for the LSTM, the cell vectors. Zero is the initial state.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hardy.nn import compiled, lstm_choice
from hardy.nn.reset_steps import GATES, Rows, input_weights, lay_out
from hardy.parallel import WorkerPool, pool

CellKind = Literal["lstm", "gru"]
STEPPED = ("cuda",)
"""Types of devices on which a sequence runs step by step."""
WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
WORTH_THREADS = 200_000_000
"""Multiplications of a forward pass, of all members and layers, below which Python threads cost more than they give."""


def own_threads(kind: CellKind | Literal["none"], dtype: torch.dtype) -> bool:
    """Whether sequences on the CPU are shared out to threads of Hardy's, rather than each kernel to PyTorch's.

    PyTorch's GRU is a call for every step, and so is its LSTM where oneDNN has none: too small to be shared out.
    """
    in_one_call = dtype is torch.float32 and torch.backends.mkldnn.is_available() and not compiled.available()
    return kind == "gru" or (kind == "lstm" and not in_one_call)


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
        # Not by get_parameter, which takes longer than the rest of what a minibatch asks for.
        weight_ih, weight_hh, bias_ih, bias_hh = (getattr(self, f"{name}_l{layer}") for name in WEIGHTS)
        return weight_ih, weight_hh, bias_ih, bias_hh

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
                output = lstm_choice.lstm_layer(from_input, hidden, parts[self.layers + layer], is_first, weight_hh)
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
        spoiled = _spoiled(inputs, state, is_first)
        if spoiled is not None:
            inputs, state = torch.nan_to_num(inputs, posinf=0, neginf=0), torch.nan_to_num(state, posinf=0, neginf=0)
        work = is_first[0].numel() * sum(weight.numel() for weight in weights)
        workers = pool() if work >= WORTH_THREADS and torch.get_num_threads() == 1 else WorkerPool(1)
        tasks = _plan_tasks(is_first, workers.threads, inputs.device)
        parts = state.detach().masked_fill(is_first[:, 0].unsqueeze(-1), 0.0).split(self.hidden_size, dim=-1)
        output = inputs
        for layer in range(self.layers):
            initial = torch.stack(parts[layer :: self.layers], dim=1)
            given = (self.kind, torch.is_grad_enabled(), workers, tasks, output, initial, *self.layer_weights(layer))
            output = _FusedLayer.apply(*given)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        return output if spoiled is None else output.masked_fill(spoiled.unsqueeze(-1), torch.nan)


def _spoiled(
    inputs: Float[Tensor, "P T E I"], state: Float[Tensor, "P E S"], is_first: Bool[Tensor, "P T E"]
) -> Bool[Tensor, "P T E"] | None:
    """Steps whose episode saw something not finite before or then, if there are any: 0 times that would not be a reset.

    What is not finite counts as NaN there. That it costs the member its update, the gradients of the heads show.
    """
    if math.isfinite(float(inputs.detach().sum()) + float(state.detach().sum())):
        return None
    bad, spoiled = ~inputs.isfinite().all(-1), ~state.isfinite().all(-1)
    steps = []
    for now, begins in zip(bad.unbind(1), is_first.unbind(1), strict=True):
        spoiled = now | (spoiled & ~begins)
        steps.append(spoiled)
    return torch.stack(steps, dim=1)


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


@dataclasses.dataclass(frozen=True)
class _Task:
    """Some environments of one member."""

    member: int
    envs: slice
    rows: Rows


def _plan_tasks(is_first: Bool[Tensor, "P T E"], threads: int, device: torch.device) -> list[_Task]:
    """One task for each member and part of the environments."""
    members, _, envs = is_first.shape
    starts = is_first.cpu().numpy()
    parts = min(envs, max(1, math.ceil(threads / members)))
    bounds = [envs * part // parts for part in range(parts + 1)]
    return [
        _Task(member, slice(low, high), lay_out(starts[member, :, low:high], device))
        for member in range(members)
        for low, high in itertools.pairwise(bounds)
    ]


def _kernel(kind: str, rows: Tensor, initial: Tensor, weights: list[Tensor]) -> Tensor:
    """One layer over ``rows [L, E, I]`` from ``initial [1 or 2, E, H]``, the hidden and for the LSTM the cell vectors."""
    arguments = (weights, True, 1, 0.0, True, False, False)
    if kind == "lstm":
        hidden, cell = initial.unsqueeze(1)
        return torch.lstm(rows, (hidden, cell), *arguments)[0]
    return torch.gru(rows, initial, *arguments)[0]


class _FusedLayer(torch.autograd.Function):
    """One layer, its tasks in threads, forward and backward; each keeps a graph of its own in between."""

    @staticmethod
    def forward(
        ctx: Any, kind: CellKind, grad_enabled: bool, workers: WorkerPool, tasks: list[_Task], inputs: Tensor, initial: Tensor,
        weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor,
    ) -> Tensor:  # fmt: skip
        wanted = grad_enabled and any(ctx.needs_input_grad)
        inputs = inputs.detach()  # other threads would record what they do with it
        leaves = [
            [
                tensor.detach().requires_grad_(wanted)
                for tensor in (input_weights(kind, *own[:2]), own[2], torch.zeros_like(own[1]), own[3])
            ]
            for own in zip(weight_ih, bias_ih, weight_hh, bias_hh, strict=True)
        ]
        output = inputs.new_empty(*inputs.shape[:3], weight_hh.shape[-1])

        def run(index: int) -> tuple[Tensor, Tensor]:
            task = tasks[index]
            rows = task.rows.spread(inputs[task.member, :, task.envs]).requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                hidden = _kernel(kind, rows, initial[task.member, :, task.envs].contiguous(), leaves[task.member])
            output[task.member, :, task.envs] = task.rows.take(hidden.detach())
            return rows, hidden

        graphs = workers.map(run, len(tasks))
        if wanted:
            ctx.graphs, ctx.leaves, ctx.tasks, ctx.workers = graphs, leaves, tasks, workers
            ctx.shape = inputs.shape
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        grad_inputs = grad_output.new_empty(ctx.shape)
        size = ctx.shape[-1]

        def run(index: int) -> list[Tensor]:
            task, (rows, hidden) = ctx.tasks[index], ctx.graphs[index]
            grad = task.rows.put(grad_output[task.member, :, task.envs])
            grads = torch.autograd.grad(hidden, [rows, *ctx.leaves[task.member]], grad)
            grad_inputs[task.member, :, task.envs] = task.rows.take(grads[0])[..., :size]
            return [grads[1][:, :size], grads[2], grads[1][:, size], grads[4]]

        per_task = ctx.workers.map(run, len(ctx.tasks))
        by_member: list[list[Tensor]] = [[] for _ in ctx.leaves]
        for task, grads in zip(ctx.tasks, per_task, strict=True):
            if by_member[task.member]:
                torch._foreach_add_(by_member[task.member], grads)
            else:
                by_member[task.member] = grads
        del ctx.graphs
        return (None, None, None, None, grad_inputs, None, *(torch.stack(grads) for grads in zip(*by_member, strict=True)))
