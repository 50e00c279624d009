"""Standard-normal numbers from a counter-based generator: a function of (key, tensor, place), in any order, on any device.

Philox-4x32 with 7 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 4 and table 2: the
fewest rounds that pass BigCrush), turned into normal numbers in pairs (Box & Muller 1958). A member draws one key a step from
its own generator; the numbers follow from that key whatever the population, the number of threads or the path that computes
them. `_upgd_kernel.h` computes the same numbers, to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

ROUNDS = 7
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_LANES = 16
"""Counters side by side; each gives four numbers, so that 64 successive places belong together."""
_SLICE = 1 << 16
"""Counters worked on at once, so that they stay in a cache."""


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

    Number i of tensor k of a member is made of the words of counter ``(16·(i // 64) + i % 16, k, 0, 0)`` under the member's
    key: with q = (i // 16) % 4, words 0 and 1 where q < 2, else words 2 and 3, by cosine where q is even, else by sine.
    """
    device = tensors[0].device
    lengths = [tensor[0].numel() for tensor in tensors]
    blocks = [-(-length // (4 * _LANES)) for length in lengths]
    place = torch.cat([torch.arange(count * _LANES, device=device) for count in blocks])
    index = torch.cat([torch.full((count * _LANES,), k, device=device) for k, count in enumerate(blocks)])
    # Half-precision numbers would be too coarse for the logarithm and the angle.
    precise = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    members = [_normal(key, place, index, precise) for key in keys.tolist()]
    noise = []
    for parts, tensor, length in zip(
        zip(*(numbers.split([4 * _LANES * count for count in blocks]) for numbers in members), strict=True),
        tensors,
        lengths,
        strict=True,
    ):
        noise.append(torch.stack([part[:length] for part in parts]).view(tensor.shape).to(tensor.dtype))
    return noise


def _normal(key: int, place: Int[Tensor, "C"], index: Int[Tensor, "C"], dtype: torch.dtype) -> Float[Tensor, "N"]:
    rows = torch.empty(4, place.numel(), dtype=dtype, device=place.device)
    for begin in range(0, place.numel(), _SLICE):
        part = slice(begin, begin + _SLICE)
        zero = torch.zeros_like(place[part])
        words = philox([place[part], index[part], zero, zero], key)
        for row, numbers in enumerate((*box_muller(words[0], words[1], dtype), *box_muller(words[2], words[3], dtype))):
            rows[row, part] = numbers
    return rows.view(4, -1, _LANES).transpose(0, 1).reshape(-1)


def philox(counter: Sequence[Int[Tensor, "C"]], key: int, rounds: int = ROUNDS) -> list[Int[Tensor, "C"]]:
    """Philox-4x32: four random words for each counter of four words, all in [0, 2³²) held in int64.

    Args:
        counter: the words, lowest first.
        key: of 64 bits, lower word first.
        rounds: of multiplication and exchange.
    """
    words = list(counter)
    for number in range(rounds):
        low_key, high_key = (((key >> shift) + number * weyl) & _WORD for shift, weyl in zip((0, 32), _WEYL, strict=True))
        # The product of two words wraps around the sign, which leaves its bits in place.
        first, second = words[0] * _MULTIPLIERS[0], words[2] * _MULTIPLIERS[1]
        words[0] = (second >> 32).bitwise_xor_(words[1]).bitwise_xor_(low_key).bitwise_and_(_WORD)
        words[2] = (first >> 32).bitwise_xor_(words[3]).bitwise_xor_(high_key).bitwise_and_(_WORD)
        words[1], words[3] = second, first
    return [words[0], words[1] & _WORD, words[2], words[3] & _WORD]


def box_muller(
    radius: Int[Tensor, "C"], angle: Int[Tensor, "C"], dtype: torch.dtype
) -> tuple[Float[Tensor, "C"], Float[Tensor, "C"]]:
    """Two independent normal numbers from two random words: ``√(−2 ln u)·(cos θ, sin θ)``.

    u is uniform in (0, 1], of 31 bits, so that its logarithm is finite and the largest number 6.66; θ in [−π, π).
    """
    # By way of int32, whose conversion is vectorised.
    uniform = (radius.to(torch.int32) >> 1).bitwise_and_(_WORD >> 1).to(dtype).add_(0.5).mul_(2.0**-31)
    length = uniform.log_().mul_(-2).sqrt_()
    theta = angle.to(torch.int32).to(dtype).mul_(math.pi * 2.0**-31)
    return theta.cos().mul_(length), theta.sin_().mul_(length)
