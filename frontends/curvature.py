"""How much the loss grows with an error of a layer's weights: to second order, from calibration data.

For a filter with error e (of n weights) the loss grows by about 1/2 g e^T A e: A is the second moment of what the
filter is multiplied with, the same for all filters, and g how much the loss minds the filter's output, a Kronecker
factorisation of the Gauss-Newton matrix as in Martens and Grosse, arXiv 1503.05671, its second factor diagonal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .errors import InputError
from .losses import PROBES, Batch, evaluating
from .windows import windows

__all__ = ["LayerCurvature", "curvatures", "filters_of", "restored"]

BLOCK = 576
"""Inputs of a filter that are looked at together, at most: 64 channels of 3x3. What lies in two blocks is taken as
uncorrelated."""

_POSITIONS = 4096
"""Of the outputs of a batch, at most, at which inputs are looked at."""

_LEAST = 1e-2
"""Of g, relative to the mean of its layer: calibration data may miss what a filter is there for."""


@dataclass(frozen=True)
class LayerCurvature:
    """Of a layer of K filters in G groups, each of n weights.

    Attributes:
        filters: g, (K,). blocks: slices of 0 .. n. moments: A of each group and block, G x blocks.
    """

    filters: NDArray[np.float64]
    blocks: Sequence[slice]
    moments: Sequence[Sequence[NDArray[np.float64]]]

    def diagonal(self) -> NDArray[np.float64]:
        """Second derivatives of the loss, (K, n)."""
        each = np.array([np.concatenate([np.diag(a) for a in of_group]) for of_group in self.moments])
        return self.filters[:, None] * np.repeat(each, len(self.filters) // len(each), axis=0)


def curvatures(
    model: nn.Module, layers: Mapping[str, Any], batches: Sequence[Batch], loss: str
) -> dict[str, LayerCurvature]:
    """Of every layer, from calibration data, in evaluation mode.

    Args:
        layers: convolutions and linear layers of the model by name, each weight once; weights of transposed
            convolutions are taken as uncorrelated. batches: targets are not looked at. loss: a key of ``LOSSES``.

    Raises:
        InputError: a layer takes no part in the model's output.
    """
    draw = torch.Generator().manual_seed(0)
    moments = {name: _Moments(module, draw) for name, module in layers.items()}
    squares = {name: torch.zeros_like(module.weight, dtype=torch.float64) for name, module in layers.items()}
    weights = [module.weight for module in layers.values()]
    device = weights[0].device
    with evaluating(model), _watching(model, layers, moments), _with_gradients(weights):
        for inputs, _ in batches:
            output = model(inputs.to(device)).float()
            if not output.requires_grad:
                raise InputError(f'layer "{next(iter(layers))}" takes no part in the output, nor does any other')
            found = torch.autograd.grad(PROBES[loss](output, draw), weights, allow_unused=True)
            for name, gradient in zip(layers, found, strict=True):
                if gradient is None:
                    raise InputError(f'layer "{name}" takes no part in the output; remove it, or leave it as it is')
                squares[name] += gradient.detach().double().square()
    return {name: moments[name].curvature(squares[name] / len(batches)) for name in layers}


class _Moments:
    """Sums of products of a layer's inputs, at some of its outputs."""

    def __init__(self, module: nn.Module, draw: torch.Generator) -> None:
        self.module, self.draw = module, draw
        self.groups = module.groups if isinstance(module, _ConvNd) else 1
        self.inputs = _filters(module, module.weight).shape[1]  # type: ignore[arg-type]
        count = max(1, -(-self.inputs // BLOCK))
        bounds = [self.inputs * i // count for i in range(count + 1)]
        self.blocks = [slice(begin, end) for begin, end in pairwise(bounds)]
        self.sums: Any = [[0.0] * count for _ in range(self.groups)]

    @torch.no_grad()
    def add(self, module: nn.Module, x: Tensor) -> None:
        """What the layer, or another of the same weight, was given."""
        if isinstance(module, _ConvTransposeNd):
            return
        rows = windows(module, x, self.draw, _POSITIONS)
        for group, of_group in enumerate(rows.chunk(self.groups, 1)):
            for i, block in enumerate(self.blocks):
                part = of_group[:, block]
                self.sums[group][i] += (part.T @ part).double().cpu().numpy() / len(part)

    def curvature(self, squares: Tensor) -> LayerCurvature:
        """With the second derivatives of single weights."""
        diagonal = _filters(self.module, squares).cpu().numpy()
        if isinstance(self.sums[0][0], float):
            self.sums = [[np.eye(block.stop - block.start) for block in self.blocks] for _ in self.sums]
        scale = np.array([np.mean([np.mean(np.diag(a)) for a in of_group]) for of_group in self.sums])
        each = np.repeat(np.maximum(scale, np.finfo(np.float64).tiny), len(diagonal) // self.groups)
        filters = diagonal.mean(axis=1) / each
        filters = np.maximum(filters, max(_LEAST * filters.mean(), np.finfo(np.float64).tiny))
        return LayerCurvature(filters, self.blocks, self.sums)


def _filters(module: nn.Module, weight: Tensor) -> Tensor:
    """A layer's weight, or something of its shape, as a row for every filter; groups one behind the other."""
    if not isinstance(module, _ConvTransposeNd):
        return weight.reshape(len(weight), -1)
    grouped = weight.reshape(module.groups, len(weight) // module.groups, *weight.shape[1:])
    return grouped.transpose(1, 2).reshape(module.out_channels, -1)


def filters_of(module: nn.Module, weight: NDArray[Any]) -> NDArray[Any]:
    """A layer's weight as a row for every filter; groups one behind the other."""
    return _filters(module, torch.from_numpy(weight)).numpy()


def restored(module: nn.Module, filters: NDArray[Any], shape: Sequence[int]) -> NDArray[Any]:
    """The counterpart of ``filters_of``."""
    if not isinstance(module, _ConvTransposeNd):
        return filters.reshape(shape)
    groups = filters.reshape(module.groups, shape[1], shape[0] // module.groups, *shape[2:])
    return np.ascontiguousarray(groups.swapaxes(1, 2)).reshape(shape)


@contextmanager
def _watching(model: nn.Module, layers: Mapping[str, Any], moments: Mapping[str, _Moments]) -> Iterator[None]:
    """Every module that computes with a layer's weight."""

    def watch(of_layer: _Moments) -> Any:
        return lambda module, inputs, output: of_layer.add(module, inputs[0].detach())

    of_weights = {id(layer.weight): moments[name] for name, layer in layers.items()}
    handles = [
        module.register_forward_hook(watch(of_weights[id(module.weight)]))
        for module in model.modules()
        if isinstance(module, (_ConvNd, nn.Linear)) and id(module.weight) in of_weights
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _with_gradients(weights: Sequence[Any]) -> Iterator[None]:
    """Though the caller, or the weights, want none."""
    wanted = [weight.requires_grad for weight in weights]
    with torch.enable_grad():
        for weight in weights:
            weight.requires_grad_()
        try:
            yield
        finally:
            for weight, given in zip(weights, wanted, strict=True):
                weight.requires_grad_(given)
