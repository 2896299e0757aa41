"""Winograd's minimal filtering F(m, r): the transform matrices, made from interpolation points in exact rationals.

``Y = AT [(G g GT) * (BT d B)] A`` computes an m x m block of outputs of an r x r filter ``g`` from a tile ``d`` of
n x n inputs, n = m + r - 1 (Winograd, 1980; Lavin and Gray, arXiv 1509.09308). This is the only place in the project
that knows the points: the training objective, the file and the kernels must agree on them, because a filter pruned in
the Winograd domain of one set of points is not sparse in that of another. It needs neither TVM nor torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from math import prod

import numpy as np
from numpy.typing import NDArray

# The points after the point at infinity, in the order in which larger tiles take them. With 0, +-1, +-2 the matrices
# are those of Lavin and Gray up to signs; +-1/2 keeps F(4x4, 5x5) well conditioned.
_POINTS = (Fraction(0), Fraction(1), Fraction(-1), Fraction(2), Fraction(-2), Fraction(1, 2), Fraction(-1, 2))

TILES = (2, 4)
"""Output tile sizes m offered."""

KERNELS = (3, 5)
"""Filter sizes r offered."""

Matrix = tuple[tuple[Fraction, ...], ...]


@dataclass(frozen=True)
class Transform:
    """The three matrices of F(m x m, r x r); n = m + r - 1.

    Attributes:
        m: output tile size. r: filter size.
        AT: m x n output transform. G: n x r filter transform. BT: n x n input transform. Exact rationals.
    """

    m: int
    r: int
    AT: Matrix
    G: Matrix
    BT: Matrix

    @property
    def n(self) -> int:
        """Input tile size."""
        return self.m + self.r - 1

    def arrays(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """``(AT, G, BT)`` as float64 arrays."""
        return _array(self.AT), _array(self.G), _array(self.BT)

    def filters(self, weight: NDArray[np.floating]) -> NDArray[np.float64]:
        """Transform filters ``(..., r, r)`` to the Winograd domain ``(..., n, n)``, in float64."""
        g = _array(self.G)
        return g @ np.asarray(weight, np.float64) @ g.T

    def importance(self) -> NDArray[np.float64]:
        """How much a unit change at each tile position changes the output: n x n, mean square 1.

        The entry at (u, v) is ``|A column u| |A column v| |B row u| |B row v|``. Magnitudes multiplied by it do not
        depend on how the rows of G are scaled, raw magnitudes do.
        """
        at, _, bt = self.arrays()
        one = np.linalg.norm(at, axis=0) * np.linalg.norm(bt, axis=1)
        weight = np.outer(one, one)
        return weight / np.sqrt(np.mean(weight**2))


@cache
def transform(m: int, r: int) -> Transform:
    """The Transform of F(m x m, r x r) for m in TILES and r in KERNELS.

    Raises:
        ValueError: for a size that is not offered.
    """
    if m not in TILES or r not in KERNELS:
        raise ValueError(f"F({m}x{m}, {r}x{r}) is not offered; tiles {TILES}, filters {KERNELS}")
    return _cook_toom(m, r, _POINTS[: m + r - 2])


def _cook_toom(m: int, r: int, points: tuple[Fraction, ...]) -> Transform:
    """Cook-Toom with the point at infinity; the Lagrange denominators go into G, so that BT stays integral."""
    scales = [prod((a - b for b in points if b != a), start=Fraction(1)) for a in points]
    # A common sign of the first row of G and BT is free; positive is the published form.
    signs = [Fraction(-1) if i == 0 and s < 0 else Fraction(1) for i, s in enumerate(scales)]
    infinity_at = tuple(Fraction(int(j == m - 1)) for j in range(m))
    infinity_g = tuple(Fraction(int(j == r - 1)) for j in range(r))
    at_columns = [tuple(a**j for j in range(m)) for a in points] + [infinity_at]
    g_rows = [tuple(a**j / (s * e) for j in range(r)) for a, s, e in zip(points, scales, signs, strict=True)] + [
        infinity_g
    ]
    numerators = [(*_monic_with_roots(tuple(b for b in points if b != a)), Fraction(0)) for a in points]
    bt_rows = [tuple(e * x for x in row) for e, row in zip(signs, numerators, strict=True)] + [
        _monic_with_roots(points)
    ]
    return Transform(m, r, AT=tuple(zip(*at_columns, strict=True)), G=tuple(g_rows), BT=tuple(bt_rows))


def _monic_with_roots(roots: tuple[Fraction, ...]) -> tuple[Fraction, ...]:
    """Coefficients, lowest degree first, of the monic polynomial with these roots."""
    coefficients: tuple[Fraction, ...] = (Fraction(1),)
    for root in roots:
        shifted = (Fraction(0), *coefficients)
        scaled = (*(-root * c for c in coefficients), Fraction(0))
        coefficients = tuple(a + b for a, b in zip(shifted, scaled, strict=True))
    return coefficients


def _array(matrix: Matrix) -> NDArray[np.float64]:
    return np.array([[float(x) for x in row] for row in matrix])
