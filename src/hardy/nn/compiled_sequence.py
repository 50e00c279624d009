"""A policy (linear layers and LSTMs) over whole sequences in the compiled library, for float32 on the CPU, with gradients.

One function forward and one backward for all layers, instead of a graph of some twenty operations on each minibatch; see
`hardy.nn.compiled` for where the library comes from and for the LSTM. `hardy.policy.ActorCritic.features` and its branches give
the same results to rounding.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hardy.compiled import NEWEST_INSTRUCTIONS, Function
from hardy.nn.compiled import LSTMCall, empty
from hardy.nn.compiled_step import KINDS
from hardy.nn.linear import StackedLinear
from hardy.nn.packed_step import OBSERVATION, Layers
from hardy.nn.recurrent import WEIGHTS, StackedRecurrent
from hardy.parallel import pool

VERSION = 2
"""Of `_Linear`; a library built from sources of another version is not used."""
SMALLEST_PART = 2_000_000
"""Multiplications of a layer's forward pass below which a part is not worth a thread (measured)."""
ACTIVATION = 32
"""Multiplications that take the time of an activation."""
VECTOR = 16
"""Outputs that take no longer than one: they are computed side by side."""
SHAPES_KEPT = 8
"""Shapes of buffers that are kept: a training's minibatches differ in few ways."""


class _Linear(ctypes.Structure):
    """What a call works on; mirrors `Linear` in `_recurrence.cpp`, which explains the fields."""

    _sizes = "members rows inputs outputs kind adds threads level"
    _tensors = "x weight bias output before grad_output grad_x grad_weight grad_bias"
    _fields_ = [*((name, ctypes.c_int64) for name in _sizes.split()), *((name, ctypes.c_void_p) for name in _tensors.split())]


_linear = Function("hardy_linear", VERSION)
available = _linear.available


class Buffers:
    """Memory for what lives from a forward pass to its backward pass: fresh memory costs as much as filling it twice."""

    def __init__(self) -> None:
        self._free: dict[tuple[int, ...], list[Tensor]] = {}

    def lend(self) -> Loan:
        """A place to borrow from."""
        return Loan(self._free)


class Loan:
    """Buffers that are free again once nothing holds this any more."""

    def __init__(self, free: dict[tuple[int, ...], list[Tensor]]) -> None:
        self._free = free
        self._borrowed: list[Tensor] = []

    def empty(self, *shape: int) -> Tensor:
        """A float32 tensor of any numbers, as `hardy.nn.compiled.empty`."""
        try:
            tensor = self._free[shape].pop()
        except (KeyError, IndexError):  # asked for like this, since another thread may take the last
            tensor = empty(*shape)
        self._borrowed.append(tensor)
        return tensor

    def __del__(self) -> None:
        for tensor in self._borrowed:
            shape = tuple(tensor.shape)
            if shape not in self._free and len(self._free) >= SHAPES_KEPT:
                self._free.clear()
            self._free.setdefault(shape, []).append(tensor)


@dataclasses.dataclass(frozen=True)
class _LinearLayer:
    count: ClassVar[int] = 2
    source: int
    linear: StackedLinear
    kind: int

    @property
    def outputs(self) -> int:
        return self.linear.bias.shape[1]

    def shapes(self, inputs: int) -> tuple[tuple[int, ...], ...]:
        return (self.outputs, inputs), (self.outputs,)

    def weights(self) -> tuple[Tensor, ...]:
        return self.linear.weight, self.linear.bias

    def prepare(self, given: _Given, inputs: Tensor, weights: Sequence[Tensor]) -> _LinearCall:
        return _LinearCall(self.kind, given.threads, given.level, inputs, weights)


@dataclasses.dataclass(frozen=True)
class _LSTMLayer:
    count: ClassVar[int] = len(WEIGHTS)
    source: int
    memory: StackedRecurrent
    layer: int
    places: tuple[int, int]

    @property
    def outputs(self) -> int:
        return self.memory.hidden_size

    def shapes(self, inputs: int) -> tuple[tuple[int, ...], ...]:
        gates = 4 * self.outputs
        return (gates, inputs), (gates, self.outputs), (gates,), (gates,)

    def weights(self) -> tuple[Tensor, ...]:
        return self.memory.layer_weights(self.layer)

    def prepare(self, given: _Given, inputs: Tensor, weights: Sequence[Tensor]) -> LSTMCall:
        return LSTMCall(self.places, given.threads, given.level, (inputs, given.state, given.is_first, *weights))


@dataclasses.dataclass(frozen=True)
class _Given:
    """What all layers of a call share."""

    state: Tensor
    is_first: Tensor
    threads: int
    level: int


class _LinearCall:
    """One layer's sizes and addresses, as the library wants them; of the same use as `LSTMCall`."""

    def __init__(self, kind: int, threads: int, level: int, inputs: Tensor, weights: Sequence[Tensor]) -> None:
        self.inputs, (self.weight, self.bias) = inputs, weights
        members, steps, envs, width = inputs.shape
        outputs = self.weight.shape[1]
        work = members * steps * envs * max(outputs, VECTOR) * (width + (ACTIVATION if kind else 0))
        useful = max(1, min(threads, work // SMALLEST_PART))
        self._problem = _Linear(
            *(members, steps * envs, width, outputs, kind, 0, useful, level),
            x=inputs.data_ptr(), weight=self.weight.data_ptr(), bias=self.bias.data_ptr(),
        )  # fmt: skip
        self._outputs = (members, steps, envs, outputs)

    def _run(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            setattr(self._problem, name, tensor.data_ptr())
        _linear(self._problem, lambda: f"a layer over inputs of shape {tuple(self.inputs.shape)}")

    def forward(self, empty: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        """The outputs, and what `backward` needs besides."""
        wanted = ("output", "before") if self._problem.kind == KINDS["silu"] else ("output",)
        made = {name: empty(*self._outputs) for name in wanted}
        self._run(**made)
        return tuple(made.values())

    def backward(
        self, made: Sequence[Tensor], grad_output: Tensor, empty: Callable[..., Tensor], grad_x: Tensor | None, adds: bool
    ) -> list[Tensor]:
        """Gradients of the weights; those of the inputs are written or added to ``grad_x`` where that is given.

        Behind an activation, ``grad_output`` is written over with the gradients ahead of it; so nothing comes from ``empty``,
        which an `LSTMCall` wants.
        """
        grads = {"grad_weight": torch.empty_like(self.weight), "grad_bias": torch.empty_like(self.bias)}
        optional = {} if grad_x is None else {"grad_x": grad_x}
        self._problem.adds = adds
        self._run(**dict(zip(("output", "before"), made, strict=False)), grad_output=grad_output, **grads, **optional)
        return list(grads.values())


class CompiledSequence(Layers):
    """Layers in the order of computation, added one by one, then called with the weights they have at that moment.

    Attributes:
        level: the newest instruction set to use, 0 for what every CPU has; newer ones are used only where they exist.
    """

    level: ClassVar[int] = NEWEST_INSTRUCTIONS

    def __init__(self) -> None:
        self.layers: list[_LinearLayer | _LSTMLayer] = []
        self.results: tuple[int, ...] = ()
        self.buffers = Buffers()

    def add_linear(self, source: int, linear: StackedLinear, activation: str = "linear") -> int:
        return self._add(_LinearLayer(source, linear, KINDS[activation]))

    def add_lstm(self, source: int, memory: StackedRecurrent, state_at: int) -> int:
        for layer in range(memory.layers):
            hidden_at, cell_at = (state_at + vector * memory.hidden_size for vector in (layer, memory.layers + layer))
            source = self._add(_LSTMLayer(source, memory, layer, (hidden_at, cell_at)))
        return source

    def _add(self, layer: _LinearLayer | _LSTMLayer) -> int:
        self.layers.append(layer)
        return len(self.layers) - 1

    def pack(self, actor: int, *critics: int) -> Self:
        self.results = (actor, *critics)
        for place in self.results:
            layer = self.layers[place]
            # Or the backward pass would write over the caller's gradients.
            assert isinstance(layer, _LinearLayer)
            assert layer.kind == KINDS["linear"]
        return self

    def supports(self, obs: Tensor, state: Tensor) -> bool:
        """Whether the library can be used on these, with the weights as they are: float32 on the CPU, and any steps at all."""
        tensors = (obs, state, *self._weights())
        return (
            available()
            and all(tensor.dtype is torch.float32 and tensor.is_cpu for tensor in tensors)
            and min(obs.shape[1:3]) > 0
        )

    def __call__(
        self, obs: Float[Tensor, "P T E O"], state: Float[Tensor, "P E S"], is_first: Bool[Tensor, "P T E"]
    ) -> tuple[Float[Tensor, "P T E A"], Float[Tensor, "P T E K"]]:
        """The actor's outputs and the critics' side by side, for sequences from ``state``, reset first where ``is_first``.

        Gradients flow to the observations and the weights and stop at ``state``.

        Raises:
            ValueError: the shapes do not belong together.
            MemoryError: no memory for the working space.
        """
        weights = [weight.contiguous() for weight in self._weights()]
        self._check_shapes(obs, state, is_first, weights)
        given = _Given(state.detach().contiguous(), is_first.bool().contiguous(), pool().threads, self.level)
        outputs = _Sequence.apply(self, given, obs.contiguous(), *weights)  # type: ignore[no-untyped-call]  # not annotated
        actor, *critics = outputs
        return actor, critics[0] if len(critics) == 1 else torch.cat(critics, dim=-1)

    def _weights(self) -> Iterator[Tensor]:
        # Asked for at each call: a module's parameters can be replaced.
        for layer in self.layers:
            yield from layer.weights()

    def _check_shapes(self, obs: Tensor, state: Tensor, is_first: Tensor, weights: Sequence[Tensor]) -> None:
        # The library follows bare addresses: what would be an error in PyTorch would be somebody else's memory here.
        members, steps, envs, width = obs.shape
        widths = {layer.weights()[0].shape[2] for layer in self.layers if layer.source == OBSERVATION}
        size = 2 * sum(layer.memory.hidden_size for layer in self.layers if isinstance(layer, _LSTMLayer))
        wanted = (members, envs, size), (members, steps, envs)
        if (state.shape, is_first.shape) != wanted or widths != {width} or any(len(weight) != members for weight in weights):
            raise ValueError(
                f"obs, state and is_first of shapes {tuple(obs.shape)}, {tuple(state.shape)} and {tuple(is_first.shape)}: "
                f"{len(weights[0])} members with observations of {', '.join(map(str, widths))} numbers and a state of {size} "
                "are needed"
            )
        for place, (layer, own) in enumerate(_with_weights(self, weights)):
            inputs = width if layer.source == OBSERVATION else self.layers[layer.source].outputs
            shapes = [(members, *shape) for shape in layer.shapes(inputs)]
            if [tuple(weight.shape) for weight in own] != shapes:
                raise ValueError(
                    f"weights of layer {place} of shapes {[tuple(weight.shape) for weight in own]}: {shapes} are needed"
                )


class _Sequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sequence: CompiledSequence, given: _Given, obs: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.sequence, ctx.given, ctx.loan = sequence, given, sequence.buffers.lend()
        made: list[tuple[Tensor, ...]] = []
        results = {}
        for place, (layer, own) in enumerate(_with_weights(sequence, weights)):
            inputs = obs if layer.source == OBSERVATION else made[layer.source][0]
            call = layer.prepare(given, inputs, own)
            if place in sequence.results:
                # The caller's, so not lent; nor held here, where the result would hold its own graph. Nothing is above it.
                (results[place],) = call.forward(empty)
                made.append(())
            else:
                made.append(call.forward(ctx.loan.empty))
        ctx.made, ctx.spent = made, False
        ctx.save_for_backward(obs, given.state, given.is_first, *weights)
        return tuple(results[place] for place in sequence.results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        # State and starts are asked for like the others, so that PyTorch notices if they were changed in between.
        obs, state, is_first, *weights = ctx.saved_tensors
        given = dataclasses.replace(ctx.given, state=state, is_first=is_first)
        sequence, made = ctx.sequence, ctx.made
        spent, ctx.spent = ctx.spent, True  # even if this fails half-way
        loan = sequence.buffers.lend()
        gradient = {place: grad.contiguous() for place, grad in zip(sequence.results, grad_outputs, strict=True)}
        found: list[list[Tensor]] = []
        for place, (layer, own) in reversed(list(enumerate(_with_weights(sequence, weights)))):
            at_start = layer.source == OBSERVATION
            inputs = obs if at_start else made[layer.source][0]
            adds = layer.source in gradient
            if not adds and (not at_start or ctx.needs_input_grad[2]):
                gradient[layer.source] = torch.empty_like(obs) if at_start else loan.empty(*inputs.shape)
            call = layer.prepare(given, inputs, own)
            if spent and isinstance(call, LSTMCall):
                call.restore(made[place])
            found.append(call.backward(made[place], gradient[place], loan.empty, gradient.get(layer.source), adds))
        return None, None, gradient.get(OBSERVATION), *(grad for grads in reversed(found) for grad in grads)


def _with_weights(
    sequence: CompiledSequence, weights: Sequence[Tensor]
) -> Iterator[tuple[_LinearLayer | _LSTMLayer, Sequence[Tensor]]]:
    begin = 0
    for layer in sequence.layers:
        end = begin + layer.count
        yield layer, weights[begin:end]
        begin = end
