"""Put the chosen sparse operators in the place of convolutions."""

from __future__ import annotations

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relay
from tvm.relay.dataflow_pattern import DFPatternCallback, is_op, rewrite, wildcard

from ..schedules.constructors import conv2d_sparse_direct, conv2d_sparse_winograd, dense_sparse
from .convolutions import MAIN, find_convolutions
from .layers import Layer, Worklist
from .plan import DENSE, DIRECT, TILE


@tvm.transform.module_pass(opt_level=0, name="RewriteConvolutions")
class RewriteConvolutions:
    """Rewrite the layers of ``@main`` that have a sparse kernel; everything else is handed back unchanged.

    Args:
        worklist: as ChooseKernels left it, of this very module.
        target: what the module will be built for.

    Raises:
        ValueError: when the module's convolutions are not the very ones of the worklist.
    """

    def __init__(self, worklist: Worklist, target: tvm.target.Target) -> None:
        self.worklist = worklist
        self.target = target

    def transform_module(self, mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        found, layers = find_convolutions(mod), self.worklist.layers
        if len(found) != len(layers) or not all(
            convolution.call.same_as(layer.call) for convolution, layer in zip(found, layers, strict=True)
        ):
            raise ValueError("RewriteConvolutions: the worklist is of another module; run CollectConvolutions first")
        chosen = {
            convolution.call: layer
            for convolution, layer in zip(found, layers, strict=True)
            if layer.kernel != DENSE and layer.left_alone is None
        }
        if not chosen:
            return mod
        mod = mod.clone()
        mod[MAIN] = rewrite(_Rewriter(chosen, self.target), mod[MAIN])
        return relay.transform.InferType()(mod)


class _Rewriter(DFPatternCallback):
    """TVM's own rewriter walks the graph: it does not recurse, so that depth is no limit."""

    def __init__(self, chosen: dict[relay.Call, Layer], target: tvm.target.Target) -> None:
        super().__init__(rewrite_once=True)
        self.pattern = (is_op("nn.conv2d") | is_op("nn.dense"))(wildcard(), wildcard())
        self.chosen = chosen
        self.target = target

    def callback(self, pre: relay.Call, post: relay.Call, _: tvm.ir.container.Map) -> relay.Expr:
        layer = self.chosen.get(pre)
        if layer is None:
            return post
        return _sparse_call(layer, post.args[0], self.target)


def _sparse_call(layer: Layer, data: relay.Expr, target: tvm.target.Target) -> relay.Expr:
    assert layer.geometry is not None
    weight = layer.sparse_weight(layer.kernel)
    if layer.geometry.fully_connected:
        return _fully_connected(layer, weight, data, target)
    if layer.kernel == DIRECT:
        return conv2d_sparse_direct(data, weight, layer.geometry, target)
    return conv2d_sparse_winograd(data, weight, layer.geometry, TILE[layer.kernel], target)


def _fully_connected(
    layer: Layer, weight: NDArray[np.float32], data: relay.Expr, target: tvm.target.Target
) -> relay.Expr:
    """The operator takes and gives matrices; whatever else the data is, images of one pixel for example, is reshaped
    on both sides."""
    assert layer.geometry is not None
    assert layer.input_shape is not None
    matrix, batch = weight[:, :, 0, 0], layer.geometry.batch
    if len(layer.input_shape) == 2:
        return dense_sparse(data, matrix, batch, target)
    rows = relay.reshape(data, (batch, layer.geometry.in_channels))
    return relay.reshape(dense_sparse(rows, matrix, batch, target), layer.output_shape)
