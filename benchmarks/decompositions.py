"""What the approximation is compared with: decompositions of the weights alone, all layers by one share.

svd      a convolution of r filters and a 1x1 one, by the singular values of the n x c k k matrix; the same for
         fully-connected layers.
tucker   1x1, k x k and 1x1 (Kim et al., arXiv 1511.06530), by higher-order orthogonal iteration; svd for what is no
         k x k convolution.

A layer is decomposed where that makes it smaller; its rank is the share, found by bisection, of what its full rank is.
Convolutions have one group.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_SWEEPS = 10
_HALVINGS = 30


def svd(model: nn.Module, ratio: float) -> nn.Module:
    """A copy of the model with ``ratio`` times fewer weights."""
    return _decomposed(model, ratio, _pair_cost, _pair)


def tucker(model: nn.Module, ratio: float) -> nn.Module:
    """A copy of the model with ``ratio`` times fewer weights."""
    return _decomposed(model, ratio, _triple_cost, _triple)


def weights(model: nn.Module) -> int:
    """Of convolutions and fully-connected layers."""
    return sum(module.weight.numel() for _, module in layers(model))


def layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Convolutions and fully-connected layers by name."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            yield name, module


def _decomposed(
    model: nn.Module, ratio: float, cost: Callable[[Any, float], int], decompose: Callable[[Any, float], nn.Module]
) -> nn.Module:
    def whole(share: float) -> int:
        return sum(min(module.weight.numel(), cost(module, share)) for _, module in layers(model))

    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        share = (low + high) / 2
        low, high = (share, high) if whole(share) <= weights(model) / ratio else (low, share)
    made = copy.deepcopy(model)
    for name, module in layers(model):
        if cost(module, low) < module.weight.numel():
            parent, _, own = name.rpartition(".")
            setattr(made.get_submodule(parent), own, decompose(module, low))
    return made


def _rank(module: Any, share: float) -> int:
    return max(1, round(share * min(module.weight.flatten(1).shape)))


def _pair_cost(module: Any, share: float) -> int:
    return _rank(module, share) * sum(module.weight.flatten(1).shape)


def _pair(module: Any, share: float) -> nn.Module:
    matrix, rank = module.weight.detach().flatten(1), _rank(module, share)
    left, values, right = _svd(matrix)
    expand, reduce = left[:, :rank] * values[:rank].sqrt(), values[:rank, None].sqrt() * right[:rank]
    if isinstance(module, nn.Linear):
        first: Any = nn.Linear(module.in_features, rank, bias=False)
        last: Any = nn.Linear(rank, module.out_features)
    else:
        first = nn.Conv2d(
            module.in_channels, rank, module.kernel_size, module.stride, module.padding, module.dilation, bias=False
        )
        last = nn.Conv2d(rank, module.out_channels, 1)
    return nn.Sequential(_filled(first, reduce), _filled(last, expand, module.bias))


def _ranks(module: Any, share: float) -> tuple[int, int]:
    """Of outputs and inputs: each no more than the other, times the taps, leaves."""
    outputs, inputs = (max(1, round(share * size)) for size in module.weight.shape[:2])
    taps = module.weight[0, 0].numel()
    outputs = min(outputs, inputs * taps)
    return outputs, min(inputs, outputs * taps)


def _triple_cost(module: Any, share: float) -> int:
    if _is_matrix(module):
        return _pair_cost(module, share)
    outputs, inputs = _ranks(module, share)
    weight = module.weight
    return weight.shape[1] * inputs + inputs * outputs * weight[0, 0].numel() + outputs * weight.shape[0]


def _is_matrix(module: Any) -> bool:
    return module.weight.dim() == 2 or module.weight[0, 0].numel() == 1


def _triple(module: Any, share: float) -> nn.Module:
    if _is_matrix(module):
        return _pair(module, share)
    weight = module.weight.detach()
    outputs, inputs = _ranks(module, share)
    left, right = _hooi(weight, outputs, inputs)
    core = torch.einsum("nchw,nr,cs->rshw", weight, left, right)
    return nn.Sequential(
        _filled(nn.Conv2d(module.in_channels, inputs, 1, bias=False), right.T),
        _filled(
            nn.Conv2d(inputs, outputs, module.kernel_size, module.stride, module.padding, module.dilation, bias=False),
            core,
        ),
        _filled(nn.Conv2d(outputs, module.out_channels, 1), left, module.bias),
    )


def _hooi(weight: Tensor, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Orthonormal factors of the first two modes."""
    right = _svd(weight.transpose(0, 1).flatten(1))[0][:, :inputs]
    for _ in range(_SWEEPS):
        left = _svd(torch.einsum("nchw,cs->nshw", weight, right).flatten(1))[0][:, :outputs]
        right = _svd(torch.einsum("nchw,nr->crhw", weight, left).flatten(1))[0][:, :inputs]
    return left, right


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(matrix, full_matrices=False)


def _filled(layer: Any, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    with torch.no_grad():
        layer.weight.copy_(weight.reshape(layer.weight.shape))
        if layer.bias is not None:
            layer.bias.copy_(torch.zeros_like(layer.bias) if bias is None else bias)
    return layer
