"""Winograd inference in torch: exact without pruning, on the right tile grid with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from jointsparse.frontends.errors import InputError
from jointsparse.frontends.winograd_inference import winograd_conv2d, winograd_pruned
from jointsparse.schedules.winograd import transform
from jointsparse.schedules.winograd_pruning import WinogradPruning


def entry(tile: int = 4, threshold: object = 0.0, weighted: bool = True) -> dict:
    return {"tile": tile, "origin": [0, 0], "threshold": threshold, "weighted": weighted}


@given(
    tile=st.sampled_from([2, 4]),
    kernel=st.sampled_from([3, 5]),
    height=st.integers(5, 14),
    width=st.integers(5, 14),
    padding=st.one_of(st.integers(0, 3), st.tuples(st.integers(0, 2), st.integers(0, 2)), st.just("same")),
    groups=st.sampled_from([1, 2]),
    batch=st.integers(1, 2),
    bias=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_equals_convolution_when_nothing_is_pruned(
    tile: int, kernel: int, height: int, width: int, padding: object, groups: int, batch: int, bias: bool
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, kernel, padding=padding, groups=groups, bias=bias).double()
    x = torch.randn(batch, 4, height, width, dtype=torch.float64)
    with torch.no_grad():
        plain = conv(x)
        with winograd_pruned(conv, {"weight": entry(tile)}):
            made = conv(x)
        torch.testing.assert_close(made, plain, rtol=1e-9, atol=1e-9)
        assert torch.equal(conv(x), plain), "the context must leave no trace"


def test_float32_is_fine() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 64, 3, padding=1)
    x = torch.randn(1, 64, 30, 30)
    with torch.no_grad():
        exact = conv.double()(x.double())
        conv.float()
        with winograd_pruned(conv, {"weight": entry(4)}):
            made = conv(x)
    assert float((made - exact).norm() / exact.norm()) < 1e-5


@pytest.mark.parametrize("weighted", [True, False])
def test_pruned_output_by_the_definition(weighted: bool) -> None:
    """Y = A^T [sum_c U * (B^T d B)] A, tile by tile, in plain loops; the grid starts at output (0, 0)."""
    rng = np.random.default_rng(0)
    m, r = 4, 3
    made = transform(m, r)
    at, g, bt = made.arrays()
    weight, image = rng.normal(size=(3, 2, r, r)), rng.normal(size=(2, 10, 7))
    threshold = np.array([0.05, 0.0, 0.2])
    u = g @ weight @ g.T
    size = np.abs(u) * (made.importance() if weighted else 1)
    u[size <= threshold[:, None, None, None]] = 0
    assert 0 < (u == 0).mean() < 1
    np.testing.assert_array_equal(WinogradPruning(m, tuple(threshold), weighted).filters(weight), u)

    height, width = 10, 7  # padding 1 keeps the size
    padded = np.zeros((2, 1 + 12 + 5, 1 + 8 + 5))
    padded[:, 1 : 1 + height, 1 : 1 + width] = image
    expected = np.zeros((3, 12, 8))
    for k in range(3):
        for top in range(0, 12, m):
            for left in range(0, 8, m):
                tile = padded[:, top : top + made.n, left : left + made.n]
                expected[k, top : top + m, left : left + m] = at @ (u[k] * (bt @ tile @ bt.T)).sum(0) @ at.T
    filters = torch.from_numpy(u)
    result = winograd_conv2d(torch.from_numpy(image)[None], filters, made, (1, 1, 1, 1))[0]
    np.testing.assert_allclose(result, expected[:, :height, :width], atol=1e-10)


def test_foreign_specifications_are_refused() -> None:
    conv = nn.Conv2d(1, 1, 3)
    with (
        pytest.raises(InputError, match="no weight of the model"),
        winograd_pruned(conv, {"elsewhere.weight": entry()}),
    ):
        pass
    with pytest.raises(InputError, match=r"\[0, 0\]"), winograd_pruned(conv, {"weight": entry() | {"origin": [1, 0]}}):
        pass
    assert "forward" not in vars(conv)
