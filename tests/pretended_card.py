"""A pretended graphics card: tensors that say they are on CUDA, are computed on the CPU, and keep a card's rules.

An operation on tensors of both sides is an error, as on a card; a number of the host without axes, which some operations of a
card take, is one too. While a graph is captured so is what `replay.py` lists. Every operation that brings numbers from one
side to the other is counted. The whole of `hardy.graphs` runs as it is, on the stand-ins for `torch.cuda` made here.

What it does not pretend: CUDA's own capture with its memory, kernels and speed, work that is still under way, and addresses.

`pretended_card.cpp` has to be loaded before PyTorch; see `on_a_pretended_card.py`.
"""

from __future__ import annotations

import contextlib
from collections import Counter

import torch
from replay import NEED_THE_HOST, CaptureError, Recording
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CARD = torch.device("cuda", 0)
COPIES = ("copy_", "_to_copy", "_foreach_copy_")
INDEXED = ("index", "index_put", "index_put_")
ASKING = NEED_THE_HOST.keys() - {"lift_fresh"}
"""Operations for which the host waits to know numbers of the card; so it does for a mask as an index."""
aten = torch.ops.aten


class MixedDevicesError(RuntimeError):
    """What CUDA refuses: one operation on tensors of the card and of the host."""


class OnCard(torch.Tensor):
    """A tensor of the card, by the tensor of the host that holds its numbers."""

    @staticmethod
    def __new__(cls, inner):
        found = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, device=CARD
        )
        found.inner = inner
        return found

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def tolist(self):
        """PyTorch has none for a subclass."""
        return self.cpu().tolist()


class Card(TorchDispatchMode):
    """While this is active there is a card."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


crossings: Counter[str] = Counter()
"""How often numbers went ``to the card``, ``to the host``, or were ``asked`` for, while the host waited."""
_recording: Recording | None = None


def _lstm_cell(from_input, from_hidden, cell):
    into, keep, new, out = (from_input + from_hidden).chunk(4, -1)
    into, keep, new, out = into.sigmoid(), keep.sigmoid(), new.tanh(), out.sigmoid()
    after = keep * cell + into * new
    return out * after.tanh(), after, torch.cat([into, keep, new, out], -1)


def _lstm_cell_backward(grad_hidden, grad_cell, before, after, gates, has_bias):
    assert not has_bias
    into, keep, new, out = gates.chunk(4, -1)
    squashed = after.tanh()
    grad = grad_cell + grad_hidden * out * (1 - squashed**2)
    parts = (
        grad * new * into * (1 - into),
        grad * before * keep * (1 - keep),
        grad * into * (1 - new**2),
        grad_hidden * squashed * out * (1 - out),
    )
    return torch.cat(parts, -1), grad * keep, None


ONLY_ON_CARDS = {
    aten._thnn_fused_lstm_cell.default: _lstm_cell,
    aten._thnn_fused_lstm_cell_backward_impl.default: _lstm_cell_backward,
}
"""Operations that PyTorch has for CUDA alone, by what they are defined to return."""


def run(func, args, kwargs):
    """One operation as on a machine with a card."""
    name = func.overloadpacket.__name__
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    card = [value for value in tensors if isinstance(value, OnCard)]
    host = [value for value in tensors if not isinstance(value, OnCard)]
    target = kwargs.pop("device", None) if kwargs else None
    on_card = bool(card) if target is None else torch.device(target).type == "cuda"
    _count_and_refuse(func, name, args, card, host, on_card)
    operation = ONLY_ON_CARDS.get(func, func)
    inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
    with contextlib.nullcontext() if _recording is None or not on_card else _recording:
        result = operation(*inner_args, **inner_kwargs)
    wrappers = {id(value.inner): value for value in card}

    def wrapped(value):
        if not isinstance(value, torch.Tensor) or id(value) in wrappers:
            return wrappers.get(id(value), value)
        return OnCard(value) if on_card else value

    return args[0] if name == "copy_" else tree_map(wrapped, result)


def _inner(value):
    return value.inner if isinstance(value, OnCard) else value


def _count_and_refuse(func, name, args, card, host, on_card):
    crossing, tensors = None, card + host
    if card and (name in ASKING or (name in INDEXED and any(_is_mask(value) for value in args[1]))):
        crossing = "asked"
    elif name in COPIES and tensors and (bool(card) != on_card or (card and host)):
        into_card = on_card if name == "_to_copy" else isinstance(tree_leaves(args)[0], OnCard)
        crossing = "to the card" if into_card else "to the host"
    elif name in INDEXED and isinstance(args[0], OnCard):
        if any(not isinstance(value, OnCard) and value.ndim for value in args[2:3]):
            raise MixedDevicesError(f"{func} puts numbers of the host into a tensor of the card")
        # Indices may be the host's, and are moved.
        crossing = "to the card" if any(value is not None and not isinstance(value, OnCard) for value in args[1]) else None
    elif card and host and name != "fill_":  # with a number of Python, which is on the host
        raise MixedDevicesError(f"{func} on tensors of both sides: {[(t.device.type, tuple(t.shape)) for t in tensors]}")
    if crossing is not None:
        crossings[crossing] += 1
        if _recording is not None:
            raise CaptureError(f"{func} in a graph that is captured: {crossing}")


def _is_mask(index):
    return index is not None and index.dtype is torch.bool


class _Stream:
    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass


class _Graph:
    captured = 0
    done = False

    def replay(self):
        # While it is captured a graph computes nothing, but a recording does: that is the work of the first replay.
        if self.done:
            self.recording.replay()
        self.done = True


@contextlib.contextmanager
def _capture(graph):
    global _recording
    graph.recording = _recording = Recording()
    try:
        yield
        _Graph.captured += 1
    finally:
        _recording = None


def graphs_captured():
    """How many graphs there are so far."""
    return _Graph.captured


def pretend():
    """Let ``torch.cuda`` have this card, for the rest of the process."""
    cuda = torch.cuda
    cuda._lazy_init = lambda: None
    cuda.is_available = lambda: True
    cuda.is_current_stream_capturing = lambda: _recording is not None
    cuda.synchronize = lambda device=None: None
    cuda.Stream, cuda.CUDAGraph, cuda.graph = _Stream, _Graph, _capture
    cuda.current_stream = _Stream
    cuda.stream = lambda stream: contextlib.nullcontext()
    # Made from numbers of Python a tensor starts on the host, and PyTorch then moves it below what Python sees.
    for name in ("tensor", "as_tensor"):
        setattr(torch, name, _made_then_moved(getattr(torch, name)))
    # A module on the card holds tensors of the card, not its own with their insides exchanged.
    torch.__future__.set_swap_module_params_on_conversion(True)


def _made_then_moved(make):
    def make_and_move(data, *, device=None, **options):
        if isinstance(data, OnCard):
            return data.to(device=device or data.device, dtype=options.get("dtype") or data.dtype)
        found = make(data, **options)
        return found if device is None else found.to(device)

    return make_and_move
