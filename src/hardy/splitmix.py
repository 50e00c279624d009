"""SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators", figure 17) on tensors.

A counter-based generator, which passes BigCrush: its output is a function of (key, counter), the same on every device.
"""

from __future__ import annotations

from jaxtyping import Float64, Int
from torch import Tensor

_INCREMENT = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def split_mix(counter: Int[Tensor, "*#shape"], key: int | Int[Tensor, "*#shape"]) -> Int[Tensor, "*shape"]:
    """Output number ``counter`` of SplitMix64 started with ``key``, 64 random bits in an int64.

    Products and sums wrap around, as they do without a sign.
    """
    return split_mix_of_products(products(counter), key)


def products(counter: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """What `split_mix_of_products` wants to know of a counter: the same whatever the key."""
    return counter * _signed(_INCREMENT)


def split_mix_of_products(products: Int[Tensor, "*#shape"], key: int | Int[Tensor, "*#shape"]) -> Int[Tensor, "*shape"]:
    """`split_mix` of the counters whose `products` are given."""
    bits = products + (_signed(key + _INCREMENT) if isinstance(key, int) else key + _signed(_INCREMENT))
    for shift, factor in _ROUNDS:
        _xor_shifted_(bits, shift).mul_(_signed(factor))
    return _xor_shifted_(bits, 31)


def uniform(bits: Int[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
    """Numbers uniform in [0, 1), the upper 53 of 64 random bits each."""
    return ((bits >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def _xor_shifted_(bits: Tensor, shift: int) -> Tensor:
    return bits.bitwise_xor_((bits >> shift).bitwise_and_((1 << 64 - shift) - 1))


def _signed(number: int) -> int:
    """The int64 with the same lower 64 bits."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)
