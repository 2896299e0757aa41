"""The Winograd matrices satisfy the filtering identity exactly, and are the published ones."""

from fractions import Fraction

import numpy as np
import pytest

from jointsparse.schedules.winograd import KERNELS, TILES, transform


@pytest.mark.parametrize("m", TILES)
@pytest.mark.parametrize("r", KERNELS)
def test_identity_is_exact(m: int, r: int) -> None:
    """y_o = sum_j g_j d_{o+j} for every basis filter and input, in rationals."""
    t = transform(m, r)
    for o in range(m):
        for j in range(r):
            for i in range(t.n):
                total = sum((t.AT[o][k] * t.G[k][j] * t.BT[k][i] for k in range(t.n)), Fraction(0))
                assert total == int(i == o + j)


def test_f43_is_lavins() -> None:
    at, g, bt = transform(4, 3).arrays()
    assert bt.tolist()[1] == [0, -4, -4, 1, 1, 0]
    assert np.allclose(g[:, 0], [1 / 4, -1 / 6, -1 / 6, 1 / 24, 1 / 24, 0])
    assert at.tolist() == [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]


def test_filters_is_g_w_gt() -> None:
    w = np.random.default_rng(0).standard_normal((3, 2, 5, 5))
    g = transform(2, 5).arrays()[1]
    assert np.allclose(transform(2, 5).filters(w)[2, 1], g @ w[2, 1] @ g.T)


@pytest.mark.parametrize("m", TILES)
@pytest.mark.parametrize("r", KERNELS)
def test_importance_predicts_the_output_error(m: int, r: int) -> None:
    """Perturbing one tile position by e changes the output by e times its importance, for white inputs."""
    t = transform(m, r)
    at, _, bt = t.arrays()
    d = np.random.default_rng(0).standard_normal((20000, t.n, t.n))
    v = bt @ d @ bt.T
    energy = np.einsum("iu,jv,tuv->uvtij", at, at, v, optimize=True)
    measured = np.sqrt(np.mean(energy**2, axis=(2, 3, 4)))
    assert np.allclose(measured / np.sqrt(np.mean(measured**2)), t.importance(), rtol=0.05)


def test_unknown_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"F\(6x6, 3x3\) is not offered"):
        transform(6, 3)
