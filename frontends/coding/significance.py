"""Which weights are not zero: each has a probability by how many are not zero, of those already coded, in its filter,
in its channel, at its tap and in its kernel, beside it in particular.

Evidence adds up in log-odds, as of independent observations, but less of it, as it is not; weights of like log-odds are
of one class and share a probability, which adapts to what came. Weights are coded tap by tap, and each tap in stripes
across filters and channels, thin ones first, so that soon something is known of all; within a stripe all are modelled
at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from . import ans
from .fixed_point import BIT, ONE, log2, logistic
from .streams import Stream
from .tallies import COLUMN, KERNEL, NEAR, ROW, TAP, WEIGHT, WEIGHT_BITS, Grid, grouped

T = TypeVar("T", bound=np.generic)

_CLASSES = 64
_CLASS_BITS = 2
"""Classes are 2^-2 bits of log-odds apart."""
_STEP_BITS = BIT.bit_length() - 1 - _CLASS_BITS

_LEAST = ONE >> 10
"""Of probabilities: a weight costs at least 0.0014 bits, which bounds what a stream can stand for."""

MOST_PER_BYTE = 5676
"""Weights that a byte can stand for: -8 / log2(1 - 2^-10)."""

_TRUST = 32
"""Weights by which a class has moved halfway to what came."""

_FULL = 256
"""Log-odds are of counts in 256ths."""

DENSITIES = 32
"""Densities of a tensor that are told apart, below and above a half: quarters of a bit of log-odds."""

_PRIOR = 2
"""Weights of the tensor's density that are added to every count."""

_FIRST, _LATER = 64, 4
"""The first stripe has one weight of so many, at most, of the first tap and of the others."""

_LEAST_STRIPE = 128
"""Weights of the first stripe, at least."""

_MOST_BLOCK = 1 << 20
"""Weights of a block of a tap, so that what is computed on the way stays small."""

WEIGHTS = ((7, 7, 8, 4, 8), (7, 7, 8, 12, 8))
"""Of the kinds of evidence, in 16ths: where zeros are anywhere, and where whole kernels are zero. Fitted to networks of
several kinds; a few more or less change hardly anything."""


@dataclass(frozen=True)
class Stripe:
    """Some weights of a block of a tap: of its row i those of every ``every``-th column, from ``number + i`` on.

    Attributes:
        rows, columns: of the block, each a multiple of ``every`` long but for the last rows.
    """

    tap: int
    rows: slice
    columns: slice
    every: int
    number: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, and weights of a row."""
        return self.rows.stop - self.rows.start, (self.columns.stop - self.columns.start) // self.every

    def pieces(self) -> Iterator[tuple[slice, slice]]:
        """Rows and columns, within the block, of weights that lie regularly."""
        for first in range(min(self.every, self.shape[0])):
            yield slice(first, None, self.every), slice((self.number + first) % self.every, None, self.every)

    def take(self, plane: NDArray[T]) -> NDArray[T]:
        """The stripe of a tap."""
        block, stripe = plane[self.rows, self.columns], np.empty(self.shape, plane.dtype)
        for rows, columns in self.pieces():
            stripe[rows] = block[rows, columns]
        return stripe

    def add(self, plane: NDArray[np.uint8], stripe: NDArray[np.uint8]) -> None:
        """Add to the stripe of a tap."""
        block = plane[self.rows, self.columns]
        for rows, columns in self.pieces():
            block[rows, columns] += stripe[rows]

    def put(self, plane: NDArray[T], stripe: NDArray[T]) -> None:
        """Set the stripe of a tap."""
        block = plane[self.rows, self.columns]
        for rows, columns in self.pieces():
            block[rows, columns] = stripe[rows]


def stripes(grid: Grid) -> Iterator[Stripe]:
    """All weights, each once."""
    for tap in range(grid.taps):
        every = _every(grid, _FIRST if tap == 0 else _LATER)
        wide = max(1, min(grid.columns, _MOST_BLOCK // every**2 * every))
        tall = max(1, _MOST_BLOCK // wide // every) * every
        for gap, number in _passes(every):
            for top in range(0, grid.rows, tall):
                for left in range(0, grid.columns, wide):
                    rows = slice(top, min(top + tall, grid.rows))
                    yield Stripe(tap, rows, slice(left, min(left + wide, grid.columns)), gap, number)


def _passes(every: int) -> Iterator[tuple[int, int]]:
    """Gaps and first numbers of stripes: one in ``every``, then those in the middle between all before."""
    yield every, 0
    while every > 1:
        yield every, every // 2
        every //= 2


def _every(grid: Grid, most: int) -> int:
    """The first stripe of a tap is one weight of so many: a power of two."""
    return next(
        every
        for every in (64, 32, 16, 8, 4, 2, 1)
        if every == 1
        or (
            every <= min(most, grid.rows)
            and grid.columns % every == 0
            and grid.rows * grid.columns >= every * _LEAST_STRIPE
        )
    )


def code_mask(
    stream: Stream, grid: Grid, density: int, mask: NDArray[np.bool_] | None, weights: Sequence[int]
) -> NDArray[np.bool_]:
    """Write or read which weights are not zero.

    Args:
        density: see ``density_of``. mask: of the grid's shape, to write. weights: of the kinds of evidence.

    Returns:
        The mask.
    """
    result = np.zeros(grid.shape, np.bool_)
    evidence, classes = _Evidence(grid, density, weights), _Classes()
    for stripe in stripes(grid):
        given = None if mask is None else stripe.take(mask[stripe.tap]).ravel()
        near = _near(grid, stripe, result)
        found = classes.code(stream, evidence.classes(stripe, near).ravel(), given).reshape(stripe.shape)
        stripe.put(result[stripe.tap], found)
        evidence.add(stripe, near, found)
    return result


def _sums(ones: NDArray[np.uint8]) -> NDArray[np.int32]:
    """By columns; of as many rows at a time as a byte can count, which is much faster."""
    total = np.zeros(ones.shape[1], np.int32)
    for begin in range(0, len(ones), 255):
        total += np.add.reduce(ones[begin : begin + 255], axis=0, dtype=np.uint8)
    return total


def density_of(mask: NDArray[np.bool_]) -> int:
    """Log-odds of not being zero, in quarters of a bit, no more than DENSITIES below or above 0."""
    ones = np.array([np.count_nonzero(mask)])
    return int(np.clip(_log_odds(ones, mask.size - ones, 1, 1)[0] >> _STEP_BITS, -DENSITIES, DENSITIES))


def _log_odds(ones: NDArray[np.integer], zeros: NDArray[np.integer], more: int, less: int) -> NDArray[np.int32]:
    """In 64ths of a bit, of counts, so many 256ths added to each."""
    return log2(_FULL * ones.astype(np.int64) + more) - log2(_FULL * zeros.astype(np.int64) + less)


def _near(grid: Grid, stripe: Stripe, mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """For each weight, a number that tells how many neighbours it has, to the left and above in its kernel, and of how
    many the value is not zero."""
    behind = [stripe.tap - 1] if stripe.tap % grid.width else []
    behind += [stripe.tap - grid.width] if stripe.tap >= grid.width else []
    near = np.full(stripe.shape, 3 * len(behind), np.uint8)
    for tap in behind:
        near += stripe.take(mask[tap])
    return near


class _Evidence:
    """How many weights are not zero, and how many there were."""

    def __init__(self, grid: Grid, density: int, weights: Sequence[int]) -> None:
        self.base, self.weights = density << _STEP_BITS, weights
        self.share = max(1, min(_FULL - 1, _FULL * logistic(density, _CLASS_BITS) // ONE))
        self.rows, self.columns = np.zeros((2, grid.rows), np.int32), np.zeros((2, grid.columns), np.int32)
        # Only of those not zero: of all kernels the same taps have been seen.
        self.kernels = np.zeros((grid.rows, grid.columns), np.uint8) if grid.taps > 1 else None
        self.taps, self.near = np.zeros((2, grid.taps), np.int64), np.zeros((2, 9), np.int64)

    def add(self, stripe: Stripe, near: NDArray[np.uint8], found: NDArray[np.bool_]) -> None:
        ones = found.view(np.uint8)
        self.rows[0, stripe.rows] += ones.sum(axis=1, dtype=np.int32)
        self.rows[1, stripe.rows] += found.shape[1]
        of_columns = self.columns[:, stripe.columns]
        for rows, columns in stripe.pieces():
            of_columns[0, columns] += _sums(ones[rows])
            of_columns[1, columns] += len(ones[rows])
        if self.kernels is not None:
            stripe.add(self.kernels, ones)
        self.taps[:, stripe.tap] += int(np.count_nonzero(found)), found.size
        for number in range(int(near.flat[0]) // 3 * 3, 9) if near.size else ():
            alike = near == number
            self.near[:, number] += int(np.count_nonzero(alike & found)), int(np.count_nonzero(alike))

    def classes(self, stripe: Stripe, near: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Of log-odds of not being zero, for each weight of a stripe."""

        def beyond(kind: int, ones: NDArray[np.integer], seen: NDArray[np.integer]) -> NDArray[np.int32]:
            log_odds = _log_odds(ones, seen - ones, _PRIOR * self.share, _PRIOR * (_FULL - self.share))
            return (log_odds - self.base) * self.weights[kind]

        of_columns = beyond(COLUMN, *self.columns[:, stripe.columns])
        total = np.empty(stripe.shape, np.int32)
        for rows, columns in stripe.pieces():
            total[rows] = of_columns[columns]
        middle = _CLASSES // 2 << _STEP_BITS
        common = (self.base + middle) * WEIGHT + beyond(TAP, *self.taps[:, stripe.tap, None])
        total += (common + beyond(ROW, *self.rows[:, stripe.rows]))[:, None]
        if self.kernels is not None:
            of_kernels = np.arange(stripe.tap + 1)
            of_both = beyond(KERNEL, of_kernels, of_kernels[-1:])[:, None] + beyond(NEAR, *self.near)
            both = stripe.take(self.kernels).astype(np.uint16)
            both *= 9
            both += near
            total += of_both.ravel().take(both)
        total >>= WEIGHT_BITS + _STEP_BITS
        return np.clip(total, 0, _CLASSES - 1, out=total).astype(np.uint8)


class _Classes:
    """The probability of a class is where it began, moved by what came."""

    def __init__(self) -> None:
        self.began = np.array(_beginnings(), np.int64)
        self.seen, self.ones = np.zeros((2, _CLASSES), np.int64)

    def code(self, stream: Stream, numbers: NDArray[np.uint8], mask: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
        """Write or read some weights, class by class; only then classes move."""
        order, groups = grouped(numbers)
        # Whether it is zero.
        symbols = None if mask is None else (~mask[order]).astype(np.int32)
        in_order = np.empty(len(numbers), np.bool_)
        probabilities = (self.began * _TRUST + ONE * self.ones) // (_TRUST + self.seen)
        for number, part in groups:
            probability = min(max(int(probabilities[number]), _LEAST), ONE - _LEAST)
            model = ans.bernoulli((ONE - probability) / ONE)
            in_order[part] = stream.code(model, part, symbols) == 0
            self.ones[number] += np.count_nonzero(in_order[part])
            self.seen[number] += part.stop - part.start
        found = np.empty_like(in_order)
        found[order] = in_order
        return found


@cache
def _beginnings() -> tuple[int, ...]:
    """Probabilities in the middle of the classes."""
    return tuple(logistic(2 * (number - _CLASSES // 2) + 1, _CLASS_BITS + 1) for number in range(_CLASSES))
