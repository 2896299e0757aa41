"""The losses that the project trains with, by name, and how an output bears on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LOSSES", "PROBES", "Batch", "evaluating"]

Batch = tuple[Tensor, Tensor]
"""Inputs and targets."""

LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": lambda output, target: F.mse_loss(output.float(), target),
    "cross-entropy": lambda output, target: F.cross_entropy(output.float(), target),
}
"""Of outputs and targets; means over a batch."""


def _mean_square(output: Tensor, draw: torch.Generator) -> Tensor:
    signs = torch.randint(0, 2, output.shape, generator=draw).to(output) * 2 - 1
    return (2 / output.numel()) ** 0.5 * (signs * output).sum()


def _cross_entropy(output: Tensor, draw: torch.Generator) -> Tensor:
    logarithms = output.log_softmax(1).movedim(1, -1).reshape(-1, output.shape[1])
    classes = torch.multinomial(logarithms.detach().exp().cpu(), 1, generator=draw).to(output.device)
    signs = torch.randint(0, 2, classes.shape, generator=draw).to(output) * 2 - 1
    return (signs * logarithms.gather(1, classes)).sum() / len(logarithms) ** 0.5


PROBES: Mapping[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "mse": _mean_square,
    "cross-entropy": _cross_entropy,
}
"""A random number of a batch's outputs whose gradient, squared, is on average the diagonal of the Gauss-Newton matrix:
independent signs make the products of different outputs vanish."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode within the context, then every module as before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
