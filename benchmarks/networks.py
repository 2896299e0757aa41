"""The networks of the benchmarks, with random weights, and what is pruned of them.

Weights are He initialised and biases small and random, by one seed. A sparse model has the zeros asked for in every
convolution and every fully-connected layer, the first and the last included, layer by layer and by magnitude:

spatial   the smallest weights are zero.
winograd  layers within Winograd's reach (3x3 and 5x5, stride and dilation 1) carry a threshold below which that share
          of their Winograd weights lies; their spatial weights are dense. All other layers are as in `spatial`.
joint     the weights of `spatial`, and a threshold for those of the layers within Winograd's reach: zeros in both
          domains at once, as a jointly trained model has them. What `auto` chooses from.

Every pruned layer is scaled so that the energy pruned away comes back: through 20 layers pruned at 80 % signals would
fade to nothing, and errors with them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper, shape_inference
from torch import nn

from jointsparse.frontends import batch_norm, exporting, networks, one_shot, onnx_graph, winograd_spec
from jointsparse.schedules.winograd_pruning import WinogradPruning, magnitudes, separating_threshold

SEED = 0
LANES = 16
"""Tiles that a vector instruction works on, for the choice of the tile size."""

DENSE, SPATIAL, WINOGRAD, JOINT = "dense", "spatial", "winograd", "joint"
DOMAINS = (DENSE, SPATIAL, WINOGRAD, JOINT)


@dataclass(frozen=True)
class Network:
    """A network to measure.

    Attributes:
        title: for people. make: builds the module. shape: of its input, N C H W.
    """

    title: str
    make: Callable[[], nn.Module]
    shape: tuple[int, int, int, int]


NETWORKS = {
    "resnet18": Network("ResNet-18", partial(networks.build, "resnet18"), (1, 3, 224, 224)),
    "vdsr": Network("VDSR", partial(networks.build, "vdsr"), (1, 1, 256, 256)),
    "ct-srcnn": Network("CT-SRCNN", partial(networks.build, "ct-srcnn"), (1, 1, 720, 1280)),
    "vgg16": Network("VGG-16", partial(networks.build, "vgg16"), (1, 3, 224, 224)),
    "alexnet": Network("AlexNet", partial(networks.build, "alexnet"), (1, 3, 224, 224)),
    "googlenet": Network("GoogLeNet", partial(networks.build, "googlenet"), (1, 3, 224, 224)),
}


def dense_model(network: Network) -> ModelProto:
    """The network as ONNX with random weights, BatchNorm folded."""
    torch.manual_seed(SEED)
    module = network.make()
    randomise(module)
    model = exporting.export(module, torch.zeros(network.shape))
    onnx_graph.tidy(model, network.title)
    batch_norm.fold(model)
    return model


def randomise(module: nn.Module) -> None:
    """He initialisation of all convolutions and fully-connected layers, in place, from torch's generator."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
            if part.bias is not None:
                nn.init.normal_(part.bias, std=0.05)


def sparse_model(dense: ModelProto, sparsity: float, domain: str) -> ModelProto:
    """A copy of a model, pruned as the head of this file says for ``domain``; ``dense`` is not changed."""
    model = ModelProto()
    model.CopyFrom(dense)
    if domain == DENSE:
        return model
    tiles, layers = winograd_tiles(dense), onnx_graph.layers(dense)
    spec = {}
    for tensor in model.graph.initializer:
        if tensor.name not in layers:
            continue
        weight = onnx_graph.array(tensor)
        tile = tiles.get(tensor.name)
        if domain in (SPATIAL, JOINT) or tile is None:
            weight = prune(weight, sparsity)
        if domain in (WINOGRAD, JOINT) and tile is not None:
            weight, spec[tensor.name] = prune_winograd(weight, sparsity, tile)
        tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))
    if spec:
        onnx_graph.set_metadata(model, winograd_spec.KEY, winograd_spec.dump(spec))
    return model


def prune(weight: NDArray[np.float32], sparsity: float) -> NDArray[np.float32]:
    """The weight with the share ``sparsity`` of its entries, the smallest, zero, scaled to its norm before."""
    if not sparsity:
        return weight
    magnitude = np.abs(weight)
    kept = weight * (magnitude > separating_threshold(magnitude, sparsity))
    return (kept * (np.linalg.norm(weight) / np.linalg.norm(kept))).astype(np.float32)


def prune_winograd(
    weight: NDArray[np.float32], sparsity: float, tile: int
) -> tuple[NDArray[np.float32], WinogradPruning]:
    """The weight (K, C, r, r) scaled so that its pruned Winograd weights have the energy of all of them, and the
    pruning. Magnitudes count by how much they change the output."""
    values = magnitudes(weight, tile, weighted=True)
    threshold = separating_threshold(values, sparsity)
    scale = np.sqrt(np.sum(values**2) / np.sum(values[values > threshold] ** 2))
    return (weight * scale).astype(np.float32), WinogradPruning(tile, float(threshold * scale), weighted=True)


def winograd_tiles(model: ModelProto) -> dict[str, int]:
    """Tile size of each convolution within Winograd's reach, by weight: the one with fewer vector multiplications when
    tiles fill vectors; F(2x2) where 4x4 tiles would leave most lanes of a small image idle."""
    shapes = {
        value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for graph in [shape_inference.infer_shapes(model).graph]
        for value in (*graph.value_info, *graph.output)
    }
    constants = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    tiles = {}
    for name, nodes in onnx_graph.weight_uses(model).items():
        if all(one_shot.has_winograd(node, constants[name]) for node in nodes):
            batch, _, height, width = shapes[nodes[0].output[0]]
            work = partial(_vector_multiplications, constants[name][-1], batch, height, width)
            tiles[name] = min((4, 2), key=work)
    return tiles


def _vector_multiplications(r: int, batch: int, height: int, width: int, tile: int) -> int:
    count = batch * -(-height // tile) * -(-width // tile)
    return -(-count // LANES) * (tile + r - 1) ** 2
