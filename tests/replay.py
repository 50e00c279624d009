"""A CUDA graph on the CPU: operations are noted once and repeated on the same tensors, without the Python around them."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hardy import graphs
from hardy.graphs import Captured

aten = torch.ops.aten
NEED_THE_HOST = {
    "_local_scalar_dense": "looks at a value",
    "nonzero": "has a result whose size follows from values",
    "masked_select": "has a result whose size follows from values",
    "_unique2": "has a result whose size follows from values",
    "bincount": "has a result whose size follows from values",
    "repeat_interleave": "has a result whose size follows from values",
    "equal": "looks at values",
    "lift_fresh": "brings numbers from the host",
}
RANDOM = ("normal_", "uniform_", "random_", "randn", "rand", "randint", "randperm", "bernoulli", "multinomial")


class CaptureError(RuntimeError):
    """What CUDA would refuse while a graph is captured."""


class Recording(TorchDispatchMode):
    """Notes every operation that runs inside it; those that no CUDA graph can hold are errors."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in NEED_THE_HOST:
            raise CaptureError(f"{func} {NEED_THE_HOST[name]}")
        if name in RANDOM:
            raise CaptureError(f"{func} draws random numbers, which a replay would not draw from the members' generators")
        if name in ("index", "index_put_", "index_put"):
            for index in args[1]:
                if index is not None and index.dtype is torch.bool:
                    raise CaptureError(f"{func} takes a mask, and so a size that follows from values")
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, before in self.calls:
            for old, new in zip(tree_leaves(before), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def captured_on_the_cpu(monkeypatch: pytest.MonkeyPatch):
    """Let every `Captured` be recorded and replayed; returns the recordings made."""
    recordings = {}

    def call(self):
        if self in recordings:
            recordings[self].replay()
            return self._result
        self._calls += 1
        with graphs.without_asking():
            if self._calls <= graphs.WARMUP:
                return self._function()
            recording = Recording()
            with recording:
                self._result = self._function()
        recordings[self] = recording
        return self._result

    monkeypatch.setattr(Captured, "__call__", call)
    monkeypatch.setenv("HARDY_COMPILED", "0")  # what the compiled library does is no operation of PyTorch
    return recordings
