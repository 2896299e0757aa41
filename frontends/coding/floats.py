"""Short vectors of float32: biases, and the scales that BatchNorm leaves.

Exponents are coded by how far they are below the largest, by what came before; of the fraction only as many digits as
any of the numbers has, so that numbers rounded to a few digits are short.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from . import ans
from .streams import Reader, Stream, Writer, code_bits

MOST = 1 << 16
"""Numbers of a vector. More of them do not come from biases, and plain Python would take long."""

HEAD = 3
"""Bytes."""

_FRACTION = 23
_PRIOR = 4
"""Numbers that count as much as what came."""

_SIGNED = 32


def encode(values: NDArray[np.float32]) -> bytes:
    """The stream: the same bytes for the same numbers, on every platform."""
    head, stream = head_of(values), Writer()
    code_floats(stream, head, len(values), values)
    return head + stream.finish()


def decode(data: bytes, count: int) -> NDArray[np.float32]:
    """So many numbers.

    Raises:
        ValueError: for bytes that are no stream of them.
    """
    stream = Reader(data[HEAD:])
    values = code_floats(stream, data[:HEAD], count, None)
    stream.finish()
    return values


def head_of(values: NDArray[np.float32]) -> bytes:
    """What a stream says before the numbers: how many digits, whether there are signs, the largest exponent, and how
    far the least is below it."""
    bits = _bits(values)
    fractions = int(np.bitwise_or.reduce(bits & (1 << _FRACTION) - 1)) if len(bits) else 0
    digits = _FRACTION - ((fractions & -fractions).bit_length() - 1) if fractions else 0
    exponents = _exponents(bits) if len(bits) else np.zeros(1, np.int64)
    is_signed = bool((bits >> 31).any())
    largest = int(exponents.max())
    return bytes([digits | (_SIGNED if is_signed else 0), largest, largest - int(exponents.min())])


def code_floats(stream: Stream, head: bytes, count: int, values: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """Write or read so many numbers.

    Raises:
        ValueError: the head is none.
    """
    if len(head) != HEAD:
        raise ValueError("the head of a stream of numbers is damaged")
    flags, largest, span = head
    digits, is_signed = flags % _SIGNED, flags & _SIGNED
    if digits > _FRACTION or flags >= 2 * _SIGNED or span > largest:
        raise ValueError("the head of a stream of numbers is damaged")
    bits = None if values is None else _bits(values)
    below = None if bits is None else (largest - _exponents(bits)).astype(np.int32)
    result = (largest - _code_exponents(stream, span, count, below).astype(np.int64)) << _FRACTION
    if is_signed:
        result |= code_bits(stream, 1, count, None if bits is None else bits >> 31) << 31
    rest = None if bits is None else (bits & (1 << _FRACTION) - 1) >> _FRACTION - digits
    result |= code_bits(stream, digits, count, rest) << _FRACTION - digits
    return result.astype(np.uint32).view(np.float32)


def _code_exponents(stream: Stream, span: int, count: int, below: NDArray[np.int32] | None) -> NDArray[np.int32]:
    found = np.zeros(count, np.int32)
    if not span:
        return found
    distances = np.arange(span + 1, dtype=np.float64)
    prior = 1 / ((distances + 1) * (distances + 2))
    counts = np.zeros(span + 1)
    for part in _parts(count):
        found[part] = stream.code(ans.categorical(counts + _PRIOR * prior), part, below)
        counts += np.bincount(found[part], minlength=span + 1)
    return found


def _parts(count: int) -> Iterator[slice]:
    """Each but the first as long as all before it."""
    begin, end = 0, 1
    while begin < count:
        yield slice(begin, min(end, count))
        begin, end = end, 2 * end


def _bits(values: NDArray[np.float32]) -> NDArray[np.int64]:
    return np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.int64)


def _exponents(bits: NDArray[np.int64]) -> NDArray[np.int64]:
    return bits >> _FRACTION & 255


def shortened(values: NDArray[np.float32], digits: int) -> NDArray[np.float32]:
    """Numbers rounded to so many binary digits behind the point, the one before it not counted; ties away from 0. Those
    below 2^-126 have fewer digits to begin with."""
    half = 1 << _FRACTION - digits >> 1
    bits = _bits(values) + half & ~((1 << _FRACTION - digits) - 1)
    rounded = (bits & 0xFFFFFFFF).astype(np.uint32).view(np.float32).reshape(np.shape(values))
    return np.where(np.isfinite(values) & np.isfinite(rounded), rounded, values)
