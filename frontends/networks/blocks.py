"""What several classifiers are made of."""

from __future__ import annotations

from torch import nn

from ..errors import InputError

__all__ = ["check_stem", "convolution", "initialise_classifier"]

STEMS = ("imagenet", "cifar")


def check_stem(network: str, stem: str) -> None:
    """Raise InputError unless ``stem`` is one of STEMS."""
    if stem not in STEMS:
        raise InputError(f'unknown {network} stem "{stem}"; choose {" or ".join(STEMS)}')


def convolution(
    inputs: int, outputs: int, size: int, stride: int = 1, padding: int | None = None, *, batch_norm: bool = False
) -> list[nn.Module]:
    """A convolution, BatchNorm where asked for, and ReLU; padded to keep the size unless ``padding`` is given."""
    padding = size // 2 if padding is None else padding
    normalised: list[nn.Module] = [nn.BatchNorm2d(outputs, eps=1e-3)] if batch_norm else []
    return [nn.Conv2d(inputs, outputs, size, stride, padding, bias=not batch_norm), *normalised, nn.ReLU()]


def initialise_classifier(model: nn.Module) -> None:
    """He initialisation of convolutions, by their outputs."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
