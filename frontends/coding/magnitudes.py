"""How large the weights are that are not zero: by the mean, of those already coded, in their filter and channel and at
their tap.

Means add up in logarithms. Weights that are expected to be of like size share a distribution: at first a geometric one
of that mean, then what came. A magnitude is coded as one of a few classes, exact ones for small magnitudes, and bits
within a class.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from . import ans
from .fixed_point import BIT, log2, power_of_two
from .streams import Stream, code_bits
from .tallies import COLUMN, ROW, TAP, WEIGHT_BITS, Tally, grouped

_LEVELS = 16
_LEVEL_BITS = 2
"""Distributions are for means 2^-2 bits apart."""
_STEP_BITS = BIT.bit_length() - 1 - _LEVEL_BITS

_EXACT_BITS = 4
_EXACT = 1 << _EXACT_BITS
"""Magnitudes beyond the least, below this, are classes of their own; from there on a power of two has four."""
_QUARTER_BITS = 2

_TRUST = 96
"""Weights of a level that count as much as the tensor."""

_SMOOTH = 64
"""Weights of the tensor that count as much as the geometric distribution."""

_PRIOR = 2
"""Weights of the tensor's mean that are added to every sum."""

_SHARING = 16
"""Weights a class, with which neighbours count half as much as at first."""

_PARTS = 6
"""Of the weights: each but the first is as long as all before it."""

_MOST = 1 << 18
"""Weights at a time."""

_SHARED = 4
"""Weights, at least, that a filter, channel or tap has, if it is to tell anything of another one."""

_CAPPED = 1 << 20
"""Magnitudes count as this at most."""

_WEIGHT = 4
"""Of each kind of evidence, in 16ths."""


@dataclass(frozen=True)
class Span:
    """Of the magnitudes of a tensor's weights that are not zero.

    Attributes:
        least, largest: of them. level: twice the logarithm, to base 2, of 16 times their mean beyond the least.
    """

    least: int
    largest: int
    level: int

    @classmethod
    def of(cls, magnitudes: NDArray[np.int64]) -> Span:
        """Of some magnitudes; of none as of one of 1."""
        if not len(magnitudes):
            return cls(1, 1, 0)
        least = int(magnitudes.min())
        mean = 16 * int((magnitudes - least).sum()) // len(magnitudes)
        return cls(least, int(magnitudes.max()), int(log2(np.array([max(mean, 1)]))[0]) * 2 // BIT)

    @property
    def mean(self) -> int:
        """About the mean beyond the least, in 16ths."""
        return max(1, power_of_two(self.level, 1) >> 32)


def code_magnitudes(
    stream: Stream,
    mask: NDArray[np.bool_],
    span: Span,
    magnitudes: NDArray[np.int64] | None,
) -> NDArray[np.uint32]:
    """Write or read magnitudes of the weights that are not zero, in C order.

    Args:
        mask: (taps, filters, channels). magnitudes: to write.
    """
    count = int(np.count_nonzero(mask))
    # Magnitudes of 32 bits, places of fewer than 31: of a large tensor these are most of what is held.
    excess = np.zeros(count, np.uint32)
    if span.largest > span.least:
        places = _places(mask, count)
        evidence = _Means(mask.shape, span)
        levels = _Levels(span)
        for part in parts(count):
            keys = evidence.keys(places[part])
            given = None if magnitudes is None else magnitudes[part] - span.least
            excess[part] = found = levels.code(stream, evidence.beyond(keys), given)
            evidence.add(keys, found)
    excess += np.uint32(span.least)
    return excess


def _places(mask: NDArray[np.bool_], count: int) -> NDArray[np.int32]:
    """Of what is not zero in it, tap by tap."""
    places, begin = np.empty(count, np.int32), 0
    for tap, plane in enumerate(mask.reshape(len(mask), -1)):
        found = np.flatnonzero(plane)
        places[begin : begin + len(found)] = found + tap * plane.size
        begin += len(found)
    return places


def parts(count: int) -> Iterator[slice]:
    """Weights spread over all, then those between them."""
    step = 1 << (_PARTS - 1)
    for first, every in ((0, step), *((step >> i, 2 * step >> i) for i in range(1, _PARTS))):
        long = every * _MOST
        for begin in range(first, count, long):
            yield slice(begin, min(begin + long, count), every)


class _Means:
    """Sums of magnitudes beyond the least, and of how many."""

    def __init__(self, shape: tuple[int, ...], span: Span) -> None:
        self.shape, self.mean = shape, span.mean
        sizes, each = {ROW: shape[1], COLUMN: shape[2], TAP: shape[0]}, math.prod(shape)
        self.tallies = {kind: Tally(size) for kind, size in sizes.items() if size > 1 and _SHARED * size <= each}

    def keys(self, places: NDArray[np.int32]) -> dict[int, NDArray[np.intp]]:
        """Of weights, by kind of evidence; as numpy wants them."""
        _, rows, columns = self.shape
        # By quotients alone, which numpy makes several at a time.
        line = places // columns
        tap = line // rows
        keys = {ROW: line - tap * rows, COLUMN: places - line * columns, TAP: tap}
        return {kind: of_weights.astype(np.intp) for kind, of_weights in keys.items()}

    def add(self, keys: dict[int, NDArray[np.intp]], found: NDArray[np.int64]) -> None:
        capped = np.minimum(found, _CAPPED).astype(np.float64)
        for kind, tally in self.tallies.items():
            tally.add(keys[kind], capped)

    def beyond(self, keys: dict[int, NDArray[np.intp]]) -> NDArray[np.int32]:
        """By how much more than the tensor's mean is expected of each weight, in 64ths of a bit."""
        base = int(log2(np.array([self.mean]))[0]) - 4 * BIT
        total = np.zeros(len(keys[ROW]), np.int32)
        for kind, tally in self.tallies.items():
            mean = tally.log_mean(keys[kind], 16, (_PRIOR * self.mean, 16 * _PRIOR))
            total += (mean - base) * _WEIGHT
        return total >> WEIGHT_BITS


class _Levels:
    """Distributions of classes of magnitudes by the mean that is expected, relative to that of the tensor."""

    def __init__(self, span: Span) -> None:
        self.classes = int(class_of(np.array([span.largest - span.least]))[0]) + 1
        self.began = _geometric(span.mean, self.classes)
        self.all = np.zeros(self.classes, np.int64)
        self.counts = np.zeros((_LEVELS, self.classes), np.int64)

    def code(self, stream: Stream, beyond: NDArray[np.int32], excess: NDArray[np.int64] | None) -> NDArray[np.int64]:
        """Write or read some magnitudes beyond the least, level by level; only then levels move.

        Args:
            beyond: how much more than of the tensor is expected, in 64ths of a bit.
        """
        numbers = np.clip((beyond >> _STEP_BITS) + _LEVELS // 2, 0, _LEVELS - 1).astype(np.uint8)
        order, groups = grouped(numbers)
        values = None if excess is None else excess[order]
        classes = None if values is None else class_of(values).astype(np.int32)
        in_order = np.zeros(len(numbers), np.int32)
        of_tensor = self._of_tensor()
        for number, part in groups:
            weights = self.counts[number] + of_tensor * _TRUST
            model = ans.categorical(weights / (_TRUST + self.counts[number].sum()))
            in_order[part] = stream.code(model, part, classes)
            self.counts[number] += np.bincount(in_order[part], minlength=self.classes)
        self.all += np.bincount(in_order, minlength=self.classes)
        found = np.empty(len(numbers), np.int64)
        found[order] = _within(stream, in_order, values)
        return found

    def _of_tensor(self) -> NDArray[np.float64]:
        """Geometric, moved by what came, of which each class has a share of what its neighbours have, less and less."""
        beside = np.concatenate([[0, 0], self.all, [0, 0]])
        shared = (beside[:-4] + 2 * beside[1:-3] + 3 * beside[2:-2] + 2 * beside[3:-1] + beside[4:]) / 9
        seen = int(self.all.sum())
        trusted = seen / (seen + _SHARING * self.classes)
        weights = self.all * trusted + shared * (1 - trusted) + self.began * _SMOOTH
        return weights / _sum(weights)


def class_of(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of magnitudes beyond the least."""
    exponent = np.frexp(np.maximum(values, 1).astype(np.float64))[1].astype(np.int64) - 1
    quarter = (values >> np.maximum(exponent - _QUARTER_BITS, 0)) - (1 << _QUARTER_BITS)
    return np.where(values < _EXACT, values, _EXACT + ((exponent - _EXACT_BITS) << _QUARTER_BITS) + quarter)


def _first_of(number: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The least value of a class, and how many bits tell its values apart."""
    beyond = np.maximum(number - _EXACT, 0)
    bits = (beyond >> _QUARTER_BITS) + _EXACT_BITS - _QUARTER_BITS
    first = ((beyond & (1 << _QUARTER_BITS) - 1) + (1 << _QUARTER_BITS)) << bits
    is_exact = number < _EXACT
    return np.where(is_exact, number, first), np.where(is_exact, 0, bits)


def _within(stream: Stream, classes: NDArray[np.int32], values: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """Values of classes: the least, and bits of equal probability."""
    first = classes.astype(np.int64)
    if classes.max(initial=0) < _EXACT:
        return first
    first, bits = _first_of(first)
    for count in np.unique(bits[bits > 0]):
        members = np.flatnonzero(bits == count)
        rest = None if values is None else values[members] - first[members]
        first[members] += code_bits(stream, int(count), len(members), rest)
    return first


def _geometric(mean: int, classes: int) -> NDArray[np.float64]:
    """Of a mean in 16ths, by class; by products, sums and quotients alone, which are the same everywhere."""
    ratio = mean / (mean + 16)
    first = _first_of(np.arange(classes + 1, dtype=np.int64))[0]
    tails = [_power(ratio, int(bound)) for bound in first]
    return np.array([max(here - beyond, 1e-9) for here, beyond in pairwise(tails)])


def _sum(values: NDArray[np.float64]) -> float:
    """One after the other: numpy adds in an order of its own, and sum() makes up for rounding from Python 3.12 on."""
    return list(accumulate(values.tolist()))[-1]


def _power(base: float, exponent: int) -> float:
    """By squaring."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result
