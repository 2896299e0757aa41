"""Which Winograd weights of a layer are zero: the facts that make pruning part of a model's function, and their JSON.

They travel under the key ``jointsparse.winograd``, in ONNX as ``metadata_props``, in Relay as a module attribute::

    {"<weight>": {"tile": 2|4, "origin": [0, 0], "threshold": t | [t per output channel], "weighted": true|false}, ...}

With U = G w G^T, an entry is zero where ``|U| * I <= t``; I is ``Transform.importance()`` if ``weighted``, else 1.
Tiles start at output (0, 0); outputs beyond the edge are cut, inputs beyond the padding are zero. Training, file and
kernels must agree on all of it. Needs neither TVM nor torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .winograd import KERNELS, TILES, transform

ATTRIBUTE = "jointsparse.winograd"
"""The key of the ONNX metadata and of the Relay module attribute."""


@dataclass(frozen=True)
class WinogradPruning:
    """How one weight tensor is pruned in the Winograd domain.

    Attributes:
        tile: output tile size m.
        threshold: one magnitude for the layer, or one for each output channel. 0 prunes nothing but zeros.
        weighted: magnitudes count by ``Transform.importance()``, how much they change the output.
    """

    tile: int
    threshold: float | tuple[float, ...] = 0.0
    weighted: bool = True

    def filters(self, weight: NDArray[np.floating]) -> NDArray[np.float64]:
        """Winograd weights, pruned: (K, C, r, r) to (K, C, n, n), n = tile + r - 1.

        Raises:
            ValueError: when there is neither one threshold nor one for each output channel.
        """
        dense = transform(self.tile, weight.shape[-1]).filters(weight)
        return np.where(self._pruned(weight), 0.0, dense)

    def sparsity(self, weight: NDArray[np.floating]) -> float:
        """Share of zeros among the Winograd weights of ``weight`` (K, C, r, r) once pruned."""
        return float(np.mean(self._pruned(weight))) if weight.size else 0.0

    def scaled(self, scale: NDArray[np.floating]) -> WinogradPruning:
        """The same pruning after each filter was multiplied by an entry of ``scale`` (output channels,)."""
        thresholds = np.asarray(self.threshold, np.float64) * np.abs(np.asarray(scale, np.float64))
        return replace(self, threshold=tuple(thresholds.tolist()))

    def to_json(self) -> dict[str, Any]:
        """The object that stands for this layer in the JSON."""
        threshold = list(self.threshold) if isinstance(self.threshold, tuple) else self.threshold
        return {"tile": self.tile, "origin": [0, 0], "threshold": threshold, "weighted": self.weighted}

    def magnitudes(self, weight: NDArray[np.floating]) -> NDArray[np.float64]:
        """What is compared with the threshold: weight (K, C, r, r) to (K, C, n, n)."""
        return magnitudes(weight, self.tile, self.weighted)

    def _pruned(self, weight: NDArray[np.floating]) -> NDArray[np.bool_]:
        thresholds = np.atleast_1d(np.asarray(self.threshold, np.float64))
        if thresholds.size not in (1, weight.shape[0]):
            raise ValueError(f"{thresholds.size} thresholds for {weight.shape[0]} output channels")
        return self.magnitudes(weight) <= thresholds.reshape(-1, 1, 1, 1)


def magnitudes(weight: NDArray[np.floating], tile: int, weighted: bool) -> NDArray[np.float64]:
    """What thresholds are compared with: ``|G w G^T|``, times the importance of each tile position if ``weighted``.

    Args:
        weight: (K, C, r, r). Returns: (K, C, n, n), n = tile + r - 1.
    """
    winograd = transform(tile, weight.shape[-1])
    absolute = np.abs(winograd.filters(weight))
    return absolute * winograd.importance() if weighted else absolute


def separating_threshold(values: NDArray[np.floating], share: float) -> float:
    """A threshold that at least the share ``share`` of the magnitudes do not exceed, and as few more as possible.

    It lies in the middle of the widest gap within the next 0.1 % of them, far from every magnitude, so that rounding in
    another order of summation flips no entry. 0 for a share of 0, and where only zeros are left.

    Raises:
        ValueError: equal magnitudes leave no such threshold below the largest.
    """
    wanted = math.ceil(share * values.size)
    if wanted == 0:
        return 0.0
    flat = values.ravel()
    highest_pruned = np.partition(flat, wanted - 1)[wanted - 1]
    if highest_pruned == flat.max():
        if highest_pruned == 0:
            return 0.0
        why = "there are too few" if wanted == values.size else "too many magnitudes are equal"
        raise ValueError(f"at sparsity {share:g} all {values.size} weights would be pruned: {why}; ask for less")
    kept = flat[flat > highest_pruned]
    nearest = min(kept.size, values.size // 1000 + 1)
    edges = np.concatenate([[highest_pruned], np.sort(np.partition(kept, nearest - 1)[:nearest])]).astype(np.float64)
    widest = int(np.argmax(np.diff(edges)))
    return float((edges[widest] + edges[widest + 1]) / 2)


def parse(
    value: str | Mapping[str, Any], where: str, shapes: Mapping[str, Sequence[int]] | None = None
) -> dict[str, WinogradPruning]:
    """Read and check a specification.

    Args:
        value: the JSON text or the object. where: for the error message. shapes: of the weights that the model has;
            None to check nothing against them.

    Raises:
        ValueError: one line, for anything that is not a specification for these weights.
    """
    try:
        layers = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {ATTRIBUTE} is not JSON ({error}); make the file again") from None
    if not isinstance(layers, Mapping):
        raise ValueError(f"{where}: {ATTRIBUTE} must be an object, one entry a weight; make the file again")
    return {name: _parse_layer(name, entry, where, shapes) for name, entry in layers.items()}


def dump(spec: Mapping[str, WinogradPruning]) -> str:
    """The JSON text, canonical: sorted keys, no spaces."""
    return json.dumps({k: v.to_json() for k, v in spec.items()}, sort_keys=True, separators=(",", ":"))


def is_winograd_shape(shape: Sequence[int]) -> bool:
    """Whether a weight of this shape can be transformed at all (stride and dilation must be 1 as well)."""
    return len(shape) == 4 and shape[2] == shape[3] and shape[2] in KERNELS


def _parse_layer(name: str, entry: Any, where: str, shapes: Mapping[str, Sequence[int]] | None) -> WinogradPruning:
    def refuse(what: str) -> ValueError:
        return ValueError(f"{where}: {ATTRIBUTE} of {name!r}: {what}; make the file again with this version")

    if shapes is not None and name not in shapes:
        raise refuse("this is no weight of the model")
    if not isinstance(entry, Mapping) or set(entry) != {"tile", "origin", "threshold", "weighted"}:
        raise refuse("the keys must be tile, origin, threshold, weighted")
    if shapes is not None and not is_winograd_shape(shapes[name]):
        raise refuse(f"a weight of shape {tuple(shapes[name])} has no Winograd form")
    if type(entry["tile"]) is not int or entry["tile"] not in TILES:
        raise refuse(f"tile must be one of {TILES}")
    if entry["origin"] not in ([0, 0], (0, 0)):
        raise refuse("the tile grid must start at [0, 0]")
    if type(entry["weighted"]) is not bool:
        raise refuse("weighted must be true or false")
    return WinogradPruning(entry["tile"], _parse_threshold(entry["threshold"], name, shapes, refuse), entry["weighted"])


def _parse_threshold(
    threshold: Any, name: str, shapes: Mapping[str, Sequence[int]] | None, refuse: Any
) -> float | tuple[float, ...]:
    if not isinstance(threshold, list | tuple):
        if not _all_magnitudes([threshold]):
            raise refuse("threshold must be a finite number >= 0, or a list of them")
        return float(threshold)
    channels = len(threshold) if shapes is None else shapes[name][0]
    if not threshold or len(threshold) != channels or not _all_magnitudes(threshold):
        raise refuse(f"threshold must be a finite number >= 0, or {channels} of them")
    return tuple(float(t) for t in threshold)


def _all_magnitudes(values: Iterable[Any]) -> bool:
    return all(type(v) in (int, float) and 0 <= v < 1e300 for v in values)
