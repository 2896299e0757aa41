"""Convolution in float64 numpy, written down from its definition: what every kernel is compared with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from jointsparse.schedules.geometry import ConvGeometry
from jointsparse.schedules.winograd import transform

Array = NDArray[np.float64]


def pad(data: NDArray[np.floating], geometry: ConvGeometry) -> Array:
    top, left, bottom, right = geometry.padding
    return np.pad(np.asarray(data, np.float64), ((0, 0), (0, 0), (top, bottom), (left, right)))


def conv2d(data: NDArray[np.floating], weight: NDArray[np.floating], geometry: ConvGeometry) -> Array:
    """Direct convolution of (N, C, H, W) with (K, C / groups, kh, kw)."""
    padded = pad(data, geometry)
    filters = _by_group(weight, geometry)
    batch, _, height, width = geometry.out_shape
    out = np.zeros((batch, geometry.groups, geometry.out_channels // geometry.groups, height, width))
    for row in range(geometry.kernel[0]):
        for col in range(geometry.kernel[1]):
            y, x = row * geometry.dilation[0], col * geometry.dilation[1]
            window = padded[
                :,
                :,
                y : y + (height - 1) * geometry.strides[0] + 1 : geometry.strides[0],
                x : x + (width - 1) * geometry.strides[1] + 1 : geometry.strides[1],
            ].reshape(batch, geometry.groups, -1, height, width)
            out += np.einsum("gkc,bgchw->bgkhw", filters[..., row, col], window)
    return out.reshape(geometry.out_shape)


def winograd(
    data: NDArray[np.floating], winograd_weight: NDArray[np.floating], geometry: ConvGeometry, m: int
) -> Array:
    """F(m x m, r x r) with filters (K, C / groups, n, n) of the Winograd domain, pruned or not; tiles start at output
    (0, 0) and see zeros beyond the padding."""
    matrices = transform(m, geometry.kernel[0])
    output_matrix, _, input_matrix = matrices.arrays()
    batch, _, height, width = geometry.out_shape
    down, across = -(-height // m), -(-width // m)
    canvas = np.zeros((batch, geometry.in_channels, down * m + matrices.n - m, across * m + matrices.n - m))
    padded = pad(data, geometry)[:, :, : canvas.shape[2], : canvas.shape[3]]
    canvas[:, :, : padded.shape[2], : padded.shape[3]] = padded
    tiles = np.lib.stride_tricks.sliding_window_view(canvas, (matrices.n, matrices.n), (2, 3))[:, :, ::m, ::m]
    transformed = (input_matrix @ tiles @ input_matrix.T).reshape(
        batch, geometry.groups, -1, down, across, matrices.n, matrices.n
    )
    products = np.einsum("bgcyxuv,gkcuv->bgkyxuv", transformed, _by_group(winograd_weight, geometry), optimize=True)
    outputs = (output_matrix @ products @ output_matrix.T).reshape(batch, -1, down, across, m, m)
    image = outputs.transpose(0, 1, 2, 4, 3, 5).reshape(batch, -1, down * m, across * m)
    return image[:, :, :height, :width]


def relative_rms(result: NDArray[np.floating], expected: NDArray[np.floating]) -> float:
    """Root mean square of the difference over that of the expected; undivided where nothing but zeros is expected."""
    assert result.shape == expected.shape
    difference, scale = (float(np.sqrt(np.mean(np.square(a, dtype=np.float64)))) for a in (result - expected, expected))
    return difference / scale if scale else difference


def _by_group(weight: NDArray[np.floating], geometry: ConvGeometry) -> Array:
    return np.asarray(weight, np.float64).reshape(geometry.groups, -1, *weight.shape[1:])
