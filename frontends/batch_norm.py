"""Fold BatchNormalization into the convolution or Gemm before it, or into all of a sum of them, on the ONNX graph.

``BN(conv(x, W) + b) = conv(x, s W) + s (b - mean) + beta`` where ``s = gamma / sqrt(var + eps)``, for each channel.
The scales are returned, so that a file can keep the codes of the unscaled weights. The order of operations is fixed:
s in float64, rounded to float32; s W one float32 product an entry; the bias in float64, rounded to float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from . import onnx_graph, winograd_spec
from .coding.floats import shortened


@dataclass(frozen=True)
class Scaling:
    """What was done to a weight.

    Attributes:
        source: the initializer the weight came from; another name than its own where one weight had two scales.
        axis: the weight's output channel axis. scale: float32, one entry an output channel.
    """

    source: str
    axis: int
    scale: NDArray[np.float32]

    def apply(self, weight: NDArray[np.float32]) -> NDArray[np.float32]:
        """The scaled weight, float32."""
        return scaled(weight, self.scale, self.axis)


def scaled(weight: NDArray[np.float32], scale: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    """``weight * scale`` along ``axis``: one IEEE float32 product an entry, the same on every platform."""
    shape = [1] * weight.ndim
    shape[axis] = -1
    return np.multiply(weight, scale.reshape(shape), dtype=np.float32)


def fold(model: ModelProto) -> dict[str, Scaling]:
    """Fold in place every BatchNormalization that directly follows a foldable operator or a sum of them; others stay.

    Foldable are Conv, ConvTranspose without groups, and Gemm, with float32 weights known as initializers and read by
    nobody else; the statistics must be initializers too. A weight shared by several operators gets a copy for each
    scaling. Winograd thresholds in the metadata follow their filters.

    Returns:
        The scaled weights by name. A weight read by an unfolded operator as well keeps its value under its own name.
    """
    folder = _Folder(model)
    for node in list(model.graph.node):
        if node.op_type == "BatchNormalization" and node.domain in ("", "ai.onnx"):
            folder.try_fold(node)
    folder.finish()
    return folder.scalings


def shorten(model: ModelProto, scalings: Mapping[str, Scaling], digits: int) -> dict[str, Scaling]:
    """Round float32 biases of convolutions and dense layers in place, and scales, to so many binary digits behind the
    point.

    Returns:
        The scales rounded.
    """
    constants = onnx_graph.initializers(model)
    for name in {node.input[2] for node in model.graph.node if node.op_type in _AXES and len(node.input) > 2}:
        if name in constants and constants[name].data_type == TensorProto.FLOAT:
            value = shortened(onnx_graph.array(constants[name]), digits)
            constants[name].CopyFrom(numpy_helper.from_array(value, name))
    return {name: replace(scaling, scale=shortened(scaling.scale, digits)) for name, scaling in scalings.items()}


class _Folder:
    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.constants = onnx_graph.initializers(model)
        self.producers = {name: node for node in model.graph.node for name in node.output if name}
        self.counts = onnx_graph.use_counts(model.graph)
        self.scalings: dict[str, Scaling] = {}
        self.folded: set[str] = set()

    def try_fold(self, norm: NodeProto) -> None:
        """Fold one BatchNormalization, or leave it."""
        hosts, affine = self._hosts(norm.input[0]), self._affine(norm)
        if hosts is None or affine is None or not self._single_output(norm):
            return
        scale, mean, beta = affine
        weights, biases = self._weights(hosts, scale.size), [self._bias(host, scale.size) for host in hosts]
        if weights is None or any(bias is None for bias in biases):
            return
        for number, (host, (weight, axis), bias) in enumerate(zip(hosts, weights, biases, strict=True)):
            assert bias is not None
            self._scale_weight(host, weight, axis, scale)
            # Of a sum, the first takes the shift, and the others have a bias only where they had one.
            folded = (bias - (mean if number == 0 else 0)) * scale.astype(np.float64) + (beta if number == 0 else 0)
            if number == 0 or np.any(bias):
                self._set_bias(host, folded.astype(np.float32))
        last = self.producers[norm.input[0]]
        del last.output[:]
        last.output.append(norm.output[0])
        self.producers[norm.output[0]] = last
        self.folded.add(norm.output[0])

    def _hosts(self, name: str) -> list[NodeProto] | None:
        """What a value that nobody else reads is computed by: one foldable operator, or the sum of several."""
        node = self.producers.get(name)
        if node is None or self.counts[name] != 1:
            return None
        if node.op_type != "Add" or node.domain not in ("", "ai.onnx"):
            return [node] if self._channel_axis(node) is not None else None
        addends = [self._hosts(operand) for operand in node.input]
        return None if None in addends else [host for hosts in addends if hosts is not None for host in hosts]

    def _weights(self, hosts: list[NodeProto], channels: int) -> list[tuple[NDArray[np.float32], int]] | None:
        """Of each, and its axis of output channels; None unless all are float32 and have so many of these."""
        axes = [(host, self._channel_axis(host)) for host in hosts]
        found = [(onnx_graph.array(self.constants[host.input[1]]), axis) for host, axis in axes if axis is not None]
        fits = all(weight.dtype == np.float32 and weight.shape[axis] == channels for weight, axis in found)
        return found if fits else None

    def finish(self) -> None:
        """Drop the folded nodes and what only they read; carry the Winograd thresholds over."""
        if not self.folded:
            return
        kept = [onnx_graph.copied(node) for node in self.model.graph.node if not self._is_folded(node)]
        del self.model.graph.node[:]
        self.model.graph.node.extend(kept)
        counts = onnx_graph.use_counts(self.model.graph)
        alive = [tensor for name, tensor in self.constants.items() if counts[name]]
        alive = [onnx_graph.copied(tensor) for tensor in alive]
        del self.model.graph.initializer[:]
        self.model.graph.initializer.extend(alive)
        self._carry_thresholds()

    def _is_folded(self, node: NodeProto) -> bool:
        return node.op_type == "BatchNormalization" and node.output[0] in self.folded

    def _affine(self, norm: NodeProto) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.float64]] | None:
        """Scale, mean and shift for each channel, or None if not all are known."""
        if len(norm.input) < 5 or any(name not in self.constants for name in norm.input[1:5]):
            return None
        gamma, beta, mean, variance = (
            onnx_graph.array(self.constants[name]).astype(np.float64).ravel() for name in norm.input[1:5]
        )
        if not gamma.size == beta.size == mean.size == variance.size:
            return None
        scale = gamma / np.sqrt(variance + np.float32(onnx_graph.attribute(norm, "epsilon", 1e-5)))
        return (scale.astype(np.float32), mean, beta) if np.all(np.isfinite(scale)) else None

    def _single_output(self, norm: NodeProto) -> bool:
        training = onnx_graph.attribute(norm, "training_mode", 0)
        return not training and all(self.counts[name] == 0 for name in norm.output[1:] if name)

    def _channel_axis(self, host: NodeProto) -> int | None:
        """The output channel axis of the host's weight, or None if BatchNormalization cannot be folded into it."""
        axis = _AXES.get(host.op_type, lambda _: None)(host) if host.domain in ("", "ai.onnx") else None
        # A weight that is scaled already has been through this: its normalisation is followed by another one.
        known = axis is not None and host.input[1] in self.constants and host.input[1] not in self.scalings
        return axis if known else None

    def _bias(self, host: NodeProto, channels: int) -> NDArray[np.float64] | None:
        """The host's bias as a vector, zeros if it has none, None if it is unknown or no vector."""
        if len(host.input) < 3 or not host.input[2]:
            return np.zeros(channels)
        if host.input[2] not in self.constants:
            return None
        bias = onnx_graph.array(self.constants[host.input[2]]).astype(np.float64)
        bias *= onnx_graph.attribute(host, "beta", 1.0) if host.op_type == "Gemm" else 1.0
        if bias.ndim > 1 and any(size != 1 for size in bias.shape[:-1]):
            return None
        return np.broadcast_to(bias.reshape(-1), (channels,)) if bias.size in (1, channels) else None

    def _scale_weight(
        self, host: NodeProto, weight: NDArray[np.float32], axis: int, scale: NDArray[np.float32]
    ) -> None:
        source = host.input[1]
        name = source
        if self.counts[source] > 1:
            name = onnx_graph.fresh_name(self.model, f"{source}.scaled")
            self.counts[source] -= 1
            self.counts[name] += 1
            host.input[1] = name
        scaling = Scaling(source, axis, scale)
        self.scalings[name] = scaling
        self._set(name, scaling.apply(weight))

    def _set_bias(self, host: NodeProto, bias: NDArray[np.float32]) -> None:
        named = host.input[2] if len(host.input) > 2 else ""
        own = named and self.counts[named] == 1
        name = named if own else onnx_graph.fresh_name(self.model, _bias_name(host.input[1]))
        if not own:
            self.counts[named] -= 1
            self.counts[name] += 1
        inputs = [host.input[0], host.input[1], name]
        del host.input[:]
        host.input.extend(inputs)
        if host.op_type == "Gemm":
            others = [onnx_graph.copied(a) for a in host.attribute if a.name != "beta"]
            del host.attribute[:]
            host.attribute.extend([*others, helper.make_attribute("beta", 1.0)])
        self._set(name, bias)

    def _set(self, name: str, value: NDArray[np.float32]) -> None:
        tensor = self.constants.get(name)
        if tensor is None:
            tensor = self.model.graph.initializer.add()
            self.constants[name] = tensor
        tensor.CopyFrom(numpy_helper.from_array(value, name))

    def _carry_thresholds(self) -> None:
        text = onnx_graph.metadata(self.model, winograd_spec.KEY)
        if text is None:
            return
        alive = onnx_graph.initializers(self.model)
        shapes = {name: tuple(tensor.dims) for name, tensor in alive.items()}
        sources = {scaling.source: shapes[name] for name, scaling in self.scalings.items()}
        before = winograd_spec.parse(text, shapes | sources, "the model's metadata")
        after = {name: layer for name, layer in before.items() if name in alive}
        for name, scaling in self.scalings.items():
            if scaling.source in before:
                after[name] = before[scaling.source].scaled(scaling.scale)
        onnx_graph.set_metadata(self.model, winograd_spec.KEY, winograd_spec.dump(after))


def _gemm_axis(node: NodeProto) -> int | None:
    return 0 if onnx_graph.attribute(node, "transB", 0) else 1


_AXES: dict[str, Callable[[NodeProto], int | None]] = {
    "Conv": lambda node: 0,
    # With groups the second axis counts the outputs of one group only: no single vector scales them all.
    "ConvTranspose": lambda node: 1 if onnx_graph.attribute(node, "group", 1) == 1 else None,
    "Gemm": _gemm_axis,
}


def _bias_name(weight: str) -> str:
    return f"{weight.removesuffix('.weight')}.bias"
