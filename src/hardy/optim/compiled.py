"""One step of the optimizers in the compiled library, for float32 on the CPU.

The library is built when Hardy is installed, if there is a C++ compiler that can. This part of it, `_upgd.cpp`, does what the
chain of transformations does, from the measurement to the descent, to rounding: in three or four passes over memory instead of
about 25, one call for all members and threads, with the interpreter lock released. Without it, or with ``HARDY_COMPILED=0`` in
the environment, the chain does the work.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from hardy.compiled import NEWEST_INSTRUCTIONS, Function
from hardy.optim.noise import KeyedNormal
from hardy.optim.transforms import Step, TensorOptions
from hardy.optim.upgd import OptimizerName, UPGDState, noisy_tensors
from hardy.optim.vgs import Scopes, VGSState, contributions, record_factors

VERSION = 1
"""Of the structures; a library built from sources of another version is not used."""
SMALLEST_PART = 250_000
"""Weights, of all members, below which a part of a step is not worth a thread, which may have to be woken (measured)."""
_NUMBERS = {
    "lr": 0.0, "coupled_decay": 0.0, "decoupled_decay": 0.0, "beta_utility": 0.0, "sigma": 0.0, "step_factor": 1.0,
    "max_grad_norm": math.inf, "beta1": 0.0, "beta2": 0.0, "eps": 0.0, "vgs.alpha": 0.0, "vgs.min_scale": 0.0,
    "vgs.beta": 0.0, "vgs.signal_floor": 0.0,
}  # fmt: skip
"""In the library's order, with what stands for one that a step does not have."""
METRICS = ("train/grad_norm", "upgd/utility_max", "upgd/noise_to_signal")
"""What the library finds for each member, in its order; factors and noise-to-signal ratios of VGS's scopes follow."""
_GATINGS = ("none", "global", "local")
_ESTIMATORS = (None, "ema", "microbatch")


class _Problem(ctypes.Structure):
    """What a call works on; mirrors `Problem` in `_upgd.cpp`, which explains the fields."""

    _sizes = "members tensors columns numbers_width adam raw_maximum clips estimator scopes warmup threads level"
    _by_tensor = "sizes row_lengths column gating protecting adaptive_noise noise weight gradient utility first second mean"
    _by_member = (
        "active keys numbers factor step vgs_steps second_moment variance signal microbatch_squares microbatches scope metrics"
    )
    _fields_ = [
        *((name, ctypes.c_int64) for name in _sizes.split()),
        *((name, ctypes.c_void_p) for name in f"{_by_tensor} {_by_member}".split()),
    ]


class _Squares(ctypes.Structure):
    """Mirrors `Squares` in `_upgd.cpp`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("members", "tensors", "threads", "level")),
        *((name, ctypes.c_void_p) for name in ("sizes", "tensor", "sum")),
    ]


class Measuring(NamedTuple):
    """How a step measures its gradient: what `hardy.optim.vgs.measure` closes over, and the statistics."""

    scopes: Scopes
    warmup_steps: int
    estimator: str
    state: VGSState


_upgd = Function("hardy_upgd", VERSION)
_squares = Function("hardy_squares", VERSION)
available = _upgd.available


def supports(step: Step, state: UPGDState, measuring: Measuring | None = None) -> bool:
    """Whether the library can take this step.

    All weights, gradients and states must be float32 on the CPU, weights and states without gaps in memory, and the noise a
    `KeyedNormal`. Every other choice of structure is supported.
    """
    if not isinstance(step.standard_normal, KeyedNormal):
        return False
    kept = [*step.weights, *_own(step, state.utility), *_own(step, state.first_moment), *_own(step, state.second_moment)]
    if measuring is not None:
        kept += _own(step, measuring.state.mean)
    return fit(step.weights, step.gradients, kept)


def fit(weights: Sequence[Tensor], gradients: Sequence[Tensor], kept: Iterable[Tensor]) -> bool:
    """Whether the library is there and can follow the addresses of these tensors; ``kept`` are weights and states."""
    # It knows bare addresses only: what would be an error in PyTorch would be somebody else's memory here.
    return (
        available()
        and all(t.dtype is torch.float32 and t.is_cpu and t.is_contiguous() for t in kept)
        and all(g.dtype is torch.float32 and g.is_cpu for g in gradients)
        and all(g.shape == w.shape for g, w in zip(gradients, weights, strict=True))
    )


def member_squares(
    tensors: Sequence[Shaped[Tensor, "P ..."]], threads: int = 1, level: int = NEWEST_INSTRUCTIONS
) -> Float[Tensor, "P"] | None:
    """Sum of squares of each member's rows of all tensors together, float64; None where the library cannot be used.

    Args:
        threads: at most that many; they do not change the result.
        level: the newest instruction set to use.
    """
    members = {len(t) for t in tensors}
    fit = all(t.dtype is torch.float32 and t.is_cpu and t.is_contiguous() for t in tensors)
    if not _squares.available() or not fit or len(members) != 1 or 0 in members:
        return None  # the library follows bare addresses
    sums = torch.empty(len(tensors[0]), dtype=torch.float64, device="cpu")
    sizes = [t.numel() // len(t) for t in tensors]
    places = array("q", sizes + [t.data_ptr() for t in tensors])
    address, _ = places.buffer_info()
    useful = max(1, min(threads, len(sums) * sum(sizes) // SMALLEST_PART))
    given = _Squares(len(sums), len(tensors), useful, level, address, address + len(tensors) * places.itemsize, sums.data_ptr())
    _squares(given, lambda: f"the sum of squares of {sum(sizes)} numbers")
    return sums


class Call:
    """A step made ready for the library: taken by calling it, and again with other gradients while all else stays where it is.

    Numbers are copied when it is made. Weights and states are changed where they are, and ``state.step`` is counted up.

    Args:
        step: one that the library `supports`; its ``factor`` must be set where the gradient was measured before.
        name, raw_maximum: as for `hardy.optim.upgd.upgd`.
        measuring: to measure and scale with VGS as a part of the step.
        active: members to update; None for all. The others are not looked at, and their metrics are NaN.
        threads: at most that many.
        level: the newest instruction set to use.

    Attributes:
        metrics: of the newest step, ``[P, 3 + 2·scopes]``: norm of the raw gradient, largest utility, noise-to-signal ratio.
        factor: in front of the update, ``[P, K]``; may be written to before the next call.
        steps: ``state.step`` itself, ``[P, all]``; the library counts here.

    Raises:
        RuntimeError: the microbatch estimator has seen fewer than two contributions.
    """

    def __init__(
        self,
        step: Step,
        state: UPGDState,
        name: OptimizerName,
        *,
        raw_maximum: bool = False,
        measuring: Measuring | None = None,
        active: Bool[Tensor, "P"] | None = None,
        threads: int = 1,
        level: int = NEWEST_INSTRUCTIONS,
    ) -> None:
        members, tensors = step.shape
        problem = _Problem(members=members, tensors=tensors, adam=name == "AdaptiveUPGD", raw_maximum=raw_maximum, level=level)
        problem.clips = "max_grad_norm" in step.hyper
        self._weights = sum(weight.numel() for weight in step.weights)
        problem.threads = max(1, min(threads, self._weights // SMALLEST_PART))
        noisy = noisy_tensors(step)
        numbers = _numbers(step)
        problem.numbers_width = numbers.shape[2]
        problem.columns = state.step.shape[1]
        statistics = {} if measuring is None else _statistics(problem, measuring)
        self.factor = step.factor.expand(members, tensors).contiguous()
        self._scopes = [] if measuring is None else measuring.scopes.names
        self.metrics = torch.full((members, 3 + 2 * problem.scopes), torch.nan, dtype=torch.float64)
        self.steps = state.step
        tensors_of = {
            **statistics,
            "active": torch.ones(members, dtype=torch.bool) if active is None else active.contiguous(),
            "numbers": numbers,
            "factor": self.factor,
            "step": self.steps,
            "metrics": self.metrics,
        }
        for field, tensor in tensors_of.items():
            setattr(problem, field, tensor.data_ptr())
        self._draw = step.standard_normal.draw if isinstance(step.standard_normal, KeyedNormal) and noisy else None
        self._table = _table(problem, step, state, noisy, measuring)
        self._problem = problem
        # Held for the library, which knows their addresses.
        self._held = (tensors_of, step.weights, state, measuring)

    def __call__(self, gradients: Sequence[Tensor]) -> None:
        """Take the step for these gradients, in the order of the weights; they are not kept.

        Raises:
            MemoryError: no memory for the working space; weights and states are as before.
        """
        problem, count = self._problem, self._problem.tensors
        contiguous = [gradient.contiguous() for gradient in gradients]
        self._table[:count] = array("q", [gradient.data_ptr() for gradient in contiguous])
        drawn = torch.zeros(problem.members, dtype=torch.int64) if self._draw is None else self._draw()
        keys = drawn.to(torch.int64).contiguous()
        problem.keys = keys.data_ptr()
        _upgd(problem, lambda: f"the step of {self._weights} weights")

    def record(self, step: Step) -> None:
        """Set the step's metrics."""
        step.metrics.update(zip(METRICS, self.metrics.unbind(1), strict=False))
        if self._scopes:
            record_factors(step, self._scopes, self.metrics[:, 3::2], self.metrics[:, 4::2])


def _numbers(step: Step) -> Float[Tensor, "N P #K"]:
    shape = (step.shape[0], max(matrix.shape[1] for matrix in step.hyper.values()))
    matrices = [step.hyper.get(name, absent) for name, absent in _absent(shape).items()]
    return torch.stack([matrix if matrix.shape == shape else matrix.expand(shape) for matrix in matrices])


@functools.lru_cache(maxsize=8)
def _absent(shape: tuple[int, int]) -> dict[str, Tensor]:
    return {name: torch.full(shape, value, dtype=torch.float64) for name, value in _NUMBERS.items()}


def _own(step: Step, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    return [tensors[name] for name in step.names] if tensors else []


def _statistics(problem: _Problem, measuring: Measuring) -> dict[str, Tensor]:
    state = measuring.state
    if measuring.estimator == "microbatch":
        contributions(state)
    problem.estimator = _ESTIMATORS.index(measuring.estimator)
    problem.scopes, problem.warmup = len(measuring.scopes.names), measuring.warmup_steps
    return {
        "vgs_steps": state.steps,
        "second_moment": state.second_moment,
        "variance": state.variance,
        "signal": state.signal,
        "microbatch_squares": state.microbatch_squares,
        "microbatches": state.microbatches,
        "scope": measuring.scopes.index,
    }


def _table(
    problem: _Problem,
    step: Step,
    state: UPGDState,
    noisy: Sequence[int],
    measuring: Measuring | None,
) -> array[int]:
    """What the library is told tensor by tensor, a row for each field, that of the gradients first; the fields are set."""
    count = step.shape[1]
    listed = {
        "weight": step.weights,
        "utility": _own(step, state.utility),
        "first": _own(step, state.first_moment),
        "second": _own(step, state.second_moment),
        "mean": [] if measuring is None else _own(step, measuring.state.mean),
    }
    pointers = {field: tensors for field, tensors in listed.items() if tensors}
    columns = tuple(range(count)) if step.columns is None else tuple(step.columns.tolist())
    shapes = tuple(weight.shape for weight in step.weights)
    fixed = _structure(shapes, columns, tuple(step.options), tuple(noisy))
    table = array("q", [0] * count) + fixed + array("q", [t.data_ptr() for tensors in pointers.values() for t in tensors])
    address, _ = table.buffer_info()
    for place, field in enumerate(("gradient", *_STRUCTURE, *pointers)):
        setattr(problem, field, address + place * count * table.itemsize)
    return table


_STRUCTURE = ("sizes", "row_lengths", "column", "gating", "protecting", "adaptive_noise", "noise")


@functools.lru_cache(maxsize=64)
def _structure(
    shapes: tuple[torch.Size, ...], columns: tuple[int, ...], options: tuple[TensorOptions, ...], noisy: tuple[int, ...]
) -> array[int]:
    """The rows of the table that stay from step to step, in the order of `_STRUCTURE`."""
    places = {k: place for place, k in enumerate(noisy)}
    rows = (
        [shape[1:].numel() for shape in shapes],
        [shape[-1] if len(shape) > 1 else 1 for shape in shapes],
        columns,
        [_GATINGS.index(option.gating) for option in options],
        [int(option.protecting) for option in options],
        [int(option.adaptive_noise) for option in options],
        [places.get(k, -1) for k in range(len(shapes))],
    )
    return array("q", itertools.chain.from_iterable(rows))
