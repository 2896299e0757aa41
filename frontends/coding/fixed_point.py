"""Logarithms and probabilities in integers, so that every platform models, and therefore decodes, the same."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray

BIT = 64
"""Logarithms to base 2 are counted in parts of a bit, so many."""

ONE = 1 << 16
"""Probabilities are counted in parts of one, so many."""

_EXACT_BITS = 12


@cache
def _logarithms() -> NDArray[np.int32]:
    """``BIT * log2(n)`` rounded, for n below 2^12; 0 for 0."""
    # n ** (2 * BIT) has floor(2 * BIT * log2(n)) + 1 bits.
    halves = [0] + [(n ** (2 * BIT)).bit_length() - 1 for n in range(1, 1 << _EXACT_BITS)]
    return np.array([(half + 1) // 2 for half in halves], np.int32)


def log2(n: NDArray[np.integer]) -> NDArray[np.int32]:
    """``BIT * log2(n)`` of integers from 1 to 2^53, of whose binary digits the first twelve count."""
    exponent = np.frexp(n.astype(np.float64))[1]
    shift = np.maximum(exponent - _EXACT_BITS, 0)
    return _logarithms()[n >> shift] + shift.astype(np.int32) * BIT


def power_of_two(numerator: int, denominator_bits: int) -> int:
    """``2^32 * 2^(numerator / 2^denominator_bits)``, rounded down at every square root it takes."""
    whole, part = divmod(numerator, 1 << denominator_bits)
    guard = 128
    value, root = 1 << guard, 2 << guard
    for bit in reversed(range(denominator_bits)):
        root = math.isqrt(root << guard)
        if part >> bit & 1:
            value = value * root >> guard
    shift = 32 + whole - guard
    return value << shift if shift >= 0 else value >> -shift


def logistic(numerator: int, denominator_bits: int) -> int:
    """``ONE / (1 + 2^-x)`` rounded, x = numerator / 2^denominator_bits."""
    other = power_of_two(-numerator, denominator_bits)
    whole = (1 << 32) + other
    return (2 * ONE * (1 << 32) + whole) // (2 * whole)
