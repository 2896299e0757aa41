"""Universal quantisation: a uniform lattice of step D for all weights, dithered or not; zeros stay zero.

Choi, El-Khamy, Lee, arXiv 1805.08303: with the dither U uniform in [-D/2, D/2), ``q = D round((w + U) / D)`` is coded
and ``q - U`` decoded where q != 0; U = 0 is the plain mode. The dither is a fixed function of a seed and the weight's
position, so that a file needs the seed only and decodes to the same bits everywhere. This half is numpy; torch is
imported where torch modules come in.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def dither(seed: int, count: int) -> NDArray[np.float64]:
    """``count`` pseudo-random numbers in [-1/2, 1/2), to be multiplied by the step: multiples of 2^-24, exact.

    SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) of the seed and the position; the top 24 bits are taken. Part of the
    file format: it must never change.
    """
    state = np.arange(1, count + 1, dtype=np.uint64)
    state *= _GOLDEN
    state += np.uint64(seed)
    for shift, factor in zip((30, 27), _MIX, strict=True):
        state ^= state >> np.uint64(shift)
        state *= factor
    state ^= state >> np.uint64(31)
    return (state >> np.uint64(40)).astype(np.float64) * 2.0**-24 - 0.5


@dataclass(frozen=True)
class LayerQuantization:
    """The quantised weights of one layer.

    Attributes:
        codes: int32, shaped as the weight. 0 stands for zero.
        step: the lattice step D.
        dither_seed: of ``dither``, from 0 to 2^63 - 1; None for the plain lattice.
        codebook: float32 values of the distinct codes other than 0, in ascending order of code; None for ``code * D``.
    """

    codes: NDArray[np.int32]
    step: float
    dither_seed: int | None = None
    codebook: NDArray[np.float32] | None = None

    def dequantize(self) -> NDArray[np.float32]:
        """The weights, float32, bit-exact on every platform: float64 throughout, rounded once at the end."""
        values = self._lattice() if self.codebook is None else self._from_codebook(self.codebook)
        if self.dither_seed is not None:
            values -= dither(self.dither_seed, self.codes.size).reshape(self.codes.shape) * self.step
        values[self.codes == 0] = 0.0
        return values.astype(np.float32)

    def _lattice(self) -> NDArray[np.float64]:
        return self.codes.astype(np.float64) * self.step

    def _from_codebook(self, codebook: NDArray[np.float32]) -> NDArray[np.float64]:
        distinct, position = np.unique(self.codes, return_inverse=True)
        values = np.zeros(distinct.size)
        values[distinct != 0] = codebook
        return values[position].reshape(self.codes.shape)


def quantize_array(weight: NDArray[np.floating], step: float, dither_seed: int | None = None) -> LayerQuantization:
    """Quantise one tensor.

    Args:
        weight: any shape. step: D > 0. dither_seed: from 0 to 2^63 - 1, or None for no dither.

    Returns:
        Codes without a codebook; a zero weight has code 0.
    """
    scaled = np.asarray(weight, np.float64) / step
    if dither_seed is not None:
        scaled += dither(dither_seed, scaled.size).reshape(scaled.shape)
    codes = np.rint(scaled).astype(np.int32)
    codes[np.asarray(weight) == 0] = 0
    return LayerQuantization(codes, float(step), dither_seed)
