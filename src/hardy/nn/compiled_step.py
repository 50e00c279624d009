"""One time step of a policy (linear layers and LSTM cells) in the compiled library, for float32 on the CPU, without gradients.

With it, in a rollout, what stands before and behind the layers: observations are normalised and actions drawn.

A rollout takes many small steps with the same weights: they are packed once, and a step is one call instead of some thirty.
`hardy.nn.packed_step` gives the same results to rounding (see `hardy.nn.compiled` for where the library comes from).
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import ClassVar, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hardy.compiled import NEWEST_INSTRUCTIONS, Function
from hardy.nn.compiled import empty
from hardy.nn.linear import StackedLinear
from hardy.nn.normalizer import FrozenNormalizer
from hardy.nn.packed_step import Act, PolicyStep
from hardy.nn.recurrent import StackedRecurrent

VERSION = 2
"""Of `_Layer` and `_Network`; a library built from sources of another version is not used."""
KINDS = {kind: number for number, kind in enumerate(("linear", "tanh", "relu", "elu", "silu", "lstm"))}
SMALLEST_PART = 2_000_000
"""Multiplications of a step below which they are not worth a thread (measured)."""
WIDEST = 64
"""Places of a panel, at most; the last panel of a layer may be nearly empty."""


class _Layer(ctypes.Structure):
    """Mirrors `Layer` in `_recurrence.cpp`, which explains the fields."""

    _sizes = "kind inputs outputs source hidden_at cell_at panel_stride"
    _tensors = "weight bias weight_hh bias_hh panels output"
    _fields_ = [*((name, ctypes.c_int64) for name in _sizes.split()), *((name, ctypes.c_void_p) for name in _tensors.split())]


class _Network(ctypes.Structure):
    """Mirrors `Network` in `_recurrence.cpp`, which explains the fields."""

    _sizes = "members envs state_size layers parts threads level packing actor"
    _tensors = "layer obs is_first state next_state mean inverse normalized noise deviation choices actions"
    _fields_ = [
        *((name, ctypes.c_int64) for name in _sizes.split()),
        *((name, ctypes.c_void_p) for name in _tensors.split()),
        ("clip", ctypes.c_double),
    ]


_step = Function("hardy_policy_step", VERSION)
available = _step.available


class CompiledStep(PolicyStep):
    """Layers in the order of computation, added one by one, then called with the weights they had when `pack` was called.

    Args:
        members, envs: P and E of every call.
        state_size: S, numbers of one environment's recurrent state.
        threads: at most that many; they do not change the results.

    Attributes:
        level: the newest instruction set to use, 0 for what every CPU has; newer ones are used only where they exist.
    """

    level: ClassVar[int] = NEWEST_INSTRUCTIONS

    def __init__(self, members: int, envs: int, state_size: int, threads: int) -> None:
        self.members, self.envs, self.state_size = members, envs, state_size
        self.threads = threads
        self._layers: list[_Layer] = []
        self._held: list[Tensor] = []
        """What the layers' addresses point at."""
        self._outputs: list[Tensor] = []
        self._results: list[Tensor] = []

    def add_linear(self, source: int, linear: StackedLinear, activation: str = "linear") -> int:
        return self._add(activation, source, [linear.weight, linear.bias])

    def add_lstm(self, source: int, memory: StackedRecurrent, state_at: int) -> int:
        for layer in range(memory.layers):
            weight_ih, weight_hh, bias_ih, bias_hh = memory.layer_weights(layer)
            hidden_at, cell_at = (state_at + vector * memory.hidden_size for vector in (layer, memory.layers + layer))
            source = self._add("lstm", source, [weight_ih, bias_ih, weight_hh, bias_hh], hidden_at, cell_at)
        return source

    def _add(self, kind: str, source: int, weights: list[Tensor], hidden_at: int = 0, cell_at: int = 0) -> int:
        held = [weight.detach().contiguous() for weight in weights]
        rows, inputs = held[0].shape[1:]
        outputs = rows // 4 if kind == "lstm" else rows
        lines = 1 + inputs + (outputs if kind == "lstm" else 0)
        stride = -(-(rows + WIDEST) * lines // WIDEST) * WIDEST
        panels = held[0].new_empty(self.members, stride)
        output = held[0].new_empty(self.members, self.envs, 0 if kind == "lstm" else outputs)
        layer = _Layer(KINDS[kind], inputs, outputs, source, hidden_at, cell_at, stride)
        names = ("weight", "bias", "weight_hh", "bias_hh", "panels", "output")
        for name, tensor in zip(names, [*held, *([None] * (4 - len(held))), panels, output], strict=True):
            setattr(layer, name, None if tensor is None else tensor.data_ptr())
        self._layers.append(layer)
        self._held += [*held, panels]
        self._outputs.append(output)
        return len(self._layers) - 1

    def pack(self, actor: int, *critics: int) -> Self:
        work = self.envs * sum(layer.panel_stride for layer in self._layers)
        useful = max(1, min(self.threads, self.members * work // SMALLEST_PART))
        parts = min(self.envs, math.ceil(useful / self.members))
        self._array = (_Layer * len(self._layers))(*self._layers)
        self._network = _Network(
            *(self.members, self.envs, self.state_size, len(self._layers), parts, useful, self.level, 1, actor),
            layer=ctypes.addressof(self._array),
        )
        self._run(self._network)
        self._network.packing = 0
        self._results = [self._outputs[layer] for layer in (actor, *critics)]
        rows = (self.members, self.envs)
        self._shapes = ((*rows, self._layers[0].inputs), (*rows, self.state_size), rows)
        return self

    def _run(self, network: _Network) -> None:
        _step(network, lambda: f"a step of {self.members} members with {self.envs} environments")

    def __call__(
        self, obs: Float[Tensor, "P E O"], state: Float[Tensor, "P E S"], is_first: Bool[Tensor, "P E"]
    ) -> tuple[Float[Tensor, "P E A"], Float[Tensor, "P E K"], Float[Tensor, "P E S"]]:
        """As `PolicyStep`.

        Raises:
            ValueError: a tensor has another shape or type than the weights want.
        """
        return self.take(self._network, obs, state, is_first)

    def take(self, network: _Network, obs: Tensor, state: Tensor, is_first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A step by what ``network`` says besides these tensors."""
        # The library follows bare addresses: what would be an error in PyTorch would be somebody else's memory here.
        shapes = (obs.shape, state.shape, is_first.shape)
        dtypes = (obs.dtype, state.dtype, is_first.dtype)
        here = obs.is_cpu and state.is_cpu and is_first.is_cpu
        if shapes != self._shapes or dtypes != (torch.float32, torch.float32, torch.bool) or not here:
            raise ValueError(
                f"obs, state and is_first of shapes {[tuple(shape) for shape in shapes]} and types {dtypes} on "
                f"{obs.device}, {state.device} and {is_first.device}: {list(self._shapes)}, "
                "float32 and bool on the CPU are needed"
            )
        obs, state, is_first = obs.contiguous(), state.contiguous(), is_first.contiguous()
        following = torch.empty_like(state)
        network.obs, network.is_first = obs.data_ptr(), is_first.data_ptr()
        network.state, network.next_state = state.data_ptr(), following.data_ptr()
        self._run(network)
        actor, *critics = self._results
        return actor.clone(), torch.cat(critics, dim=-1), following

    def acting(self, normalize: Callable[[Tensor], Tensor], log_std: Float[Tensor, "P A"] | None) -> Act:
        """The same step from observations as they come to actions.

        Args:
            normalize: a `FrozenNormalizer` becomes a part of the call.
            log_std: of Gaussian actions, as it is now; None for categorical ones.

        Raises:
            ValueError: statistics or ``log_std`` of another shape or type than the layers want.
        """
        return _CompiledAct(self, normalize, log_std)


class _CompiledAct:
    """A step with what stands before and behind its layers. See `CompiledStep.acting`."""

    def __init__(self, step: CompiledStep, normalize: Callable[[Tensor], Tensor], log_std: Float[Tensor, "P A"] | None) -> None:
        self._step = step
        self._network = network = _Network.from_buffer_copy(step._network)
        self._before: Callable[[Tensor], Tensor] | None = normalize
        self._held: list[Tensor] = []
        """What the network's addresses point at."""
        if isinstance(normalize, FrozenNormalizer):
            members, envs, size = step._shapes[0]
            self._before = None
            self._held = [normalize.mean.contiguous(), normalize.inverse.contiguous(), empty(members, envs, size)]
            for tensor in self._held[:2]:
                _require("normalize", tensor, (members, size), torch.float64)
            network.mean, network.inverse, network.normalized = (tensor.data_ptr() for tensor in self._held)
            network.clip = normalize.clip
        self._shape: tuple[int, ...] = step._shapes[2]
        self._drawn, self._dtype = "choices", torch.int64
        if log_std is not None:
            deviation = log_std.detach().exp().contiguous()
            _require("log_std", deviation, (step.members, step._results[0].shape[-1]), torch.float32)
            network.deviation = deviation.data_ptr()
            self._held.append(deviation)
            self._shape = (*self._shape, deviation.shape[1])
            self._drawn, self._dtype = "actions", torch.float32

    def __call__(
        self, obs: Float[Tensor, "P E O"], state: Float[Tensor, "P E S"], is_first: Bool[Tensor, "P E"], noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        _require("noise", noise, self._shape, torch.float32)
        drawn, noise = torch.empty(self._shape, dtype=self._dtype, device="cpu"), noise.contiguous()
        self._network.noise = noise.data_ptr()
        setattr(self._network, self._drawn, drawn.data_ptr())
        obs = obs if self._before is None else self._before(obs)
        return drawn, *self._step.take(self._network, obs, state, is_first)


def _require(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_cpu:
        given = f"{tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}"
        raise ValueError(f"{name} has {given}: {shape}, {dtype} on cpu is needed")
