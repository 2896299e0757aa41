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
from torch import Tensor, nn

from jointsparse.frontends import batch_norm, exporting, networks, one_shot, onnx_graph, winograd_spec
from jointsparse.schedules.winograd_pruning import WinogradPruning, magnitudes, separating_threshold

SEED = 0
LANES = 16
"""Tiles that a vector instruction works on, for the choice of the tile size."""

DENSE, SPATIAL, WINOGRAD, JOINT = "dense", "spatial", "winograd", "joint"
DOMAINS = (DENSE, SPATIAL, WINOGRAD, JOINT)


def _relu_conv(inputs: int, outputs: int, size: int, stride: int = 1, padding: int | None = None) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, size, stride, size // 2 if padding is None else padding), nn.ReLU()]


class VGG16(nn.Sequential):
    """Configuration D of Simonyan, Zisserman, arXiv 1409.1556. N x 3 x 224 x 224 to N x classes."""

    STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))

    def __init__(self, classes: int = 1000) -> None:
        layers: list[nn.Module] = []
        inputs = 3
        for channels, count in self.STAGES:
            for _ in range(count):
                layers += _relu_conv(inputs, channels, 3)
                inputs = channels
            layers.append(nn.MaxPool2d(2))
        layers += [nn.Flatten(), nn.Linear(512 * 7 * 7, 4096), nn.ReLU()]
        layers += [nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, classes)]
        super().__init__(*layers)


class AlexNet(nn.Sequential):
    """The one-tower form of Krizhevsky, arXiv 1404.5997, without local response normalisation. N x 3 x 224 x 224 to
    N x classes."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__(
            *_relu_conv(3, 64, 11, 4, 2),
            nn.MaxPool2d(3, 2),
            *_relu_conv(64, 192, 5),
            nn.MaxPool2d(3, 2),
            *_relu_conv(192, 384, 3),
            *_relu_conv(384, 256, 3),
            *_relu_conv(256, 256, 3),
            nn.MaxPool2d(3, 2),
            nn.Flatten(),
            nn.Linear(256 * 6 * 6, 4096),
            nn.ReLU(),
            nn.Linear(4096, 4096),
            nn.ReLU(),
            nn.Linear(4096, classes),
        )


def _normalised(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs, eps=1e-3), nn.ReLU()
    )


class _Inception(nn.Module):
    """Table 1 of Szegedy et al., one line: 1x1, 3x3 and 5x5 behind 1x1, and pooling with 1x1, side by side."""

    def __init__(self, inputs: int, one: int, to3: int, three: int, to5: int, five: int, pool: int) -> None:
        super().__init__()
        self.one = _normalised(inputs, one, 1)
        self.three = nn.Sequential(_normalised(inputs, to3, 1), _normalised(to3, three, 3))
        self.five = nn.Sequential(_normalised(inputs, to5, 1), _normalised(to5, five, 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), _normalised(inputs, pool, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1)


class GoogLeNet(nn.Sequential):
    """Szegedy et al., "Going deeper with convolutions", CVPR 2015, Table 1, with 5x5 as printed there, without the
    auxiliary heads; BatchNorm after every convolution in place of local response normalisation. N x 3 x 224 x 224 to
    N x classes."""

    def __init__(self, classes: int = 1000) -> None:
        halve = partial(nn.MaxPool2d, 3, 2, ceil_mode=True)
        super().__init__(
            _normalised(3, 64, 7, 2),
            halve(),
            _normalised(64, 64, 1),
            _normalised(64, 192, 3),
            halve(),
            _Inception(192, 64, 96, 128, 16, 32, 32),
            _Inception(256, 128, 128, 192, 32, 96, 64),
            halve(),
            _Inception(480, 192, 96, 208, 16, 48, 64),
            _Inception(512, 160, 112, 224, 24, 64, 64),
            _Inception(512, 128, 128, 256, 24, 64, 64),
            _Inception(512, 112, 144, 288, 32, 64, 64),
            _Inception(528, 256, 160, 320, 32, 128, 128),
            halve(),
            _Inception(832, 256, 160, 320, 32, 128, 128),
            _Inception(832, 384, 192, 384, 48, 128, 128),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(1024, classes),
        )


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
    "vgg16": Network("VGG-16", VGG16, (1, 3, 224, 224)),
    "alexnet": Network("AlexNet", AlexNet, (1, 3, 224, 224)),
    "googlenet": Network("GoogLeNet", GoogLeNet, (1, 3, 224, 224)),
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
