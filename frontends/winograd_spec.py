"""The Winograd pruning of a model as ONNX metadata: ``schedules.winograd_pruning``, its complaints made InputErrors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..schedules import winograd_pruning
from ..schedules.winograd_pruning import ATTRIBUTE as KEY
from ..schedules.winograd_pruning import WinogradPruning, dump
from .errors import InputError

__all__ = ["KEY", "Spec", "dump", "parse", "separating_threshold"]

Spec = dict[str, WinogradPruning]


def parse(value: str | Mapping[str, Any], shapes: Mapping[str, Sequence[int]], where: str) -> Spec:
    """Read and check a specification.

    Args:
        value: the JSON text or the object. shapes: of the weights the model has. where: for the error message.

    Raises:
        InputError: for anything that is not a specification for these weights.
    """
    try:
        return winograd_pruning.parse(value, where, shapes)
    except ValueError as error:
        raise InputError(str(error)) from None


def separating_threshold(values: NDArray[np.floating], share: float) -> float:
    """``schedules.winograd_pruning.separating_threshold``, for weights of either domain.

    Raises:
        InputError: equal magnitudes leave no such threshold below the largest.
    """
    try:
        return winograd_pruning.separating_threshold(values, share)
    except ValueError as error:
        raise InputError(str(error)) from None
