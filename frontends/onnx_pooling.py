"""Pooling as TVM 0.19's importer reads it well: with explicit padding, whatever the rounding and ``auto_pad``.

TVM keeps a last window that starts in the padding at the end, which torch and ONNX drop; ignores dilation in
``auto_pad``; counts elements beyond the padding in an average that includes it; and takes a power without the modulus.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import NodeProto, helper

from . import onnx_graph
from .onnx_operators import Chain, Site, set_attributes


@dataclass(frozen=True)
class _Axis:
    """The windows along one axis; ``extra`` is how far the last one reaches beyond the padding at the end."""

    size: int
    kernel: int
    stride: int
    dilation: int
    before: int
    after: int
    count: int

    @property
    def extra(self) -> int:
        reach = (self.count - 1) * self.stride + self.dilation * (self.kernel - 1) + 1
        return max(reach - self.size - self.before - self.after, -self.after)

    def counted(self) -> np.ndarray:
        """Of each window, the elements inside data and padding."""
        starts = np.arange(self.count)[:, None] * self.stride
        taken = starts + np.arange(self.kernel) * self.dilation
        return np.asarray((taken < self.size + self.before + self.after).sum(1))


def max_pool(node: NodeProto, site: Site) -> list[NodeProto]:
    """``storage_order`` is about the indices only, which TVM does not make."""
    _write_pads(node, _axes(node, site))
    set_attributes(node, storage_order=None)
    return [node]


def average_pool(node: NodeProto, site: Site) -> list[NodeProto]:
    """An average over the padding as well divides by what lies inside it, TVM by the whole window."""
    axes = _axes(node, site)
    _write_pads(node, axes)
    if not onnx_graph.attribute(node, "count_include_pad", 0) or all(axis.extra <= 0 for axis in axes):
        return [node]
    factor = np.ones(1)
    for axis in axes:
        factor = factor[..., None] * (axis.kernel / axis.counted())
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    chain = Chain(node, site).then("AveragePool", **attributes)
    return chain.then("Mul", factor[None].astype(site.dtype(node))).end()


def lp_pool(node: NodeProto, site: Site) -> list[NodeProto]:
    """(sum |x|^p)^(1/p) over each window, the sum as an average times the size of the window."""
    axes, dtype = _axes(node, site), site.dtype(node)
    _write_pads(node, axes)
    power = float(onnx_graph.attribute(node, "p", 2))
    windows = {
        a.name: helper.get_attribute_value(a)
        for a in node.attribute
        if a.name in ("kernel_shape", "pads", "strides", "dilations")
    }
    chain = Chain(node, site).then("Abs").then("Pow", np.array(power, dtype))
    chain.then("AveragePool", count_include_pad=1, **windows)
    chain.then("Mul", np.array(np.prod([axis.kernel for axis in axes]), dtype))
    return chain.then("Pow", np.array(1 / power, dtype)).end()


def global_lp_pool(node: NodeProto, site: Site) -> list[NodeProto]:
    """One window over all."""
    set_attributes(node, kernel_shape=site.shape(node)[2:])
    return lp_pool(node, site)


def _axes(node: NodeProto, site: Site) -> list[_Axis]:
    shape = site.shape(node)[2:]
    rank = len(shape)
    kernels = onnx_graph.attribute(node, "kernel_shape", [])
    strides = onnx_graph.attribute(node, "strides", [1] * rank)
    dilations = onnx_graph.attribute(node, "dilations", [1] * rank)
    pads = onnx_graph.attribute(node, "pads", [0] * 2 * rank)
    mode = onnx_graph.attribute(node, "auto_pad", b"NOTSET")
    if not len(kernels) == len(strides) == len(dilations) == len(pads) // 2 == rank:
        raise site.error(node, f"has attributes that do not fit an input of {rank} spatial axes; export it again")
    ceil = bool(onnx_graph.attribute(node, "ceil_mode", 0))
    found = []
    for i, (size, kernel, stride, dilation) in enumerate(zip(shape, kernels, strides, dilations, strict=True)):
        reach = dilation * (kernel - 1) + 1
        before, after = _auto_pads(mode, size, reach, stride) or (pads[i], pads[rank + i])
        count = _count(size, reach, stride, before, after, ceil and mode == b"NOTSET")
        found.append(_Axis(size, kernel, stride, dilation, before, after, count))
    return found


def _auto_pads(mode: bytes, size: int, reach: int, stride: int) -> tuple[int, int] | None:
    """The padding of ``auto_pad``; None if it is given by numbers."""
    if mode == b"NOTSET":
        return None
    total = 0 if mode == b"VALID" else max((-(-size // stride) - 1) * stride + reach - size, 0)
    return (total // 2, total - total // 2) if mode == b"SAME_UPPER" else (total - total // 2, total // 2)


def _count(size: int, reach: int, stride: int, before: int, after: int, ceil: bool) -> int:
    free = size + before + after - reach
    count = (-(-free // stride) if ceil else free // stride) + 1
    # A window that would start in the padding at the end is dropped.
    return count - 1 if ceil and (count - 1) * stride >= size + before else count


def _write_pads(node: NodeProto, axes: list[_Axis]) -> None:
    pads = [axis.before for axis in axes] + [axis.after + axis.extra for axis in axes]
    set_attributes(node, auto_pad=None, ceil_mode=None, pads=pads)
