"""An ONNX graph of a CNN as a torch module, thresholds in the Winograd domain included.

Two uses: PyTorch as an engine for models that come as ONNX, and, in double precision, the reference for every build.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from onnx import ModelProto, NodeProto
from torch import Tensor, nn

from ...schedules.winograd import transform
from ...schedules.winograd_pruning import WinogradPruning
from .. import onnx_graph
from ..winograd_inference import winograd_conv2d
from .base import LeftOut

_BAND_VALUES = 2**26
"""Values of the Winograd domain computed at once: half a gigabyte in double precision."""


class OnnxModule(nn.Module):
    """Computes an ONNX model node by node; the usual operators of CNNs, fixed shapes.

    Args:
        model: initializers become buffers. It is not changed.
        winograd: prunings, by weight, of convolutions to be computed in the Winograd domain.

    Takes the inputs in the order of ``inputs``, gives a tuple of all outputs.

    Raises:
        LeftOut: for an operator or option that is not among those known here.
    """

    def __init__(self, model: ModelProto, winograd: Mapping[str, WinogradPruning] | None = None) -> None:
        super().__init__()
        graph = ModelProto()
        graph.CopyFrom(model)
        onnx_graph.tidy(graph, "the model")
        self.nodes = [(_operator(node), node) for node in graph.graph.node]
        self.inputs = [value.name for value in graph.graph.input]
        self.outputs = [value.name for value in graph.graph.output]
        self.winograd = dict(winograd or {})
        # Names in ONNX hold dots, which buffers must not.
        self.places: dict[str, str] = {}
        for index, tensor in enumerate(graph.graph.initializer):
            self.places[tensor.name] = f"constant{index}"
            self.register_buffer(f"constant{index}", torch.from_numpy(onnx_graph.array(tensor).copy()))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        values: dict[str, Any] = {name: getattr(self, place) for name, place in self.places.items()}
        values |= zip(self.inputs, inputs, strict=True)
        for function, node in self.nodes:
            arguments: list[Any] = [values[name] if name else None for name in node.input]
            if node.op_type == "Conv" and node.input[1] in self.winograd:
                values[node.output[0]] = _winograd_conv(node, self.winograd[node.input[1]], *arguments)
            else:
                values[node.output[0]] = function(node, *arguments)
        return tuple(values[name] for name in self.outputs)


def _operator(node: NodeProto) -> Callable[..., Tensor]:
    if node.domain not in ("", "ai.onnx") or node.op_type not in _OPERATORS:
        raise LeftOut(f"no PyTorch equivalent of the operator {node.op_type} is known here")
    if any(node.output[1:]):
        raise LeftOut(f"{node.op_type} with several outputs is not known here")
    if _attribute(node, "auto_pad", b"NOTSET") not in (b"NOTSET", b""):
        raise LeftOut(f"{node.op_type} with auto_pad is not known here")
    return _OPERATORS[node.op_type]


_attribute = onnx_graph.attribute


def _pads(node: NodeProto) -> tuple[int, int, int, int]:
    """Top, left, bottom, right."""
    top, left, bottom, right = _attribute(node, "pads", [0, 0, 0, 0])
    return top, left, bottom, right


def _padded(x: Tensor, node: NodeProto, value: float = 0.0) -> tuple[Tensor, tuple[int, int]]:
    """The data, and the padding left to the operator: all of it where opposite sides agree."""
    top, left, bottom, right = _pads(node)
    if (top, left) == (bottom, right):
        return x, (top, left)
    return F.pad(x, (left, right, top, bottom), value=value), (0, 0)


def _conv(node: NodeProto, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    x, padding = _padded(x, node)
    strides, dilations = (tuple(_attribute(node, key, [1, 1])) for key in ("strides", "dilations"))
    return F.conv2d(x, weight, bias, strides, padding, dilations, _attribute(node, "group", 1))


def _winograd_conv(
    node: NodeProto, pruning: WinogradPruning, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    winograd = transform(pruning.tile, weight.shape[-1])
    filters = torch.from_numpy(pruning.filters(weight.numpy())).to(x.dtype)
    top, left, bottom, right = _pads(node)
    x = F.pad(x, (left, right, top, bottom))
    height = x.shape[2] - winograd.r + 1
    # Band by band of whole tiles: a wide image in the Winograd domain would not fit into memory.
    row = x.shape[0] * max(x.shape[1], weight.shape[0]) * winograd.n**2 * -(-x.shape[3] // winograd.m)
    band = winograd.m * max(1, _BAND_VALUES // row)
    groups = _attribute(node, "group", 1)
    bands = [
        winograd_conv2d(
            x[:, :, start : min(start + band, height) + winograd.r - 1], filters, winograd, (0, 0, 0, 0), groups
        )
        for start in range(0, height, band)
    ]
    y = torch.cat(bands, 2)
    return y if bias is None else y + bias.reshape(-1, 1, 1)


def _max_pool(node: NodeProto, x: Tensor) -> Tensor:
    x, padding = _padded(x, node, -float("inf"))
    size = _attribute(node, "kernel_shape", None)
    strides, dilations = (_attribute(node, key, [1, 1]) for key in ("strides", "dilations"))
    return F.max_pool2d(x, size, strides, padding, dilations, bool(_attribute(node, "ceil_mode", 0)))


def _average_pool(node: NodeProto, x: Tensor) -> Tensor:
    counted = bool(_attribute(node, "count_include_pad", 0))
    top, left, bottom, right = _pads(node)
    if (top, left) != (bottom, right) and not counted:
        raise LeftOut("AveragePool with uneven padding is not known here")
    x, padding = _padded(x, node)
    size = _attribute(node, "kernel_shape", None)
    ceil = bool(_attribute(node, "ceil_mode", 0))
    return F.avg_pool2d(x, size, _attribute(node, "strides", [1, 1]), padding, ceil, counted)


def _gemm(node: NodeProto, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    alpha, beta = _attribute(node, "alpha", 1.0), _attribute(node, "beta", 1.0)
    a = a.T if _attribute(node, "transA", 0) else a
    if alpha == beta == 1 and _attribute(node, "transB", 0):
        return F.linear(a, b, c)
    y = alpha * (a @ (b.T if _attribute(node, "transB", 0) else b))
    return y if c is None else y + beta * c


def _batch_norm(node: NodeProto, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return F.batch_norm(x, mean, variance, scale, shift, eps=_attribute(node, "epsilon", 1e-5))


def _reduce_mean(node: NodeProto, x: Tensor, axes: Tensor | None = None) -> Tensor:
    given = _attribute(node, "axes", None) if axes is None else axes.tolist()
    keep = bool(_attribute(node, "keepdims", 1))
    return x.mean(tuple(given) if given else tuple(range(x.ndim)), keep)


def _flatten(node: NodeProto, x: Tensor) -> Tensor:
    axis = _attribute(node, "axis", 1)
    return x.reshape(int(np.prod(x.shape[:axis])), -1)


def _reshape(node: NodeProto, x: Tensor, shape: Tensor) -> Tensor:
    sizes = shape.tolist()
    if not _attribute(node, "allowzero", 0):
        sizes = [size or x.shape[axis] for axis, size in enumerate(sizes)]
    return x.reshape(sizes)


def _clip(node: NodeProto, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    return x.clamp(
        _attribute(node, "min", None) if low is None else low.item(),
        _attribute(node, "max", None) if high is None else high.item(),
    )


_OPERATORS: dict[str, Callable[..., Tensor]] = {
    "Add": lambda node, a, b: a + b,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Clip": _clip,
    "Concat": lambda node, *parts: torch.cat(parts, _attribute(node, "axis", 1)),
    "Conv": _conv,
    "Dropout": lambda node, x, *_: x,
    "Flatten": _flatten,
    "Gemm": _gemm,
    "GlobalAveragePool": lambda node, x: x.mean((2, 3), True),
    "Identity": lambda node, x: x,
    "LeakyRelu": lambda node, x: F.leaky_relu(x, _attribute(node, "alpha", 0.01)),
    "MatMul": lambda node, a, b: a @ b,
    "MaxPool": _max_pool,
    "Mul": lambda node, a, b: a * b,
    "ReduceMean": _reduce_mean,
    "Relu": lambda node, x: F.relu(x),
    "Reshape": _reshape,
    "Sigmoid": lambda node, x: torch.sigmoid(x),
    "Softmax": lambda node, x: F.softmax(x, _attribute(node, "axis", -1)),
    "Sub": lambda node, a, b: a - b,
    "Tanh": lambda node, x: torch.tanh(x),
    "Transpose": lambda node, x: x.permute(*_attribute(node, "perm", list(range(x.ndim))[::-1])),
}
