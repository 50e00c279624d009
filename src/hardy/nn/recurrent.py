"""Stacked LSTM and GRU with exact resets inside a sequence.

One step (`StackedRecurrent.step`) runs the whole population on the stacked axis. On a CUDA device so does a sequence
(`StackedRecurrent.forward`), step by step (see `hardy.nn.stepped`) or, the LSTM, in a kernel (see `hardy.nn.lstm_choice`). On
the CPU the LSTM in float32 runs through Hardy's compiled library where there is one (see `hardy.nn.compiled`), everything else
through PyTorch's fused kernels (see `hardy.nn.reset_steps`), whose threads `own_threads` chooses.

The recurrent state of one environment is one vector of ``state_size`` numbers: the hidden vectors of all layers, then,
for the LSTM, the cell vectors. Zero is the initial state.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Shaped
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
        plan = _plan(is_first, workers.threads, inputs.device)
        parts = state.detach().masked_fill(is_first[:, 0].unsqueeze(-1), 0.0).split(self.hidden_size, dim=-1)
        output = inputs
        for layer in range(self.layers):
            initial = torch.stack(parts[layer :: self.layers], dim=1)
            output = _run_layer(self.kind, workers, plan, output, initial, self.layer_weights(layer))
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


def _plan(is_first: Bool[Tensor, "P T E"], threads: int, device: torch.device) -> list[list[Rows]]:
    """Each member's rows: a task, or where there are fewer members than threads one for each part of the environments."""
    members, _, envs = is_first.shape
    starts = is_first.cpu().numpy()
    parts = min(envs, max(1, math.ceil(threads / members)))
    bounds = list(itertools.pairwise(envs * part // parts for part in range(parts + 1)))
    return [[lay_out(own[:, low:high], device) for low, high in bounds] for own in starts]


def _run_layer(
    kind: CellKind, workers: WorkerPool, plan: list[list[Rows]], inputs: Tensor, initial: Tensor, weights: Sequence[Tensor]
) -> Float[Tensor, "P T E H"]:
    """One layer of all members over ``inputs [P, T, E, I]`` from ``initial [P, 1 or 2, E, H]``, as planned."""
    tasks = [
        (rows, own_initial, own_inputs, *own_weights)
        for parts, member_initial, member_inputs, *own_weights in zip(
            plan, *map(_members, (initial, inputs, *weights)), strict=True
        )
        for rows, own_initial, own_inputs in zip(
            parts, _parts(member_initial, parts), _parts(member_inputs, parts), strict=True
        )
    ]

    def run(index: int, *tensors: Tensor) -> Tensor:
        return _run(kind, *tasks[index][:2], *tensors)

    if workers.threads == 1 or len(tasks) == 1:
        outputs = [run(index, *task[2:]) for index, task in enumerate(tasks)]
    else:
        tensors = [tensor for task in tasks for tensor in task[2:]]
        outputs = _InThreads.apply(workers, run, len(tasks), torch.is_grad_enabled(), *tensors)  # type: ignore[no-untyped-call]
    parts = len(plan[0])
    members = outputs if parts == 1 else [torch.cat(outputs[i : i + parts], 1) for i in range(0, len(tasks), parts)]
    return members[0].unsqueeze(0) if len(members) == 1 else torch.stack(members)


def _members(tensor: Shaped[Tensor, "P ..."]) -> Sequence[Shaped[Tensor, "..."]]:
    # The gradient of what was unbound is a copy, that of what was squeezed is not.
    return [tensor.squeeze(0)] if len(tensor) == 1 else tensor.unbind()


def _parts(tensor: Shaped[Tensor, "N E ..."], parts: list[Rows]) -> Sequence[Shaped[Tensor, "N _ ..."]]:
    return [tensor] if len(parts) == 1 else tensor.split([rows.envs for rows in parts], dim=1)


def _run(
    kind: CellKind, rows: Rows, initial: Tensor, inputs: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor,
    bias_hh: Tensor,
) -> Float[Tensor, "T E H"]:  # fmt: skip
    """One layer of one member over ``inputs [T, E, I]`` from ``initial [1 or 2, E, H]``: hidden vectors, the LSTM's cells."""
    weights = [input_weights(kind, weight_ih, bias_ih), weight_hh, torch.zeros_like(bias_hh), bias_hh]
    arguments = (weights, True, 1, 0.0, True, False, False)
    spread, initial = rows.spread(inputs), rows.initial(initial)
    if kind == "lstm":
        hidden, cell = initial.unsqueeze(1)
        return rows.take(torch.lstm(spread, (hidden, cell), *arguments)[0])
    return rows.take(torch.gru(spread, initial, *arguments)[0])


class _InThreads(torch.autograd.Function):
    """Tasks in threads, forward and backward; each keeps a graph of its own in between."""

    @staticmethod
    def forward(
        ctx: Any, workers: WorkerPool, run: Callable[..., Tensor], count: int, grad_enabled: bool, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        wanted = grad_enabled and any(ctx.needs_input_grad)
        each = len(tensors) // count
        leaves = [tensor.detach().requires_grad_(wanted) for tensor in tensors]  # a thread records what it does with its own

        def run_one(index: int) -> Tensor:
            with torch.set_grad_enabled(wanted):
                return run(index, *leaves[index * each : (index + 1) * each])

        outputs = workers.map(run_one, count)
        if wanted:
            ctx.graphs, ctx.leaves, ctx.workers, ctx.each = outputs, leaves, workers, each
        return tuple(output.detach() for output in outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.graphs is None:
            raise RuntimeError("a recurrence in threads gives its gradients once, retain_graph=True or not")
        graphs, leaves, each = ctx.graphs, ctx.leaves, ctx.each

        def run_one(index: int) -> tuple[Tensor, ...]:
            found: tuple[Tensor, ...] = torch.autograd.grad(
                graphs[index], leaves[index * each : (index + 1) * each], grads[index]
            )
            return found

        per_task = ctx.workers.map(run_one, len(graphs))
        ctx.graphs = ctx.leaves = None
        return None, None, None, None, *itertools.chain.from_iterable(per_task)
