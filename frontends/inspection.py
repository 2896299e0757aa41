"""What a ``.jsm`` file holds, layer by layer and byte by byte. Neither TVM nor torch is needed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from ..schedules.winograd_pruning import WinogradPruning
from . import container, model_file, onnx_graph
from .container import Contents, Record, Shared
from .errors import printable
from .quantization import LayerQuantization, entropy

_FLOATS = {TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16}
_PIECE = 2**16  # filters transformed at a time.


@dataclass(frozen=True)
class LayerInfo:
    """One weight tensor of a convolution or dense layer.

    Attributes:
        name: of the weight. operator: the ONNX operator that reads it. shape: of the weight.
        weights: how many. nonzeros: how many are not zero.
        spatial_sparsity: share of zeros.
        tile: Winograd output tile size, None without a Winograd threshold.
        winograd_sparsity: share of zeros among the Winograd weights, thresholded; None without a threshold.
        step: of the quantiser, None if the weights are stored as they are. dithered: whether it was dithered.
        bytes: of the layer's stream in the file.
        bits_per_weight: 8 * bytes / weights.
        entropy: of the codes, bits per weight, each code by itself; None if not quantised.
    """

    name: str
    operator: str
    shape: tuple[int, ...]
    weights: int
    nonzeros: int
    spatial_sparsity: float
    tile: int | None
    winograd_sparsity: float | None
    step: float | None
    dithered: bool
    bytes: int
    bits_per_weight: float
    entropy: float | None


@dataclass(frozen=True)
class ModelInfo:
    """A ``.jsm`` file; print it for a table.

    Attributes:
        path: of the file. version: of the format. layers: the weights of convolutions and dense layers.
        parameters: all weights and biases, BatchNorm folded; a shared one counts once.
        dense_bytes: four bytes each. file_bytes: every byte of the file.
        ratio: the first by the second, built libraries not counted.
        other_bytes: streams of biases and other tensors. graph_bytes, index_bytes, library_bytes: of these sections.
        libraries: in the file, domain and target of each.
        bits_per_weight, entropy: over the layers, of what is quantised; None if nothing is.
        spatial_sparsity: over the layers' weights.
        winograd_sparsity: over the Winograd weights of the layers that have a threshold, None if none has.
    """

    path: str
    version: int
    layers: tuple[LayerInfo, ...]
    parameters: int
    dense_bytes: int
    file_bytes: int
    ratio: float
    other_bytes: int
    graph_bytes: int
    index_bytes: int
    library_bytes: int
    libraries: tuple[str, ...]
    bits_per_weight: float | None
    entropy: float | None
    spatial_sparsity: float
    winograd_sparsity: float | None

    def to_json(self) -> str:
        """All fields as a JSON object."""
        return json.dumps(asdict(self), indent=2)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield _table(self)
        rest = f"graph {self.graph_bytes:,}, index {self.index_bytes:,}, biases and other tensors {self.other_bytes:,}"
        yield Text(
            f"{self.file_bytes:,} bytes ({rest}); {self.parameters:,} parameters of 32 bits are {self.dense_bytes:,}: "
            f"ratio {self.ratio:.2f}"
        )
        if self.libraries:
            names = printable("; ".join(self.libraries))
            yield Text(f"libraries, {self.library_bytes:,} bytes, not in the ratio: {names}")

    def __str__(self) -> str:
        console = Console(width=120, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def inspect(path: str | os.PathLike[str]) -> ModelInfo:
    """What a ``.jsm`` file holds.

    Raises:
        InputError: the file is damaged, foreign, too new or too large.
    """
    return inspect_contents(model_file.read(path), str(path))


def inspect_contents(contents: Contents, path: str) -> ModelInfo:
    """Of contents read from a path."""
    onnx_graph.check(_declared(contents), path)
    sizes = contents.sizes
    assert sizes is not None  # decoded contents have them
    bases = {record.name: record.base for record in contents.records if not isinstance(record.base, Shared)}
    operators = _operators(contents)
    layers, pruned, transformed = [], 0.0, 0
    for record in contents.records:
        if record.name not in operators:
            continue
        base = bases[record.base.of] if isinstance(record.base, Shared) else record.base
        layer = _layer(record, base, operators[record.name], contents, sizes.tensors[record.name])
        layers.append(layer)
        if layer.tile is not None and layer.winograd_sparsity is not None:
            count = record.shape[0] * record.shape[1] * (layer.tile + record.shape[2] - 1) ** 2
            pruned, transformed = pruned + layer.winograd_sparsity * count, transformed + count
    parameters = _parameters(contents)
    weights = sum(layer.weights for layer in layers)
    quantised = [layer for layer in layers if layer.entropy is not None]
    return ModelInfo(
        path=path,
        version=container.VERSION,
        layers=tuple(layers),
        parameters=parameters,
        dense_bytes=4 * parameters,
        file_bytes=sizes.file,
        ratio=4 * parameters / (sizes.file - sizes.libraries),
        other_bytes=sizes.streams - sum(layer.bytes for layer in layers),
        graph_bytes=sizes.graph,
        index_bytes=sizes.index,
        library_bytes=sizes.libraries,
        libraries=tuple(f"{one.domain} for {one.target}" for one in contents.libraries),
        bits_per_weight=_mean(quantised, lambda layer: layer.bits_per_weight),
        entropy=_mean(quantised, lambda layer: layer.entropy or 0.0),
        spatial_sparsity=1 - sum(layer.nonzeros for layer in layers) / weights if weights else 0.0,
        winograd_sparsity=pruned / transformed if transformed else None,
    )


def _mean(layers: Sequence[LayerInfo], figure: Callable[[LayerInfo], float]) -> float | None:
    """Over all weights."""
    weights = sum(layer.weights for layer in layers)
    return sum(figure(layer) * layer.weights for layer in layers) / weights if weights else None


def _declared(contents: Contents) -> ModelProto:
    """The model with its stored tensors as inputs, which need no data: a small file can declare very large ones."""
    model = ModelProto()
    model.CopyFrom(contents.graph)
    known = {value.name for value in model.graph.input}
    for record in contents.records:
        if record.name not in known:
            base = record.base
            kind = helper.np_dtype_to_tensor_dtype(base.dtype) if isinstance(base, np.ndarray) else TensorProto.FLOAT
            model.graph.input.append(helper.make_tensor_value_info(record.name, kind, record.shape))
    return model


def _operators(contents: Contents) -> dict[str, str]:
    """The operator that reads each weight of a convolution or dense layer, by the weight's name."""
    model = ModelProto()
    model.CopyFrom(contents.graph)
    model.graph.initializer.extend(TensorProto(name=record.name) for record in contents.records)
    return {name: node.op_type for name, node in onnx_graph.layers(model).items()}


def _layer(record: Record, base: Any, operator: str, contents: Contents, size: int) -> LayerInfo:
    quantised = base if isinstance(base, LayerQuantization) else None
    values = quantised.dequantize() if quantised else base
    threshold = contents.winograd.get(record.name)
    nonzeros = int(np.count_nonzero(values))
    return LayerInfo(
        name=record.name,
        operator=operator,
        shape=record.shape,
        weights=values.size,
        nonzeros=nonzeros,
        spatial_sparsity=1 - nonzeros / values.size,
        tile=threshold.tile if threshold else None,
        # Scale and threshold grow together, so the unscaled weights have the same zeros.
        winograd_sparsity=_winograd_sparsity(threshold, values) if threshold else None,
        step=quantised.step if quantised else None,
        dithered=quantised is not None and quantised.dither_seed is not None,
        bytes=size,
        bits_per_weight=8 * size / values.size,
        entropy=entropy(quantised.codes) if quantised else None,
    )


def _winograd_sparsity(pruning: WinogradPruning, weight: np.ndarray) -> float:
    """``pruning.sparsity(weight)`` in pieces: the float64 Winograd weights of all of a layer take up to 18 times it."""
    channels, depth = weight.shape[:2]
    columns = min(depth, _PIECE)
    rows = max(1, _PIECE // columns)
    pruned = 0.0
    for row in range(0, channels, rows):
        threshold = pruning.threshold[row : row + rows] if isinstance(pruning.threshold, tuple) else pruning.threshold
        part = replace(pruning, threshold=threshold)
        for column in range(0, depth, columns):
            piece = weight[row : row + rows, column : column + columns]
            pruned += part.sparsity(piece) * piece.shape[0] * piece.shape[1]
    return pruned / (channels * depth)


def _parameters(contents: Contents) -> int:
    """Floating-point tensors of at least one axis, shared ones once."""
    own = [r for r in contents.records if not isinstance(r.base, Shared)]
    stored = sum(int(np.prod(r.shape)) for r in own if _is_float(r.base))
    in_graph = sum(
        int(np.prod(t.dims)) for t in contents.graph.graph.initializer if t.data_type in _FLOATS and len(t.dims)
    )
    return stored + in_graph


def _is_float(base: Any) -> bool:
    return isinstance(base, LayerQuantization) or helper.np_dtype_to_tensor_dtype(base.dtype) in _FLOATS


def _table(info: ModelInfo) -> Table:
    table = Table(title=Text(printable(info.path)), show_footer=True)
    layers = info.layers
    weights = sum(layer.weights for layer in layers)
    size = sum(layer.bytes for layer in layers)
    table.add_column("layer", Text(f"{len(layers)} layers"), overflow="fold")
    table.add_column("shape", justify="right")
    table.add_column("zeros", f"{info.spatial_sparsity:.1%}", justify="right")
    table.add_column("Winograd", _percent(info.winograd_sparsity), justify="right")
    table.add_column("bits/weight", f"{8 * size / weights:.2f}" if weights else "", justify="right")
    # Beside the bits of all layers only if it is of all layers too.
    is_whole = all(layer.entropy is not None for layer in layers)
    table.add_column("entropy", _bits(info.entropy if is_whole else None), justify="right")
    table.add_column("bytes", f"{size:,}", justify="right")
    for layer in layers:
        winograd = _percent(layer.winograd_sparsity) + (f" F({layer.tile})" if layer.tile else "")
        table.add_row(
            Text(printable(layer.name)),
            "x".join(map(str, layer.shape)),
            f"{layer.spatial_sparsity:.1%}",
            winograd,
            f"{layer.bits_per_weight:.2f}",
            _bits(layer.entropy),
            f"{layer.bytes:,}",
        )
    return table


def _bits(entropy: float | None) -> str:
    return "-" if entropy is None else f"{entropy:.2f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
