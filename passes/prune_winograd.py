"""Decide which Winograd weights are zero: by the thresholds the model carries, or by a share of all of them."""

from __future__ import annotations

import numpy as np
import tvm

from ..schedules.winograd_pruning import ATTRIBUTE, WinogradPruning, magnitudes, parse, separating_threshold
from .layers import Layer, Worklist
from .plan import TILE, WINOGRAD


@tvm.transform.module_pass(opt_level=0, name="PruneWinograd")
class PruneWinograd:
    """Give every layer within Winograd's reach its pruning, by kernel; the module loses the attribute so used up.

    A layer named in the module attribute is computed with the tile size given there only: tile size and threshold
    belong together. Other layers may use every tile size; by ``sparsity`` their smallest weights are pruned, with one
    threshold for all layers together (for each tile size, as magnitudes of two tile sizes do not compare). Where equal
    magnitudes leave no such threshold, that tile size is not supported.

    Args:
        worklist: as CollectConvolutions left it.
        sparsity: share of Winograd weights to prune, in [0, 1); 0 prunes nothing, so that the result equals dense
            convolution.
        tile: allow this output tile size only, 2 or 4; None for both.
        weighted: magnitudes count by ``Transform.importance()``. Pruning a pre-trained ResNet-20 and VDSR so without
            further training, at 40 and 60 %, gave a smaller output error than raw magnitude for both tile sizes (VDSR,
            F(4x4), 40 %: 0.46 against 1.65 of the output's RMS).

    Raises:
        ValueError: for a malformed attribute, and for a sparsity where the model carries thresholds of its own.
    """

    def __init__(
        self, worklist: Worklist, sparsity: float = 0.0, *, tile: int | None = None, weighted: bool = True
    ) -> None:
        self.worklist = worklist
        self.sparsity = sparsity
        self.tile = tile
        self.weighted = weighted

    def transform_module(self, mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        attribute = mod.get_attr(ATTRIBUTE)
        thresholds = parse(str(attribute), "the module") if attribute is not None else {}
        if thresholds and self.sparsity > 0:
            raise ValueError(
                f"the model carries Winograd thresholds of its own (for {len(thresholds)} weights): "
                "leave winograd_sparsity at 0"
            )
        self._warn_of_unknown(thresholds)
        for layer in self.worklist.layers:
            if layer.left_alone is None:
                self._allow(layer, thresholds.get(layer.weight.parameter or "") if layer.weight else None)
        if self.sparsity > 0:
            self._prune_globally()
        return mod if attribute is None else mod.without_attr(ATTRIBUTE)

    def _allow(self, layer: Layer, threshold: WinogradPruning | None) -> None:
        """Enter the tile sizes that this layer may be computed with."""
        if threshold is None and layer.weight is not None:
            layer.weight = layer.weight.folded()
        for tile, kernel in WINOGRAD.items():
            if kernel in layer.unsupported:
                continue
            reason = self._why_not(layer, tile, threshold)
            if reason is not None:
                layer.unsupported[kernel] = reason
            else:
                layer.pruning[kernel] = threshold or WinogradPruning(tile, weighted=self.weighted)

    def _why_not(self, layer: Layer, tile: int, threshold: WinogradPruning | None) -> str | None:
        assert layer.weight is not None
        if threshold is not None and threshold.tile != tile:
            return f"the model's Winograd threshold is for tile size {threshold.tile}"
        count, channels = np.size(threshold.threshold) if threshold is not None else 1, layer.weight.stored.shape[0]
        if count not in (1, channels):
            raise ValueError(
                f"module attribute {ATTRIBUTE}, weight {layer.weight.parameter!r}: {count} thresholds for {channels} "
                "output channels"
            )
        if threshold is not None and layer.weight.scale.shape[2:] != (1, 1):
            return "the weights are scaled within a filter: the model's Winograd threshold does not follow"
        if self.tile not in (None, tile):
            return f"tile size {self.tile} asked for"
        return None

    def _prune_globally(self) -> None:
        for kernel, tile in TILE.items():
            layers = [layer for layer in self.worklist.layers if kernel in layer.pruning]
            weights = [layer.weight.value for layer in layers if layer.weight is not None]
            if not weights:
                continue
            # Single precision halves the memory, which for VGG-16 is hundreds of megabytes.
            values = [magnitudes(weight, tile, self.weighted).astype(np.float32).ravel() for weight in weights]
            try:
                threshold = separating_threshold(np.concatenate(values), self.sparsity)
            except ValueError as error:
                for layer in layers:
                    del layer.pruning[kernel]
                    layer.unsupported[kernel] = str(error)
                continue
            for layer in layers:
                layer.pruning[kernel] = WinogradPruning(tile, threshold, self.weighted)

    def _warn_of_unknown(self, thresholds: dict[str, WinogradPruning]) -> None:
        """A threshold that finds no weight would silently prune nothing."""
        weights = [(layer, layer.weight.parameter) for layer in self.worklist.layers if layer.weight is not None]
        fully_connected = {name for layer, name in weights if layer.op == "nn.dense"}
        unknown = sorted(thresholds.keys() - {name for _, name in weights if name not in fully_connected})
        if unknown:
            types = sorted({_data_type(layer) for layer in self.worklist.layers} - {"float32"})
            reason = _why_unknown(fully_connected.issuperset(unknown), types)
            self.worklist.warnings.append(
                f"Winograd thresholds without a convolution's weight of that name ({', '.join(unknown[:3])}"
                f"{', ...' if len(unknown) > 3 else ''}): {reason}"
            )


def _why_unknown(fully_connected: bool, types: list[str]) -> str:
    """Why no convolution has a weight of such a name; types: data types of layers other than float32."""
    if fully_connected:
        return "they are of fully-connected layers, which Winograd convolution does not reach"
    if types:
        # Weights of other types come as constants without names.
        return f"the pruning of layers of data type {', '.join(types)} is dropped, Winograd kernels compute in float32"
    return "the module was bound or renamed before"


def _data_type(layer: Layer) -> str:
    """Of the weights, as far as known."""
    kind = layer.call.args[1].checked_type if layer.call is not None and len(layer.call.args) > 1 else None
    return str(kind.dtype) if isinstance(kind, tvm.relay.TensorType) else "float32"
