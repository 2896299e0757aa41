"""The Relay operators, registered from Python; importing this module registers them and readies LLVM.

``jointsparse.conv2d_sparse_direct`` and ``jointsparse.conv2d_sparse_winograd`` take data and three constants (values,
indices, indptr: SparseRows of formats.py) and are otherwise like ``nn.conv2d`` in NCHW, float32: what may follow a
convolution is fused into them. Their attributes hold the whole geometry, so the type of the result follows from them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

# Without it relay.build tries to download TVM's records of tuned schedules.
os.environ.setdefault("TOPHUB_LOCATION", "NONE")

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relay, te
from tvm.relay.op import op as relay_op

from . import cpu, llvm_workaround
from .blocking import WinogradBlocking, direct_blocking, direct_panel, winograd_blocking
from .buffers import argument_buffers, direct_buffers, why_too_large, winograd_buffers
from .formats import SparseRows, pack_direct, pack_winograd
from .geometry import ConvGeometry
from .layouts import PhaseLayout, direct_layout
from .sparse_direct import sparse_direct
from .sparse_winograd import sparse_winograd
from .targets import cpu_facts, why_not_target
from .winograd import KERNELS, TILES

__all__ = [
    "DIRECT",
    "WINOGRAD",
    "conv2d_sparse_direct",
    "conv2d_sparse_winograd",
    "why_not_direct",
    "why_not_winograd",
]

DIRECT = "jointsparse.conv2d_sparse_direct"
WINOGRAD = "jointsparse.conv2d_sparse_winograd"

_MIXED_PRECISION_NEVER = 2


def conv2d_sparse_direct(
    data: relay.Expr,
    weight: NDArray[np.floating],
    geometry: ConvGeometry,
    target: tvm.target.Target | str | None = None,
) -> relay.Expr:
    """A sparse direct convolution.

    Args:
        data: (N, C, H, W), float32.
        weight: (K, C / groups, kh, kw); its zeros cost nothing.
        target: whose caches decide the layout of the packed input (the current target, or plain llvm, when None). The
            operator is right for every CPU.

    Raises:
        ValueError: when the geometry is not supported (see why_not_direct) or does not fit the weight.
    """
    _refuse(why_not_direct(geometry, target))
    layout = direct_blocking(geometry, cpu_facts(target))
    rows = pack_direct(weight, geometry, layout)
    return _call(DIRECT, data, rows, geometry, block=(layout.rows, layout.cols))


def conv2d_sparse_winograd(
    data: relay.Expr, winograd_weight: NDArray[np.floating], geometry: ConvGeometry, m: int
) -> relay.Expr:
    """A sparse Winograd convolution F(m x m, r x r).

    Args:
        data: (N, C, H, W), float32.
        winograd_weight: (K, C / groups, n, n), n = m + r - 1: filters in the Winograd domain of winograd.py; zeros
            cost nothing.

    Raises:
        ValueError: when the geometry is not supported (see why_not_winograd) or does not fit the weight.
    """
    _refuse(why_not_winograd(geometry, m))
    n = m + geometry.kernel[0] - 1
    if tuple(winograd_weight.shape[2:]) != (n, n):
        raise ValueError(
            f"F({m}x{m}) of a {geometry.kernel[0]}x{geometry.kernel[1]} filter is {n} x {n}, got "
            f"{tuple(winograd_weight.shape)}"
        )
    return _call(WINOGRAD, data, pack_winograd(winograd_weight, geometry), geometry, tile=m)


def why_not_direct(geometry: ConvGeometry, target: tvm.target.Target | str | None = None) -> str | None:
    """Why sparse direct convolution cannot do this geometry, or None if it can.

    Args:
        target: decides the size of buffers (the current target, or plain llvm, when None).
    """
    kh, kw = geometry.kernel
    facts = cpu_facts(target)
    layout = direct_blocking(geometry, facts)
    return why_too_large(
        argument_buffers(geometry, kh * kw) | direct_buffers(geometry, layout, direct_panel(layout, facts))
    )


def why_not_winograd(geometry: ConvGeometry, m: int, target: tvm.target.Target | str | None = None) -> str | None:
    """Why sparse Winograd convolution F(m x m) cannot do this geometry, or None if it can.

    Args:
        target: as for why_not_direct.
    """
    kh, kw = geometry.kernel
    if m not in TILES:
        return f"F({m}x{m}) is not offered, only tiles {', '.join(map(str, TILES))}"
    if kh != kw or kh not in KERNELS:
        return f"filter {kh}x{kw} is outside Winograd's reach ({' or '.join(f'{r}x{r}' for r in KERNELS)})"
    if geometry.strides != (1, 1):
        return f"stride {geometry.strides[0]}x{geometry.strides[1]} is outside Winograd's reach"
    if geometry.dilation != (1, 1):
        return f"dilation {geometry.dilation[0]}x{geometry.dilation[1]} is outside Winograd's reach"
    return why_too_large(argument_buffers(geometry, (m + kh - 1) ** 2)) or why_too_large(
        winograd_buffers(geometry, m, winograd_blocking(geometry, m, cpu_facts(target)))
    )


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise ValueError(reason)


def _call(name: str, data: relay.Expr, rows: SparseRows, geometry: ConvGeometry, **kernel: Any) -> relay.Expr:
    constants = [relay.const(a) for a in (rows.values, rows.indices, rows.indptr)]
    attrs = tvm.ir.make_node("DictAttrs", **asdict(geometry), **kernel)
    return relay.Call(relay_op.get(name), [data, *constants], attrs)


def _geometry(attrs: tvm.ir.Attrs) -> ConvGeometry:
    return ConvGeometry(**{field.name: _plain(attrs[field.name]) for field in fields(ConvGeometry)})


def _plain(value: Any) -> Any:
    """int, or tuple of int, of an attribute."""
    return tuple(int(v) for v in value) if isinstance(value, Sequence | tvm.ir.Array) else int(value)


def _result_type(types: Sequence[tvm.ir.Type], attrs: tvm.ir.Attrs) -> tvm.ir.Type:
    geometry = _geometry(attrs)
    data = types[0]
    if isinstance(data, relay.TensorType):
        expected = (geometry.batch, geometry.in_channels, geometry.in_height, geometry.in_width)
        dynamic = not all(isinstance(s, tvm.tir.IntImm) for s in data.shape)
        if dynamic or data.dtype != "float32" or tuple(int(s) for s in data.shape) != expected:
            raise TypeError(f"a sparse convolution made for float32 data of shape {expected} got {data}")
    return relay.TensorType(geometry.out_shape, "float32")


def _direct_layout(attrs: tvm.ir.Attrs) -> PhaseLayout:
    rows, cols = _plain(attrs["block"])
    return direct_layout(_geometry(attrs), rows, cols)


def _winograd_blocking(attrs: tvm.ir.Attrs, target: tvm.target.Target) -> WinogradBlocking:
    return winograd_blocking(_geometry(attrs), int(attrs["tile"]), cpu_facts(target))


def _compute_direct(attrs: tvm.ir.Attrs, inputs: Sequence[te.Tensor], target: tvm.target.Target) -> te.Tensor:
    data, values, indices, indptr = inputs
    geometry, layout = _geometry(attrs), _direct_layout(attrs)
    panel = direct_panel(layout, cpu_facts(target))
    _refuse(why_too_large(direct_buffers(geometry, layout, panel)))
    return sparse_direct(data, values, indices, indptr, geometry, layout, panel)


def _schedule_direct(attrs: tvm.ir.Attrs, outs: Sequence[te.Tensor], target: tvm.target.Target) -> te.Schedule:
    return cpu.schedule_direct(outs, _direct_layout(attrs), target)


def _compute_winograd(attrs: tvm.ir.Attrs, inputs: Sequence[te.Tensor], target: tvm.target.Target) -> te.Tensor:
    data, values, indices, indptr = inputs
    geometry, m, blocking = _geometry(attrs), int(attrs["tile"]), _winograd_blocking(attrs, target)
    _refuse(why_too_large(winograd_buffers(geometry, m, blocking)))
    return sparse_winograd(data, values, indices, indptr, geometry, m, blocking)


def _schedule_winograd(attrs: tvm.ir.Attrs, outs: Sequence[te.Tensor], target: tvm.target.Target) -> te.Schedule:
    return cpu.schedule_winograd(outs, _winograd_blocking(attrs, target).layout, int(attrs["tile"]), target)


def _register(name: str, description: str, compute: Any, schedule: Any) -> None:
    relay_op.register(name, description)
    operator = relay_op.get(name)
    operator.set_num_inputs(4)
    for argument, meaning in (
        ("data", "input, NCHW"),
        ("values", "non-zeros, row after row"),
        ("indices", "where the operand of each non-zero lies"),
        ("indptr", "start of each row"),
    ):
        operator.add_argument(argument, "Tensor", meaning)
    operator.set_attrs_type_key("DictAttrs")
    operator.add_type_rel(name, _result_type)
    operator.set_support_level(10)
    relay_op.register_pattern(name, relay_op.OpPattern.OUT_ELEMWISE_FUSABLE)
    relay_op.register_stateful(name, False)
    relay_op.register_mixed_precision_conversion(
        name, lambda call, dtype: [_MIXED_PRECISION_NEVER, "float32", "float32"]
    )

    @tvm.target.override_native_generic_func(f"{name}.strategy")
    def strategy(attrs: Any, inputs: Any, out_type: Any, target: tvm.target.Target) -> Any:
        _refuse(why_not_target(target))
        implementation = relay_op.OpStrategy()
        implementation.add_implementation(
            lambda attrs, inputs, out_type: [compute(attrs, inputs, target)],
            schedule,
            name=f"{name}.cpu",
        )
        return implementation

    relay_op.register_strategy(name, strategy)


_register(DIRECT, "Sparse direct convolution.", _compute_direct, _schedule_direct)
_register(WINOGRAD, "Sparse Winograd convolution.", _compute_winograd, _schedule_winograd)
llvm_workaround.apply()
