"""Standard-normal numbers from a counter-based generator: a function of (key, tensor, place), in any order, on any device.

The counter goes through SplitMix64 (`hardy.splitmix`) under a key, and the two halves of each result become two normal numbers
(Box & Muller 1958). A member draws one key a step from its own generator; the numbers follow from that key whatever the
population, the number of threads or the path that computes them. `_upgd_kernel.h` computes the same numbers, to rounding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hardy.graphs import may_ask
from hardy.splitmix import products, split_mix_of_products

_LANES = 16
"""Counters side by side; each gives two numbers, so that 32 successive places belong together."""
_SLICE = 1 << 17
"""Counters worked on at once, so that they stay in a cache."""
_TENSOR = 40
"""Bits of the counter below those that number the tensor."""


class KeyedNormal:
    """Source of an update's noise: one key per member, and the numbers that follow from it.

    Args:
        draw: draws the keys, ``[P]``, each in [0, 2⁶³).
    """

    def __init__(self, draw: Callable[[], Int[Tensor, "P"]]) -> None:
        self.draw = draw

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Numbers of the tensors' shapes ``[P, ...]``, devices and dtypes."""
        return standard_normal(self.draw(), tensors)


def standard_normal(keys: Int[Tensor, "P"], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Independent standard-normal numbers of the shapes ``[P, ...]``, devices and dtypes of ``tensors``.

    Number i of tensor k of a member comes from the counter ``2⁴⁰·k + 16·(i // 32) + i % 16`` under the member's key, by cosine
    where ``i // 16`` is even, else by sine.
    """
    lengths = [tensor.numel() // len(keys) for tensor in tensors]
    sizes = [-(-length // (2 * _LANES)) * 2 * _LANES for length in lengths]
    # Half-precision numbers would be too coarse for the logarithm and the angle.
    precise = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    buffer = torch.empty(keys.shape[0], sum(sizes), dtype=precise, device=tensors[0].device)
    rows = buffer.view(len(keys), -1, 2, _LANES)
    counters = _products(tuple(size // 2 for size in sizes), buffer.device)
    if may_ask(keys):
        _fill_in_slices(rows, keys, counters)
    else:
        box_muller(split_mix_of_products(counters, keys[:, None, None]), rows)
    gaps = [number for size, length in zip(sizes, lengths, strict=True) for number in (length, size - length)]
    parts = zip(buffer.split_with_sizes(gaps, dim=1)[::2], tensors, strict=True)
    return [part.view(tensor.shape).to(tensor.dtype) for part, tensor in parts]


def _fill_in_slices(rows: Float[Tensor, "P rows 2 lanes"], keys: Int[Tensor, "P"], counters: Int[Tensor, "rows lanes"]) -> None:
    at_once = _SLICE // _LANES
    for key, own in zip(keys.tolist(), rows, strict=True):
        for out, part in zip(own.split(at_once), counters.split(at_once), strict=True):
            box_muller(split_mix_of_products(part, key), out)


def _products(counts: tuple[int, ...], device: torch.device) -> Int[Tensor, "rows lanes"]:
    """Those of each tensor's counters; the same in every step."""
    return (_recent_products if device.type == "cpu" else _kept_products)(counts, device)


def _make_products(counts: tuple[int, ...], device: torch.device) -> Int[Tensor, "rows lanes"]:
    starts = [k << _TENSOR for k in range(len(counts))]
    counters = [torch.arange(start, start + count, device=device) for start, count in zip(starts, counts, strict=True)]
    return products(torch.cat(counters)).view(-1, _LANES)


_recent_products = functools.lru_cache(maxsize=2)(_make_products)
_kept_products = functools.cache(_make_products)
"""On a device, where a captured graph goes on reading these addresses, none is ever dropped."""


def box_muller(bits: Int[Tensor, "*rows lanes"], out: Float[Tensor, "*rows 2 lanes"]) -> None:
    """Two independent normal numbers from 64 random bits each, which are used up: ``√(−2 ln u)·(cos θ, sin θ)``.

    u comes from the lower half, uniform in (0, 1], of 31 bits, so that its logarithm is finite and the largest number 6.66; θ
    from the upper half, in [−π, π).
    """
    # By way of int32, whose conversion is vectorised.
    uniform = bits.to(torch.int32).bitwise_right_shift_(1).bitwise_and_((1 << 31) - 1).to(out.dtype).add_(0.5).mul_(2.0**-31)
    length = uniform.log_().mul_(-2).sqrt_()
    theta = bits.bitwise_right_shift_(32).to(torch.int32).to(out.dtype).mul_(math.pi * 2.0**-31)
    torch.mul(length, theta.cos(), out=out[..., 0, :])
    torch.mul(length, theta.sin_(), out=out[..., 1, :])
