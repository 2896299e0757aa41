"""Tensors of quantised weights to bytes and back."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from . import ans, floats
from .magnitudes import Span, code_magnitudes
from .significance import DENSITIES, MOST_PER_BYTE, WEIGHTS, code_mask, density_of
from .streams import Reader, Writer
from .tallies import Grid

_LEVEL_MOST = 72
"""Of the mean of codes of 32 bits."""

_MOST = 2**31
"""Magnitude of a code of 32 bits."""

_SIGNS = 1 << 20
"""To be read at a time."""

_HEAD_MOST = 13
"""Bytes."""


def encode(codes: NDArray[np.int32], scale: NDArray[np.float32] | None = None) -> bytes:
    """The stream: the same bytes for the same codes, on every platform; the scale's numbers behind them."""
    grid = Grid.of(codes.shape)
    values = grid.arrange(codes)
    return min((_encode(grid, values, scale, choice) for choice in range(len(WEIGHTS))), key=len)


def _encode(grid: Grid, values: NDArray[np.int32], scale: NDArray[np.float32] | None, choice: int) -> bytes:
    """With a choice of WEIGHTS."""
    mask = values != 0
    nonzeros = values[mask].astype(np.int64)
    magnitudes = np.abs(nonzeros)
    stream, span = Writer(), Span.of(magnitudes)
    density = density_of(mask)
    head = _head(span, density, choice)
    code_mask(stream, grid, density, mask, WEIGHTS[choice])
    code_magnitudes(stream, mask, span, magnitudes)
    stream.code(ans.bernoulli(0.5), slice(0, len(nonzeros)), (nonzeros < 0).astype(np.int32))
    if scale is not None:
        of_scale = floats.head_of(scale)
        floats.code_floats(stream, of_scale, len(scale), scale)
        head += of_scale
    return head + stream.finish()


def decode(
    data: bytes, shape: tuple[int, ...], scale: int | None = None
) -> tuple[NDArray[np.int32], NDArray[np.float32] | None]:
    """The codes, and the numbers behind them.

    Args:
        scale: how many numbers; None where there is nothing behind the codes.

    Raises:
        ValueError: for bytes that are no stream of codes.
    """
    span, density, choice, body = _split(data)
    of_scale, body = (b"", body) if scale is None else (body[: floats.HEAD], body[floats.HEAD :])
    grid, stream = Grid.of(shape), Reader(body)
    mask = code_mask(stream, grid, density, None, WEIGHTS[choice])
    found = code_magnitudes(stream, mask, span, None)
    if len(found) and found.max() > span.largest:
        raise ValueError("the stream holds a code beyond the largest")
    nonzeros = _signed(stream, found)
    numbers = None if scale is None else floats.code_floats(stream, of_scale, scale, None)
    stream.finish()
    result = _spread(nonzeros, mask)
    del mask, nonzeros, found
    return grid.restore(result, shape), numbers


def _spread(nonzeros: NDArray[np.int32], mask: NDArray[np.bool_]) -> NDArray[np.int32]:
    """In the places of a mask, plane by plane, zeros elsewhere: as ``result[mask] = nonzeros``, three times as fast."""
    result, begin = np.zeros(mask.shape, np.int32), 0
    for plane, present in zip(result.reshape(len(mask), -1), mask.reshape(len(mask), -1), strict=True):
        places = np.flatnonzero(present)
        plane[places] = nonzeros[begin : begin + len(places)]
        begin += len(places)
    return result


def _signed(stream: Reader, magnitudes: NDArray[np.uint32]) -> NDArray[np.int32]:
    """The magnitudes with the signs that come next, some at a time; in their place."""
    codes = magnitudes.view(np.int32)
    for begin in range(0, len(codes), _SIGNS):
        part = codes[begin : begin + _SIGNS]
        is_negative = stream.code(ans.bernoulli(0.5), slice(0, len(part)), None)
        # The magnitude 2^31 looks like its own negative.
        if part.min() < 0 and np.any((part < 0) & (is_negative == 0)):
            raise ValueError("the stream holds a code beyond the largest")
        # By a sign, not where it is negative: several at a time.
        part *= 1 - 2 * is_negative
    return codes


def _head(span: Span, density: int, choice: int) -> bytes:
    """Four numbers, seven bits a byte, the lowest first; the highest bit says that there are more."""
    head = bytearray()
    for number in (
        span.least - 1,
        span.largest - span.least,
        span.level,
        (density + DENSITIES) * len(WEIGHTS) + choice,
    ):
        while number >= 128:
            head.append(number & 127 | 128)
            number >>= 7
        head.append(number)
    return bytes(head)


def _split(data: bytes) -> tuple[Span, int, int, bytes]:
    """What the head says, and what is behind it."""
    numbers, number, shift = [], 0, 0
    for place, byte in enumerate(data[:_HEAD_MOST], start=1):
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            numbers.append(number)
            number = shift = 0
        if len(numbers) == 4:
            least, beyond, level = numbers[0] + 1, *numbers[1:3]
            density, choice = divmod(numbers[3], len(WEIGHTS))
            if least + beyond > _MOST or level > _LEVEL_MOST or density > 2 * DENSITIES:
                break
            return Span(least, least + beyond, level), density - DENSITIES, choice, data[place:]
    raise ValueError("the head of the stream of codes is damaged")


def most(length: int) -> int:
    """The most weights that so many bytes can stand for."""
    return MOST_PER_BYTE * (length + 8)


def longest(count: int) -> int:
    """The most bytes that so many weights and numbers of a scale can need: 60 bits each, and heads."""
    return 8 * count + 64
