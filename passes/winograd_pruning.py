"""Which Winograd weights of a layer are zero: the thresholds a model carries, and what they mean."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..schedules.winograd import TILES, transform

ATTRIBUTE = "jointsparse.winograd"
"""Module attribute: a JSON object, weight name to tile, origin, threshold and weighted."""


@dataclass(frozen=True)
class WinogradThreshold:
    """How one weight tensor is pruned in the Winograd domain.

    Attributes:
        tile: output tile size m. Tiles start at output (0, 0); size and start are part of the function.
        threshold: one magnitude, or one for each output channel. 0 prunes nothing.
        weighted: magnitudes count by ``Transform.importance()``, how much they change the output.
    """

    tile: int
    threshold: tuple[float, ...] = (0.0,)
    weighted: bool = True

    def weights(self, weight: NDArray[np.floating]) -> NDArray[np.float64]:
        """Winograd weights U = G w G^T, zero where ``|U| * I <= threshold``.

        Args:
            weight: (K, C, r, r). Returns: (K, C, n, n), n = tile + r - 1.

        Raises:
            ValueError: when there is neither one threshold nor one for each output channel.
        """
        if len(self.threshold) not in (1, weight.shape[0]):
            raise ValueError(f"{len(self.threshold)} thresholds for {weight.shape[0]} output channels")
        winograd = transform(self.tile, weight.shape[-1])
        dense = winograd.filters(weight)
        magnitude = np.abs(dense) * winograd.importance() if self.weighted else np.abs(dense)
        return np.where(magnitude <= np.reshape(self.threshold, (-1, 1, 1, 1)), 0.0, dense)


def parse_thresholds(text: str) -> dict[str, WinogradThreshold]:
    """Read the module attribute.

    Raises:
        ValueError: with the weight's name, for anything that is not such an attribute.
    """
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise ValueError(f"module attribute {ATTRIBUTE} is not JSON ({error}); load the model again") from None
    if not isinstance(entries, Mapping):
        raise ValueError(f"module attribute {ATTRIBUTE} must be an object, one entry a weight; load the model again")
    return {name: _parse_entry(name, entry) for name, entry in entries.items()}


def global_threshold(weights: list[NDArray[np.floating]], tile: int, sparsity: float, weighted: bool) -> float:
    """The magnitude at or below which the share ``sparsity`` of all Winograd weights of these layers lies, at least.

    It is midway between two distinct magnitudes, so that rounding on another machine flips no entry.
    """
    if sparsity <= 0 or not weights:
        return 0.0
    # Single precision halves the memory, which for VGG-16 is hundreds of megabytes.
    magnitudes = np.concatenate([_magnitudes(weight, tile, weighted) for weight in weights])
    last = max(math.ceil(sparsity * magnitudes.size) - 1, 0)
    magnitudes.partition(last)
    pruned = magnitudes[last]
    above = magnitudes[last:][magnitudes[last:] > pruned]
    return (
        float((np.float64(pruned) + np.float64(above.min())) / 2)
        if above.size
        else float(np.nextafter(pruned, np.float32(np.inf)))
    )


def _magnitudes(weight: NDArray[np.floating], tile: int, weighted: bool) -> NDArray[np.float32]:
    winograd = transform(tile, weight.shape[-1])
    magnitude = np.abs(winograd.filters(weight))
    return (magnitude * winograd.importance() if weighted else magnitude).astype(np.float32).ravel()


def _parse_entry(name: str, entry: Any) -> WinogradThreshold:
    def refuse(what: str) -> ValueError:
        return ValueError(f"module attribute {ATTRIBUTE}, weight {name!r}: {what}; load the model again")

    if not isinstance(entry, Mapping) or not {"tile", "origin", "threshold", "weighted"} <= entry.keys():
        raise refuse("needs tile, origin, threshold and weighted")
    if entry["tile"] not in TILES:
        raise refuse(f"tile must be one of {TILES}, is {entry['tile']!r}")
    if entry["origin"] != [0, 0]:
        raise refuse(f"the tile grid must start at [0, 0], not {entry['origin']!r}")
    threshold = entry["threshold"] if isinstance(entry["threshold"], list) else [entry["threshold"]]
    if not threshold or not all(isinstance(t, int | float) and math.isfinite(t) and t >= 0 for t in threshold):
        raise refuse("threshold must be a finite number >= 0, or a list of them")
    if not isinstance(entry["weighted"], bool):
        raise refuse("weighted must be true or false")
    return WinogradThreshold(entry["tile"], tuple(float(t) for t in threshold), entry["weighted"])
