"""A tensor as filters, channels and taps, and what has been seen of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .fixed_point import log2

ROW, COLUMN, TAP, KERNEL, NEAR = range(5)
"""Kinds of evidence: what was seen of the same filter, channel, tap, kernel; and of weights with such neighbours."""

WEIGHT_BITS = 4
WEIGHT = 1 << WEIGHT_BITS
"""Of evidence that counts as it is; it may have another weight, in parts of this."""

_FEW, _MANY = 256, 128
"""Fewer kernels than that, or more taps, are not gone through tap by tap: it would take long for what it gives."""


@dataclass(frozen=True)
class Grid:
    """Filters, channels and taps of a tensor; taps lie in lines of ``width``."""

    rows: int
    columns: int
    taps: int
    width: int = 1

    @classmethod
    def of(cls, shape: Sequence[int]) -> Grid:
        """The first axis filters, the second channels, all others taps; few kernels or many taps make taps channels."""
        if len(shape) < 2:
            return cls(1, math.prod(shape), 1)
        rows, columns, taps = shape[0], shape[1], math.prod(shape[2:])
        if rows * columns < _FEW or taps > _MANY:
            return cls(rows, columns * taps, 1)
        return cls(rows, columns, taps, shape[-1] if len(shape) > 2 else 1)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Taps, filters, channels: the order in which weights are coded."""
        return self.taps, self.rows, self.columns

    def arrange(self, tensor: NDArray[Any]) -> NDArray[Any]:
        """A tensor in that order."""
        return np.ascontiguousarray(tensor.reshape(self.rows, self.columns, self.taps).transpose(2, 0, 1))

    def restore(self, weights: NDArray[Any], shape: Sequence[int]) -> NDArray[Any]:
        """The tensor of such a shape, back from that order."""
        return np.ascontiguousarray(weights.transpose(1, 2, 0)).reshape(shape)


def grouped(numbers: NDArray[np.uint8]) -> tuple[NDArray[np.intp], list[tuple[int, slice]]]:
    """An order in which equal numbers stand together, ascending and otherwise as before, and where each of them is."""
    order = np.argsort(numbers, kind="stable")
    # Looked up in that order: numpy's count of bytes makes words of them first.
    numbered = np.arange(int(numbers.max(initial=0)) + 1, dtype=np.uint8)
    ends = np.searchsorted(numbers, numbered, side="right", sorter=order).tolist()
    groups = [(number, slice(begin, end)) for number, (begin, end) in enumerate(pairwise([0, *ends])) if begin < end]
    return order, groups


class Tally:
    """Two sums for each of some keys.

    Few keys are worked on as a whole, which costs less for each weight; of many only those that are there, so that the
    time does not depend on how many others there are.
    """

    def __init__(self, keys: int) -> None:
        self.sums, self.counts = np.zeros((2, keys), np.int64)

    def add(self, keys: NDArray[np.intp], values: NDArray[np.float64]) -> None:
        """Add values, integers, to the sums of keys, and 1 to the counts."""
        if len(self.sums) <= len(keys):
            self.sums += np.bincount(keys, values, minlength=len(self.sums)).astype(np.int64)
            self.counts += np.bincount(keys, minlength=len(self.sums))
        else:
            np.add.at(self.sums, keys, values.astype(np.int64))
            np.add.at(self.counts, keys, 1)

    def log_mean(self, keys: NDArray[np.intp], unit: int, prior: tuple[int, int]) -> NDArray[np.int32]:
        """For each key, log2 of (unit * sum + prior[0]) / (unit * count + prior[1])."""
        whole = len(self.sums) <= len(keys)
        sums, counts = (self.sums, self.counts) if whole else (self.sums[keys], self.counts[keys])
        mean = log2(unit * sums + prior[0]) - log2(unit * counts + prior[1])
        return mean[keys] if whole else mean
