"""What the filters of a layer are multiplied with, at some of its outputs."""

from __future__ import annotations

from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

__all__ = ["windows"]


def windows(module: nn.Module, x: Tensor, draw: torch.Generator, most: int) -> Tensor:
    """The inputs of a convolution or linear layer as rows of channels x taps, (outputs, C k k), float32.

    Args:
        x: what the layer is given. draw: chooses the outputs, by their number and ``most`` only. most: outputs, taken
            with replacement; all of them where there are no more.
    """
    if not isinstance(module, _ConvNd):
        rows = x.reshape(-1, x.shape[-1]).float()
        return rows[_some(len(rows), draw, most).to(x.device)]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x.float(), module._reversed_padding_repeated_twice, mode=mode)
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    sizes = [
        (size - d * (k - 1) - 1) // s + 1 for size, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)
    ]
    chosen = _some(len(x) * int(np.prod(sizes)), draw, most)
    image, *position = map(torch.from_numpy, np.unravel_index(chosen.numpy(), (len(x), *sizes)))
    taps = []
    for offsets in product(*map(range, kernel)):
        index = [p * s + o * d for p, s, o, d in zip(position, stride, offsets, dilation, strict=True)]
        taps.append(x.movedim(1, -1)[(image, *index)])
    return torch.stack(taps, 2).reshape(len(chosen), -1)


def _some(count: int, draw: torch.Generator, most: int) -> Tensor:
    """Numbers below ``count``: all, or some of them at random."""
    if count <= most:
        return torch.arange(count)
    return torch.randint(0, count, (most,), generator=draw)
