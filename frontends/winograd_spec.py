"""The facts that make Winograd-domain pruning part of a model's function, and the JSON in which they travel.

They are kept under the key ``jointsparse.winograd``: in ONNX as ``metadata_props``, in Relay as a module attribute::

    {"<weight>": {"tile": 2|4, "origin": [0, 0], "threshold": t | [t per output channel], "weighted": true|false}, ...}

With U = G w G^T, an entry is zero where ``|U| * I <= t``; I is ``Transform.importance()`` if ``weighted``, else 1.
Tiles start at output (0, 0). Neither TVM nor torch is needed here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..schedules.winograd import KERNELS, TILES, transform
from .errors import InputError

KEY = "jointsparse.winograd"


@dataclass(frozen=True)
class LayerThreshold:
    """How one weight tensor is pruned in the Winograd domain.

    Attributes:
        tile: output tile size m.
        threshold: one magnitude for the layer, or one for each output channel.
        weighted: magnitudes are multiplied by ``Transform.importance()``.
    """

    tile: int
    threshold: float | tuple[float, ...]
    weighted: bool

    def scaled(self, scale: NDArray[np.floating]) -> LayerThreshold:
        """The same pruning after each filter was multiplied by an entry of ``scale`` (output channels,)."""
        thresholds = np.asarray(self.threshold, np.float64) * np.abs(np.asarray(scale, np.float64))
        return replace(self, threshold=tuple(thresholds.tolist()))

    def magnitudes(self, weight: NDArray[np.floating]) -> NDArray[np.float64]:
        """What is compared with the threshold: weight (K, C, r, r) to (K, C, n, n), float64."""
        return magnitudes(weight, self.tile, self.weighted)

    def sparsity(self, weight: NDArray[np.floating]) -> float:
        """Share of zeros among the Winograd weights of ``weight`` (K, C, r, r) once pruned."""
        pruned = self.magnitudes(weight) <= np.reshape(np.asarray(self.threshold, np.float64), (-1, 1, 1, 1))
        return float(np.mean(pruned)) if pruned.size else 0.0

    def to_json(self) -> dict[str, Any]:
        """The object that stands for this layer in the JSON."""
        threshold = list(self.threshold) if isinstance(self.threshold, tuple) else self.threshold
        return {"tile": self.tile, "origin": [0, 0], "threshold": threshold, "weighted": self.weighted}


Spec = dict[str, LayerThreshold]


def magnitudes(weight: NDArray[np.floating], tile: int, weighted: bool) -> NDArray[np.float64]:
    """``|G w G^T|``, times the importance of each tile position if ``weighted``: (K, C, r, r) to (K, C, n, n)."""
    winograd = transform(tile, weight.shape[-1])
    absolute = np.abs(winograd.filters(weight))
    return absolute * winograd.importance() if weighted else absolute


def separating_threshold(values: NDArray[np.floating], share: float) -> float:
    """A threshold that at least the share ``share`` of the magnitudes do not exceed, and as few more as possible.

    It lies in the middle of the widest gap within the next 0.1 % of them, far from every magnitude, so that rounding in
    another order of summation flips no entry. 0 for a share of 0.

    Raises:
        InputError: equal magnitudes leave no such threshold below the largest.
    """
    wanted = math.ceil(share * values.size)
    if wanted == 0:
        return 0.0
    ordered = np.sort(values, axis=None)
    first = int(np.searchsorted(ordered, ordered[wanted - 1], side="right"))
    if first >= ordered.size:
        raise InputError(f"at {share:.0%} every weight would be pruned: too many magnitudes are equal; ask for less")
    last = min(ordered.size - 1, first + ordered.size // 1000)
    start = first - 1 + int(np.argmax(np.diff(ordered[first - 1 : last + 1])))
    return float((ordered[start] + ordered[start + 1]) / 2)


def parse(value: str | Mapping[str, Any], shapes: Mapping[str, Sequence[int]], where: str) -> Spec:
    """Read and check a specification.

    Args:
        value: the JSON text or the object. shapes: of the weights the model has. where: for the error message.

    Raises:
        InputError: for anything that is not a specification for these weights.
    """
    try:
        layers = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: {KEY} is not JSON ({error}); make the file again") from None
    if not isinstance(layers, Mapping):
        raise InputError(f"{where}: {KEY} must be an object, one entry a weight; make the file again")
    return {_name(name, shapes, where): _layer(name, entry, shapes[name], where) for name, entry in layers.items()}


def dump(spec: Spec) -> str:
    """The JSON text, canonical: sorted keys, no spaces."""
    return json.dumps({k: v.to_json() for k, v in spec.items()}, sort_keys=True, separators=(",", ":"))


def is_winograd_shape(shape: Sequence[int]) -> bool:
    """Whether a weight of this shape can be transformed at all (stride and dilation must be 1 as well)."""
    return len(shape) == 4 and shape[2] == shape[3] and shape[2] in KERNELS


def _name(name: Any, shapes: Mapping[str, Sequence[int]], where: str) -> str:
    if name not in shapes:
        raise InputError(f"{where}: {KEY} names {name!r}, which is no weight of the model; make the file again")
    return str(name)


def _layer(name: str, entry: Any, shape: Sequence[int], where: str) -> LayerThreshold:
    def refuse(what: str) -> InputError:
        return InputError(f"{where}: {KEY} of {name!r}: {what}; make the file again with this version")

    if not isinstance(entry, Mapping) or set(entry) != {"tile", "origin", "threshold", "weighted"}:
        raise refuse("the keys must be tile, origin, threshold, weighted")
    if not is_winograd_shape(shape):
        raise refuse(f"a weight of shape {tuple(shape)} has no Winograd form")
    if type(entry["tile"]) is not int or entry["tile"] not in TILES:
        raise refuse(f"tile must be one of {TILES}")
    if entry["origin"] not in ([0, 0], (0, 0)):
        raise refuse("the tile grid must start at [0, 0]")
    if type(entry["weighted"]) is not bool:
        raise refuse("weighted must be true or false")
    threshold = entry["threshold"]
    if isinstance(threshold, list | tuple):
        if len(threshold) != shape[0] or not _all_magnitudes(threshold):
            raise refuse(f"threshold must be {shape[0]} finite numbers >= 0")
        return LayerThreshold(entry["tile"], tuple(float(t) for t in threshold), entry["weighted"])
    if not _all_magnitudes([threshold]):
        raise refuse("threshold must be a finite number >= 0")
    return LayerThreshold(entry["tile"], float(threshold), entry["weighted"])


def _all_magnitudes(values: Iterable[Any]) -> bool:
    return all(type(v) in (int, float) and 0 <= v < 1e300 for v in values)
