"""What layers are given, and how much the loss minds what they put out: from calibration images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..losses import PROBES, evaluating
from ..windows import windows
from .structures import Shape

__all__ = ["importances", "inputs_of", "moments", "output_sizes"]


class _Reached(Exception):
    """The layer has been given its input: what follows need not be computed."""


@torch.inference_mode()
def output_sizes(model: nn.Module, layers: Mapping[str, nn.Module], image: Tensor) -> dict[str, int]:
    """Outputs per channel and image of every layer that takes part, in the order in which they are computed."""
    sizes: dict[str, int] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            channels = output.shape[-1] if isinstance(module, nn.Linear) else output.shape[1]
            sizes.setdefault(name, output[0].numel() // channels)

        return hook

    with evaluating(model), _hooked({layer: note(name) for name, layer in layers.items()}):
        model(image[:1])
    return sizes


@torch.inference_mode()
def inputs_of(
    model: nn.Module, layer: nn.Module, shape: Shape, images: Sequence[Tensor], most: int, seed: int
) -> Tensor:
    """Columns that the layer is multiplied with, (G, p, N), at ``most`` outputs in all, the same for the same seed and
    sizes of images."""
    draw, found = torch.Generator().manual_seed(seed), []
    share = -(-most // len(images))

    def note(module: nn.Module, inputs: Any, output: Any = None) -> None:
        found.append(_split(windows(layer, inputs[0], draw, share), shape))
        raise _Reached

    handle = layer.register_forward_pre_hook(note)
    try:
        with evaluating(model):
            for batch in images:
                try:
                    model(batch)
                except _Reached:
                    continue
    finally:
        handle.remove()
    return torch.cat(found, 2)


@torch.inference_mode()
def moments(
    model: nn.Module, layers: Mapping[str, nn.Module], shapes: Mapping[str, Shape], images: Sequence[Tensor], most: int
) -> dict[str, Tensor]:
    """Covariance of every layer's inputs, (G, p, p), from ``most`` outputs each."""
    draw = torch.Generator().manual_seed(0)
    sums: dict[str, list[Any]] = {name: [0, 0.0, 0.0] for name in layers}
    share = -(-most // len(images))

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            columns = _split(windows(module, inputs[0], draw, share), shapes[name])
            own = sums[name]
            own[0] += columns.shape[2]
            own[1] = own[1] + columns.sum(2)
            own[2] = own[2] + columns @ columns.mT

        return hook

    with evaluating(model), _hooked({layer: note(name) for name, layer in layers.items()}):
        for batch in images:
            model(batch)
    return {
        name: products / count - (total / count)[..., None] * (total / count)[:, None]
        for name, (count, total, products) in sums.items()
    }


def importances(
    model: nn.Module, layers: Mapping[str, nn.Module], shapes: Mapping[str, Shape], images: Sequence[Tensor], loss: str
) -> dict[str, Tensor]:
    """How much the loss minds a mean square error of every output, (G, n): about half of it, times the error, is
    loss. By the Gauss-Newton matrix's diagonal, see ``losses.PROBES``."""
    draw = torch.Generator().manual_seed(0)
    squares = {name: torch.zeros(shapes[name].groups * shapes[name].outputs) for name in layers}
    outputs: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            # Whether or not anything before it has a gradient.
            outputs[name] = output if output.requires_grad else output.requires_grad_()
            return outputs[name]

        return hook

    with torch.enable_grad(), evaluating(model), _hooked({layer: note(name) for name, layer in layers.items()}):
        for batch in images:
            outputs.clear()
            made = model(batch).float()
            found = torch.autograd.grad(PROBES[loss](made, draw), list(outputs.values()), allow_unused=True)
            for (name, output), gradient in zip(outputs.items(), found, strict=True):
                if gradient is None:
                    raise InputError(f'layer "{name}" takes no part in the output; exclude it')
                axis = output.dim() - 1 if isinstance(layers[name], nn.Linear) else 1
                squares[name] += gradient.detach().square().movedim(axis, 0).flatten(1).sum(1).float().cpu()
    return {
        name: (total / len(images)).reshape(shapes[name].groups, shapes[name].outputs)
        for name, total in squares.items()
    }


def _split(rows: Tensor, shape: Shape) -> Tensor:
    """Rows of channels x taps as columns of every group's matrix, (G, p, N)."""
    return rows.T.reshape(shape.groups, shape.columns, -1).contiguous()


@contextmanager
def _hooked(hooks: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
