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
from torch import Tensor, nn

from ..schedules.winograd import Transform, transform
from ..schedules.winograd_pruning import WinogradPruning
from . import winograd_spec

__all__ = ["winograd_conv2d", "winograd_pruned"]


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
        InputError: where ``spec`` names no such layer, or is malformed.
    """
    named = ((path, part) for path, part in model.named_modules() if isinstance(part, nn.Conv2d))
    convolutions = {f"{path}.weight" if path else "weight": part for path, part in named}
    shapes = {name: tuple(part.weight.shape) for name, part in convolutions.items()}
    prunings = winograd_spec.parse(spec, shapes, type(model).__name__)
    try:
        for name, pruning in prunings.items():
            convolutions[name].forward = _forward(convolutions[name], pruning)  # type: ignore[method-assign]
        yield model
    finally:
        for name in prunings:
            vars(convolutions[name]).pop("forward", None)  # the class's own is found again


def _forward(module: nn.Conv2d, pruning: WinogradPruning) -> Any:
    weight = module.weight.detach()
    filters = torch.from_numpy(pruning.filters(weight.float().cpu().numpy())).to(weight)
    winograd = transform(pruning.tile, weight.shape[-1])
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
