"""``compress``: prune, quantise and code a trained model in one go, without training or data.

What it cannot do is win the accuracy back: for high sparsity in both domains train with ``JointSparsity`` and ``save``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, numpy_helper

from ..schedules import winograd_pruning
from . import model_file, onnx_graph, winograd_spec
from .errors import InputError
from .quantization import LayerQuantization, largest_code, layer_seed, quantize_array
from .ranges import check_quantiser, check_sparsity, check_tile
from .state_dicts import SUFFIXES, load_weights

PathLike = str | os.PathLike[str]

DEFAULT_BITS = 8

_MORE_DIGITS = 4
"""That scales and biases have beside quantised weights, so that rounding them adds nothing to speak of."""


def compress(
    source: PathLike | ModelProto,
    destination: PathLike,
    *,
    spatial_sparsity: float = 0.0,
    winograd_sparsity: float = 0.0,
    step: float | None = None,
    bits: int | None = None,
    dither: bool = False,
    seed: int = 0,
    tile: int = 4,
    weighted: bool = True,
    network: str | None = None,
    network_options: Mapping[str, Any] | None = None,
    input_shape: tuple[int, ...] | dict[str, tuple[int, ...]] | None = None,
) -> None:
    """Compress a model into a ``.jsm`` file. With quantised weights, biases and the scales of BatchNorm are rounded to
    four binary digits more than the weights have.

    Args:
        source: ``.onnx`` (or a ModelProto), or weights alone, which need ``network`` and torch: ``.safetensors``, or
            ``.pt`` / ``.pth`` / ``.ckpt`` with a state dict, or one under "state_dict".
        destination: the file to write.
        spatial_sparsity: share in [0, 1) of the weights of convolutions and dense layers to zero, the smallest of all
            layers together.
        winograd_sparsity: share in [0, 1) of the Winograd weights of 3x3 and 5x5 convolutions of stride and dilation 1
            to zero: the threshold becomes part of the function in the file.
        step: of the quantiser, one for all layers, in units of the weights; 0 keeps the weights exact.
        bits: a step for each layer, such that its largest weight takes the largest code of so many bits (2 to 16).
            Give ``step`` or ``bits``; without either, 8 bits.
        dither: dithered quantisation, from ``seed`` (0 to 2^32 - 1).
        tile: Winograd output tile size. weighted: magnitudes weighted by ``Transform.importance``.
        network: name of one of the project's networks (``networks.NETWORKS``), for weights alone.
        network_options: of ``networks.build``, such as ``{"classes": 10}``.
        input_shape: for a model with open axes, or a network; by default 1 x C x 32 x 32, C as the network has it.

    Raises:
        InputError: a file that cannot be read, is not what it should be, or contradicts the options.
    """
    check_sparsity(spatial_sparsity, "spatial")
    check_sparsity(winograd_sparsity, "Winograd")
    check_quantiser(step, bits, seed)
    check_tile(tile)
    model, name = _model(source, network, network_options or {}, input_shape)
    onnx_graph.tidy(model, name)
    weights = _weights(model)
    if not weights:
        raise InputError(f"{name}: no convolution or dense layer with float32 weights; there is nothing to compress")
    prune(weights, spatial_sparsity)
    quantised = _quantise(weights, step, bits, seed if dither else None)
    for key, layer in quantised.items():
        weights[key] = layer.dequantize()
    if winograd_sparsity:
        spec = _winograd(model, weights, winograd_sparsity, tile, weighted, name)
        onnx_graph.set_metadata(model, winograd_spec.KEY, winograd_spec.dump(spec))
    tensors = onnx_graph.initializers(model)
    for key, value in weights.items():
        tensors[key].CopyFrom(numpy_helper.from_array(value, key))
    model_file.write(model_file.pack(model, quantised, name, _digits(quantised)), destination)


def prune(weights: dict[str, NDArray[np.float32]], sparsity: float) -> None:
    """Zero, in the dict, at least the share ``sparsity`` of all weights, those of the smallest magnitudes.

    Raises:
        InputError: a weight is not finite, or equal magnitudes would take every weight.
    """
    for key, value in weights.items():
        if not np.isfinite(value).all():
            raise InputError(f"weight {key!r} is not finite; give a model whose training did not diverge")
    if not sparsity:
        return
    magnitudes = np.concatenate([np.abs(value).ravel() for value in weights.values()])
    threshold = winograd_spec.separating_threshold(magnitudes, sparsity)
    for key, value in weights.items():
        # In float64: in float32 the threshold could round up to the magnitude above it.
        weights[key] = np.where(np.abs(value).astype(np.float64) <= threshold, np.float32(0), value)


# --- sources ---------------------------------------------------------------------------------------------------------


def _model(
    source: PathLike | ModelProto, network: str | None, options: Mapping[str, Any], input_shape: Any
) -> tuple[ModelProto, str]:
    """The model as ONNX with fixed shapes."""
    suffix = ".onnx" if isinstance(source, ModelProto) else Path(source).suffix.lower()
    if suffix == ".onnx":
        model, name = onnx_graph.read(source)
    elif isinstance(source, ModelProto) or suffix not in SUFFIXES:
        # torch.export.load and torch.jit.load are not on offer: a stranger's file can make the first run any code.
        raise InputError(f"{source}: unknown kind of file; give .onnx, .safetensors or .pt (weights alone)")
    else:
        if not Path(source).is_file():
            raise InputError(f"{source}: there is no such file; check the path")
        name = str(source)
        model = _from_weights(Path(source), network, options, input_shape)
    onnx_graph.fix_input_shapes(model, model_file.input_shapes(model, input_shape, name), name)
    return model, name


def _from_weights(path: Path, network: str | None, options: Mapping[str, Any], input_shape: Any) -> ModelProto:
    """Weights alone: put into one of the project's networks."""
    torch = _torch(path)
    from . import exporting
    from .networks import NETWORKS, build

    if network is None:
        raise InputError(
            f"{path}: holds weights but no network; name one of {', '.join(sorted(NETWORKS))}, "
            "or export the whole model to ONNX"
        )
    module = build(network, **options)
    load_weights(module, path)
    if input_shape is None:
        first = next(part for part in module.modules() if isinstance(part, torch.nn.Conv2d))
        input_shape = (1, first.in_channels, 32, 32)
    if isinstance(input_shape, dict):
        raise InputError(f"{path}: {network} has one input; give its shape alone")
    return exporting.export(module, torch.zeros(tuple(input_shape)))


def _torch(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise InputError(f"{path}: needs torch; pip install 'jointsparse[train]', or give an .onnx file") from None
    return torch


# --- weights ---------------------------------------------------------------------------------------------------------


def _weights(model: ModelProto) -> dict[str, NDArray[np.float32]]:
    """The float32 weights of convolutions and dense layers, in the order of the model."""
    names = onnx_graph.layers(model)
    values = {t.name: onnx_graph.array(t) for t in model.graph.initializer if t.name in names}
    return {key: value for key, value in values.items() if value.dtype == np.float32 and value.size}


def _quantise(
    weights: dict[str, NDArray[np.float32]], step: float | None, bits: int | None, seed: int | None
) -> dict[str, LayerQuantization]:
    if step == 0:
        return {}
    found = {}
    for index, (key, value) in enumerate(weights.items()):
        largest = float(np.abs(value).max()) or 1.0
        own = largest / largest_code(bits or DEFAULT_BITS) if step is None else step
        found[key] = quantize_array(value, own, None if seed is None else layer_seed(seed, index))
    return found


def _digits(quantised: Mapping[str, LayerQuantization]) -> int | None:
    """Of biases and scales, behind the point."""
    if not quantised:
        return None
    largest = max(int(np.abs(layer.codes).max(initial=0)) for layer in quantised.values())
    return min(largest.bit_length() + _MORE_DIGITS, 23)


def _winograd(
    model: ModelProto,
    weights: dict[str, NDArray[np.float32]],
    sparsity: float,
    tile: int,
    weighted: bool,
    name: str,
) -> winograd_spec.Spec:
    """One threshold over all layers that a Winograd kernel can run."""
    uses = onnx_graph.weight_uses(model)
    layers = [
        key
        for key, value in weights.items()
        if key in uses and all(has_winograd(node, value.shape) for node in uses[key])
    ]
    if not layers:
        raise InputError(
            f"{name}: no 3x3 or 5x5 convolution of stride 1 and dilation 1 to prune in the Winograd domain; "
            "leave Winograd sparsity out"
        )
    values = [winograd_pruning.magnitudes(weights[key], tile, weighted).ravel() for key in layers]
    threshold = winograd_spec.separating_threshold(np.concatenate(values), sparsity)
    return {key: winograd_pruning.WinogradPruning(tile, threshold, weighted) for key in layers}


def has_winograd(node: NodeProto, shape: Sequence[int]) -> bool:
    """Whether a node with a weight of this shape is a convolution within Winograd's reach."""
    ones = [1, 1]
    return (
        node.op_type == "Conv"
        and winograd_pruning.is_winograd_shape(shape)
        and list(onnx_graph.attribute(node, "strides", ones)) == ones
        and list(onnx_graph.attribute(node, "dilations", ones)) == ones
    )
