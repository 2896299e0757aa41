"""Run a torch model with filters pruned in the Winograd domain, on the tile grid that the kernels use.

Once Winograd weights are pruned the convolution is no longer shift-invariant: the tile grid is part of the function.
Tiles start at output (0, 0); outputs beyond the edge are cut, inputs beyond the padding are zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ..schedules.winograd import Transform, transform
from .errors import InputError

__all__ = ["pruned_filters", "winograd_conv2d", "winograd_pruned"]


def pruned_filters(
    weight: NDArray[np.floating], tile: int, threshold: float | NDArray[np.floating], weighted: bool
) -> NDArray[np.float64]:
    """U = G w G^T of filters K x C x r x r in float64, K x C x n x n, zero where |U| (times the importance if
    weighted) <= threshold (a scalar, or one for each of the K).
    """
    winograd = transform(tile, weight.shape[-1])
    filters = winograd.filters(weight)
    magnitudes = np.abs(filters)
    if weighted:
        magnitudes *= winograd.importance()
    return np.where(magnitudes <= np.reshape(threshold, (-1, 1, 1, 1)), 0.0, filters)


def winograd_conv2d(
    x: Tensor, filters: Tensor, winograd: Transform, padding: tuple[int, int, int, int], groups: int = 1
) -> Tensor:
    """Stride-1 convolution of N x C x H x W by Winograd-domain filters K x C/groups x n x n; no bias.

    Args:
        padding: top, left, bottom, right.
    """
    at, _, bt = winograd.arrays()
    # Both transforms act on rows and columns at once, as one matrix product each over all tiles.
    inputs, outputs = (torch.as_tensor(np.kron(a, a), dtype=x.dtype, device=x.device) for a in (bt, at))
    m, n = winograd.m, winograd.n
    top, left, bottom, right = padding
    height = x.shape[2] + top + bottom - winograd.r + 1
    width = x.shape[3] + left + right - winograd.r + 1
    rows, columns = -(-height // m), -(-width // m)
    x = F.pad(x, (left, right + columns * m - width, top, bottom + rows * m - height))
    batch, channels, total = x.shape[0], x.shape[1], filters.shape[0]
    tiles = F.unfold(x.contiguous(), n, stride=m).reshape(batch, channels, n * n, rows * columns)
    data = (inputs @ tiles.permute(2, 1, 0, 3).reshape(n * n, -1)).reshape(n * n, groups, channels // groups, -1)
    kernels = filters.permute(2, 3, 0, 1).reshape(n * n, groups, total // groups, channels // groups)
    blocks = (outputs @ (kernels @ data).reshape(n * n, -1)).reshape(m, m, total, batch, rows, columns)
    image = blocks.permute(3, 2, 4, 0, 5, 1).reshape(batch, total, rows * m, columns * m)
    return image[:, :, :height, :width]


@contextmanager
def winograd_pruned(model: nn.Module, spec: Mapping[str, Mapping[str, Any]]) -> Iterator[nn.Module]:
    """Inside the context the layers that ``spec`` names (``JointSparsity.winograd_spec``) compute with their Winograd
    filters pruned. The weights are read at entry. For evaluation: no gradient reaches the weights of these layers.

    Raises:
        InputError: where ``spec`` names no such layer, or a tile grid that does not start at (0, 0).
    """
    modules = dict(model.named_modules())
    replaced: list[nn.Conv2d] = []
    try:
        for name, entry in spec.items():
            module = modules.get(name.removesuffix("weight").removesuffix("."))
            if not isinstance(module, nn.Conv2d):
                raise InputError(f'"{name}" is not the weight of a convolution of this model')
            if list(entry["origin"]) != [0, 0]:
                raise InputError(f'"{name}": a tile grid must start at [0, 0], not {entry["origin"]}')
            module.forward = _forward(module, entry)  # type: ignore[method-assign]
            replaced.append(module)
        yield model
    finally:
        for module in replaced:
            del module.forward  # the class's own is found again


def _forward(module: nn.Conv2d, entry: Mapping[str, Any]) -> Any:
    weight = module.weight.detach()
    filters = torch.from_numpy(
        pruned_filters(weight.float().cpu().numpy(), entry["tile"], np.asarray(entry["threshold"]), entry["weighted"])
    ).to(weight)
    winograd = transform(entry["tile"], weight.shape[-1])
    padding = _padding(module)

    def forward(x: Tensor) -> Tensor:
        y = winograd_conv2d(x, filters, winograd, padding, module.groups)
        return y if module.bias is None else y + module.bias.reshape(-1, 1, 1)

    return forward


def _padding(module: nn.Conv2d) -> tuple[int, int, int, int]:
    """Top, left, bottom, right."""
    # What the convolution itself would pad with, "same" included; last axis first, before and after.
    left, right, top, bottom = module._reversed_padding_repeated_twice
    return top, left, bottom, right
