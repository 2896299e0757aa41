"""Pooling between sparse convolutions, by an operator that does less."""

from __future__ import annotations

import tvm
from tvm import relay
from tvm.relay.dataflow_pattern import DFPatternCallback, is_op, rewrite, wildcard

from ..schedules.constructors import max_pool2d
from ..schedules.max_pool import PoolGeometry
from ..schedules.targets import why_not_target
from .convolutions import MAIN


@tvm.transform.module_pass(opt_level=0, name="RewritePooling")
class RewritePooling:
    """Put ``jointsparse.max_pool2d`` for ``nn.max_pool2d`` of float32 images NCHW; others are handed back unchanged.

    Args:
        target: what the module will be built for.
    """

    def __init__(self, target: tvm.target.Target) -> None:
        self.target = target

    def transform_module(self, mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        if why_not_target(self.target) is not None:
            return mod
        mod = relay.transform.InferType()(mod)
        mod[MAIN] = rewrite(_Rewriter(), mod[MAIN])
        return relay.transform.InferType()(mod)


class _Rewriter(DFPatternCallback):
    def __init__(self) -> None:
        super().__init__(rewrite_once=True)
        self.pattern = is_op("nn.max_pool2d")(wildcard())

    def callback(self, pre: relay.Call, post: relay.Call, _: tvm.ir.container.Map) -> relay.Expr:
        attrs = pre.attrs
        pool, strides, dilation = _pair(attrs.pool_size), _pair(attrs.strides), _pair(attrs.dilation)
        if attrs.layout != "NCHW" or attrs.out_layout not in ("", "NCHW") or dilation != (1, 1):
            return post
        shape, out = (_float32_shape(expression) for expression in (pre.args[0], pre))
        if shape is None or out is None:
            return post
        above, left, *_ = relay.op.nn.utils.get_pad_tuple2d([int(p) for p in attrs.padding])
        return max_pool2d(post.args[0], shape, PoolGeometry(pool, strides, (above, left), (out[2], out[3])))


def _float32_shape(expression: relay.Expr) -> tuple[int, ...] | None:
    kind = expression.checked_type
    if kind.dtype != "float32" or not all(isinstance(size, tvm.tir.IntImm) for size in kind.shape):
        return None
    return tuple(int(size) for size in kind.shape)


def _pair(sizes: tvm.ir.Array) -> tuple[int, int]:
    height, width = sizes
    return int(height), int(width)
