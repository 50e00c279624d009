"""Work that a device repeats without Python: functions captured in CUDA graphs, and what their code must keep to.

A captured function runs once in Python; after that its kernels are replayed on the very same addresses. So it may not look at a
tensor's values (`may_ask`), draw random numbers, or make anything that a later call must see but at addresses that stay.
On the CPU there is nothing to capture: the function runs each time, under the same rules, which is how they are tested.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
WARMUP = 2
"""Calls before the capture: libraries choose their kernels and take their memory in the first ones."""
_asking = True


def may_ask(tensor: Tensor) -> bool:
    """Whether Python may look at this tensor to save work: where that costs little, which is on the CPU, outside a capture."""
    return _asking and tensor.device.type == "cpu"


@contextmanager
def without_asking() -> Iterator[None]:
    """Code as on a device: `may_ask` says no."""
    global _asking
    before, _asking = _asking, False
    try:
        yield
    finally:
        _asking = before


class Captured(Generic[Result]):
    """A function of fixed tensors, captured on a CUDA device; each call does its work once.

    Args:
        function: takes nothing. It reads tensors that stay at their addresses, writes them in place, and returns tensors that
            the caller uses up before the next call.
        device: of those tensors.
    """

    def __init__(self, function: Callable[[], Result], device: torch.device) -> None:
        self._function = function
        self._device = device
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Result

    def __call__(self) -> Result:
        if self._graph is not None:
            self._graph.replay()
            return self._result
        self._calls += 1
        with without_asking():
            if self._device.type != "cuda" or self._calls <= WARMUP:
                return self._run()
            return self._capture()

    def _run(self) -> Result:
        if self._device.type != "cuda":
            return self._function()
        # As a capture will: on a stream of its own, or the memory of these calls would stay with the default one.
        stream, current = torch.cuda.Stream(self._device), torch.cuda.current_stream(self._device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            result = self._function()
        current.wait_stream(stream)
        return result

    def _capture(self) -> Result:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._result = self._function()
        except RuntimeError as error:
            warnings.warn(
                f"a CUDA graph could not be captured, so this work runs slower, call by call: {error}",
                RuntimeWarning,
                stacklevel=3,
            )
            self._device = torch.device("cpu")  # whatever comes now runs as it does where nothing can be captured
            return self._function()
        self._graph = graph
        graph.replay()  # the capture itself computes nothing
        return self._result


class CapturedCalls(Generic[Result]):
    """Calls of a captured function with arguments, which are copied into tensors of its own: one set and graph for each shape.

    Args:
        function: takes the arguments by name; otherwise as for `Captured`.
        device: of the arguments.
    """

    def __init__(self, function: Callable[[Mapping[str, Tensor]], Result], device: torch.device) -> None:
        self._function = function
        self._device = device
        self._prepared: dict[tuple[object, ...], tuple[dict[str, Tensor], Captured[Result]]] = {}

    def __call__(self, arguments: Mapping[str, Tensor]) -> Result:
        key = tuple((name, value.shape, value.dtype) for name, value in arguments.items())
        if key not in self._prepared:
            own = {name: torch.empty_like(value, memory_format=torch.contiguous_format) for name, value in arguments.items()}
            self._prepared[key] = own, Captured(lambda: self._function(own), self._device)
        own, captured = self._prepared[key]
        torch._foreach_copy_(list(own.values()), list(arguments.values()))
        return captured()
