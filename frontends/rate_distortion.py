"""Codes of a layer's weights that trade what they cost in bits for what they cost in loss.

Weights become codes one after the other, and what one is off its value the others of its filter, those not zero, make
up for as far as their inputs are alike: optimal brain quantisation (Frantar, Singh, Alistarh, arXiv 2208.11580) in a
fixed order, as in GPTQ (arXiv 2210.17323). Each takes the code of least ``1/2 g error^2 + price * bits``, the error as
much as the others cannot make up for. Zeros stay zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .curvature import LayerCurvature

_DAMPING = 1e-2
"""Added to second moments, relative to their mean."""

_NOTHING = 1e-100
"""Moments of inputs that were 0 throughout."""

_ELEMENTS = 1 << 22
"""Of matrices at a time."""

_KEPT = 1 << 24
"""Elements of matrices that are kept for the next time, of a layer."""

_PASSES = 2
"""The first goes by what rounding would cost, the next by what the codes before it cost."""


@dataclass(frozen=True)
class Prices:
    """What codes of a layer cost in bits, more than 0 does, if others are as they are.

    Attributes:
        nonzero: (K, n), of not being zero. magnitude: by magnitude, 0 included, of those not zero.
    """

    nonzero: NDArray[np.float64]
    magnitude: NDArray[np.float64]

    @classmethod
    def of(cls, codes: NDArray[np.int64]) -> Prices:
        """By the frequencies of some codes: of magnitudes, and of those not zero by filter and input."""
        present = codes != 0
        log_odds = _log_odds(present.mean(), present.size)
        of_filters = _log_odds(present.mean(axis=1), present.shape[1]) - log_odds
        of_inputs = _log_odds(present.mean(axis=0), present.shape[0]) - log_odds
        counts = np.bincount(np.abs(codes[present]), minlength=2)[1:].astype(np.float64)
        beside = np.convolve(counts, [1, 2, 3, 2, 1])[2:-2] / 9
        shares = counts + beside + 0.1
        # A sign is a bit.
        magnitude = np.concatenate([[0.0], 1 - np.log2(shares / shares.sum())])
        return cls(-(log_odds + of_filters[:, None] + of_inputs[None, :]), magnitude)


def _log_odds(share: NDArray[np.float64] | np.floating, count: int) -> NDArray[np.float64]:
    """In bits, of a share of so many weights."""
    ones = share * count
    return np.log2((ones + 0.5) / (count - ones + 0.5))


class Layer:
    """A layer's weight to be quantised, several times perhaps.

    Args:
        weight: (K, n).
    """

    def __init__(self, weight: NDArray[np.floating], curvature: LayerCurvature) -> None:
        self.weight, self.curvature = weight.astype(np.float64), curvature
        self._factors: dict[tuple[int, int], NDArray[np.float64]] = {}
        self._kept = 0

    def slope(self) -> float:
        """The mean second derivative of the loss by the weights that are not zero; 0 without any."""
        present = self.weight != 0
        return float(self.curvature.diagonal()[present].mean()) if present.any() else 0.0

    def quantise(self, step: float, price: float) -> NDArray[np.int64]:
        """Codes.

        Args:
            step: of the quantiser. price: of a bit, in units of the loss.

        Returns:
            (K, n), 0 where the weight is 0.
        """
        codes = np.rint(self.weight / step).astype(np.int64)
        for _ in range(_PASSES):
            codes = self.pass_over(step, price, Prices.of(codes))
        return codes

    def pass_over(self, step: float, price: float, prices: Prices) -> NDArray[np.int64]:
        """Codes at given prices."""
        codes = np.zeros(self.weight.shape, np.int64)
        share = len(self.weight) // len(self.curvature.moments)
        for group, of_group in enumerate(self.curvature.moments):
            for block, moments in zip(self.curvature.blocks, of_group, strict=True):
                own = slice(group * share, (group + 1) * share)
                for rows in _chunks(self.weight[own, block] != 0, own.start):
                    weight = self.weight[rows, block]
                    places = _places(weight != 0, moments)
                    codes[rows, block] = _codes(
                        weight,
                        places,
                        self._factors_of(rows, block, weight, places, moments),
                        self.curvature.filters[rows],
                        step,
                        price,
                        Prices(prices.nonzero[rows, block], prices.magnitude),
                    )
        return codes

    def _factors_of(
        self,
        rows: slice,
        block: slice,
        weight: NDArray[np.float64],
        places: NDArray[np.intp],
        moments: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """Kept, while they are not too large: they are most of the work."""
        key = rows.start, block.start
        if key in self._factors:
            return self._factors[key]
        factors = _factors(moments, places, np.take_along_axis(weight, places, 1) != 0)
        if self._kept + factors.size <= _KEPT:
            self._factors[key] = factors
            self._kept += factors.size
        return factors


def _chunks(present: NDArray[np.bool_], first: int) -> Iterator[slice]:
    """Filters to do at a time: all, if they have zeros at the same places and share one matrix."""
    longest = max(1, int(present.sum(axis=1).max(initial=0)))
    alike = bool((present == present[:1]).all())
    rows = len(present) if alike else max(1, _ELEMENTS // longest**2)
    for begin in range(0, len(present), rows):
        yield slice(first + begin, first + min(begin + rows, len(present)))


def _places(present: NDArray[np.bool_], moments: NDArray[np.float64]) -> NDArray[np.intp]:
    """Of each filter the places not zero, those of the largest inputs first, which the others can make up for; and then
    as many others as make the filters equally long."""
    order = np.argsort(-np.diag(moments), kind="stable")
    places = order[np.argsort(~present[:, order], axis=1, kind="stable")]
    return places[:, : max(1, int(present.sum(axis=1).max()))]


def _codes(
    weight: NDArray[np.float64],
    places: NDArray[np.intp],
    factors: NDArray[np.float64],
    filters: NDArray[np.float64],
    step: float,
    price: float,
    prices: Prices,
) -> NDArray[np.int64]:
    """Of some filters, (K, n)."""
    left = np.take_along_axis(weight, places, 1)
    valid = left != 0
    nonzero = np.take_along_axis(prices.nonzero, places, 1)
    found = np.zeros(places.shape, np.int64)
    for j in range(places.shape[1]):
        pivot = factors[:, j, j]
        codes = _cheapest(left[:, j], filters / pivot**2, step, price, nonzero[:, j], prices.magnitude)
        found[:, j] = np.where(valid[:, j], codes, 0)
        error = np.where(valid[:, j], (left[:, j] - step * found[:, j]) / pivot, 0.0)
        left[:, j + 1 :] -= error[:, None] * factors[:, j + 1 :, j] * valid[:, j + 1 :]
    codes = np.zeros(weight.shape, np.int64)
    np.put_along_axis(codes, places, found, 1)
    return codes


def _factors(moments: NDArray[np.float64], places: NDArray[np.intp], valid: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Lower Cholesky factors of the inverses of the filters' matrices; one, if all have the same."""
    if (places == places[:1]).all() and (valid == valid[:1]).all():
        places, valid = places[:1], valid[:1]
    matrices = moments[places[:, :, None], places[:, None, :]] * (valid[:, :, None] & valid[:, None, :])
    mean = float(np.mean(np.diag(moments)))
    if mean < _NOTHING:
        mean = 1.0
    diagonal = np.arange(places.shape[1])
    matrices[:, diagonal, diagonal] += np.where(valid, _DAMPING * mean, mean)
    return np.linalg.cholesky(np.linalg.inv(matrices))


def _cheapest(
    value: NDArray[np.float64],
    curvature: NDArray[np.float64],
    step: float,
    price: float,
    nonzero: NDArray[np.float64],
    magnitude: NDArray[np.float64],
) -> NDArray[np.int64]:
    """For each value the code of least cost: one of the two next to it, the next smaller one, or 0."""
    size = np.abs(value)
    below = np.floor(size / step).astype(np.int64)
    best, least = np.zeros_like(below), 0.5 * curvature * size**2
    for code in (below - 1, below, below + 1):
        bits = nonzero + magnitude[np.minimum(code, len(magnitude) - 1)]
        cost = 0.5 * curvature * (size - code * step) ** 2 + price * bits
        better = (code > 0) & (cost < least)
        best, least = np.where(better, code, best), np.where(better, cost, least)
    return np.where(value < 0, -best, best)
