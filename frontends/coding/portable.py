"""What is used of ``constriction.stream``, bit for bit, in plain Python: for platforms that constriction has no wheel
for, and as the description of the streams.

Asymmetric numeral systems with a state of 64 bits, words of 32 bits and probabilities in 2^-24 (Duda, arXiv 1311.2540;
Bamler, arXiv 2201.01741).
"""

from __future__ import annotations

from bisect import bisect_right
from functools import cache
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

_PRECISION = 24
_ONE = 1 << _PRECISION
_WORD = 32


class Distribution:
    """Of symbols from 0 on. bounds: where each begins, and the end, from 0 to 2^24, ascending."""

    def __init__(self, bounds: list[int]) -> None:
        self.bounds = bounds


def categorical(probabilities: NDArray[np.float64]) -> Distribution:
    """Every symbol has 2^-24, and a share of the rest by its probability, all rounded down together."""
    given = [float(probability) for probability in probabilities]
    scale = (_ONE - len(given)) / list(accumulate(given))[-1]
    sums = accumulate([0.0, *given[:-1]])
    return Distribution([*(int(below * scale) + i for i, below in enumerate(sums)), _ONE])


def bernoulli(probability: float) -> Distribution:
    """0 or 1, of which 1 has the probability."""
    return categorical(np.array([1.0 - probability, probability]))


@cache
def uniform(size: int) -> Distribution:
    """Equal but for the last symbol, which has what is left."""
    each = _ONE // size
    return Distribution([*(i * each for i in range(size)), _ONE])


class Coder:
    """A stack of symbols: what is coded last comes out first.

    Args:
        words: of a stream, the last to be read first.
    """

    def __init__(self, words: NDArray[np.uint32] | None = None) -> None:
        self._words = [] if words is None else [int(word) for word in words]
        self._state = 0
        for _ in range(2):
            if self._words:
                self._state = self._state << _WORD | self._words.pop()

    def encode_reverse(self, symbols: NDArray[np.int32], model: Distribution) -> None:
        """Push symbols, the last first."""
        bounds = model.bounds
        for symbol in reversed(symbols.tolist()):
            begin = bounds[symbol]
            size = bounds[symbol + 1] - begin
            if self._state >> (2 * _WORD - _PRECISION) >= size:
                self._words.append(self._state & (1 << _WORD) - 1)
                self._state >>= _WORD
            whole, rest = divmod(self._state, size)
            self._state = whole << _PRECISION | (begin + rest)

    def decode(self, model: Distribution, count: int) -> NDArray[np.int32]:
        """Pop symbols."""
        bounds, symbols = model.bounds, np.empty(count, np.int32)
        for i in range(count):
            quantile = self._state & _ONE - 1
            symbol = bisect_right(bounds, quantile) - 1
            begin = bounds[symbol]
            self._state = (self._state >> _PRECISION) * (bounds[symbol + 1] - begin) + quantile - begin
            if self._state >> _WORD == 0 and self._words:
                self._state = self._state << _WORD | self._words.pop()
            symbols[i] = symbol
        return symbols

    def get_compressed(self) -> NDArray[np.uint32]:
        """The words of the stream."""
        state = [self._state & (1 << _WORD) - 1, self._state >> _WORD]
        while state and not state[-1]:
            state.pop()
        return np.array([*self._words, *state], np.uint32)

    def is_empty(self) -> bool:
        """Whether nothing is left."""
        return not self._state and not self._words
