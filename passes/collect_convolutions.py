"""List the convolutions of a module, and say of each whether a sparse kernel could run it at all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relay

from ..schedules.constructors import why_not_dense_sparse, why_not_direct, why_not_winograd
from ..schedules.geometry import ConvGeometry
from ..schedules.operators import DENSE_SPARSE
from ..schedules.operators import DIRECT as DIRECT_OPERATOR
from ..schedules.operators import WINOGRAD as WINOGRAD_OPERATOR
from ..schedules.targets import why_not_target
from .convolutions import Convolution, find_convolutions, untransposed, weight_parameter
from .layers import Layer, Weight, Worklist
from .plan import DENSE, DIRECT, WINOGRAD

_FULLY_CONNECTED = "nn.dense"
_DYNAMIC = "dynamic shape: the sparse kernels are made for one size"


@tvm.transform.module_pass(opt_level=0, name="CollectConvolutions")
class CollectConvolutions:
    """Fill a worklist with a layer for every convolution; the module is handed back unchanged, but for its types.

    Args:
        worklist: emptied first.
        params: weights of parameters that are still named; bound ones need none.
        target: what the module will be built for.
    """

    def __init__(self, worklist: Worklist, params: Mapping[str, Any], target: tvm.target.Target) -> None:
        self.worklist = worklist
        self.params = params
        self.target = target

    def transform_module(self, mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        mod = relay.transform.InferType()(mod)
        collector = _Collector(self.params, self.target)
        self.worklist.layers = [
            collector.layer(position, found) for position, found in enumerate(find_convolutions(mod))
        ]
        self.worklist.warnings = []
        return mod


class _Collector:
    def __init__(self, params: Mapping[str, Any], target: tvm.target.Target) -> None:
        self.params = params
        self.target = target
        self.names: set[str] = set()

    def layer(self, position: int, found: Convolution) -> Layer:
        call = found.call
        weight, no_weight = _weight(call, found.op, self.params)
        layer = Layer(
            name=self._unique(_name(call, weight) or f"{found.op.split('.')[-1]}_{position}"),
            op=found.op,
            call=call,
            input_shape=_shape(call.args[0]),
            weight_shape=_weight_shape(found),
            output_shape=_shape(call),
            weight=weight,
            spatial_sparsity=None if weight is None else float(np.mean(weight.value == 0)),
            kernel=_sparse_already(found),
        )
        layer.left_alone = (
            found.elsewhere
            or _why_not_operator(found)
            or _why_not_type(call)
            or why_not_target(self.target)
            or no_weight
        )
        if layer.left_alone is None:
            self._describe(layer, call)
        return layer

    def _describe(self, layer: Layer, call: relay.Call) -> None:
        """The geometry, and which kernels take it."""
        try:
            geometry = _dense_geometry(call) if layer.op == _FULLY_CONNECTED else _geometry(call)
        except ValueError as error:
            layer.left_alone = str(error)
            return
        assert layer.weight is not None
        layer.geometry, layer.weight = geometry, layer.weight.as_filters(geometry.weight_shape)
        reasons = why_not_kernels(geometry, layer.op, self.target)
        layer.unsupported = {kernel: reason for kernel, reason in reasons.items() if reason is not None}
        if reasons.keys() == layer.unsupported.keys():
            layer.left_alone = layer.unsupported[DIRECT]

    def _unique(self, name: str) -> str:
        """Two convolutions may share a weight."""
        candidates = (name if count == 1 else f"{name}#{count}" for count in range(1, len(self.names) + 2))
        free = next(candidate for candidate in candidates if candidate not in self.names)
        self.names.add(free)
        return free


def why_not_kernels(geometry: ConvGeometry, op: str, target: tvm.target.Target) -> dict[str, str | None]:
    """By sparse kernel; None for one that is supported."""
    if not geometry.fully_connected:
        direct = why_not_direct(geometry, target)
    else:
        direct = why_not_dense_sparse(geometry.batch, geometry.in_channels, geometry.out_channels, target)
    reasons = {DIRECT: direct}
    for tile, kernel in WINOGRAD.items():
        fully_connected = op == _FULLY_CONNECTED
        reasons[kernel] = (
            "a fully-connected layer is outside Winograd's reach"
            if fully_connected
            else why_not_winograd(geometry, tile, target)
        )
    return reasons


def _name(call: relay.Call, weight: Weight | None) -> str | None:
    """The weight's name says most; a bound weight has none, then the importer's name of the node."""
    parameter = weight.parameter if weight is not None else None
    if parameter is None:
        parameter = weight_parameter(call)
    if parameter is not None:
        return parameter.removesuffix(".weight").removesuffix("_weight")
    return call.span.source_name.name if isinstance(call.span, tvm.ir.Span) and call.span.source_name.name else None


def _sparse_already(found: Convolution) -> str:
    """The kernel of a sparse operator; dense for any other."""
    if found.op == WINOGRAD_OPERATOR:
        return WINOGRAD[int(found.call.attrs["tile"])]
    return DIRECT if found.op in (DIRECT_OPERATOR, DENSE_SPARSE) else DENSE


def _why_not_operator(found: Convolution) -> str | None:
    if _sparse_already(found) != DENSE:
        return "sparse already"
    if found.op == _FULLY_CONNECTED:
        return None
    if found.op != "nn.conv2d":
        return f"{found.op}: there are sparse kernels for nn.conv2d and nn.dense only"
    attrs = found.call.attrs
    if attrs.data_layout != "NCHW" or attrs.out_layout not in ("", "NCHW"):
        layout = attrs.data_layout if attrs.data_layout != "NCHW" else attrs.out_layout
        return f"layout {layout}: relay.transform.ConvertLayout({{'nn.conv2d': ['NCHW', 'OIHW']}}) makes it NCHW"
    if sorted(attrs.kernel_layout) != sorted("OIHW"):
        return f"kernel layout {attrs.kernel_layout}: the sparse kernels read OIHW"
    return None


def _why_not_type(call: relay.Call) -> str | None:
    types = [call.args[0].checked_type, call.args[1].checked_type, call.checked_type]
    for kind in types:
        if kind.dtype != "float32":
            return f"data type {kind.dtype}: the sparse kernels compute in float32"
    return None


def _shape(expression: relay.Expr) -> tuple[int, ...] | None:
    kind = expression.checked_type
    if not isinstance(kind, relay.TensorType) or not all(isinstance(size, tvm.tir.IntImm) for size in kind.shape):
        return None
    return tuple(int(size) for size in kind.shape)


def _weight_shape(found: Convolution) -> tuple[int, ...] | None:
    if _sparse_already(found) != DENSE or len(found.call.args) < 2:
        return None
    return _shape(found.call.args[1])


def _geometry(call: relay.Call) -> ConvGeometry:
    """Raises ValueError for a shape that is not static or not a convolution."""
    shape, weight, output = _shape(call.args[0]), _shape(call.args[1]), _shape(call)
    if shape is None or weight is None or output is None:
        raise ValueError(_DYNAMIC)
    batch, in_channels, in_height, in_width = shape
    _, _, kernel_height, kernel_width = (weight[axis] for axis in _oihw(call.attrs.kernel_layout))
    top, left, bottom, right = relay.op.nn.utils.get_pad_tuple2d([int(p) for p in call.attrs.padding])
    return ConvGeometry(
        batch=batch,
        in_channels=in_channels,
        in_height=in_height,
        in_width=in_width,
        out_channels=output[1],
        kernel=(kernel_height, kernel_width),
        strides=_two(call.attrs.strides),
        padding=(top, left, bottom, right),
        dilation=_two(call.attrs.dilation),
        groups=int(call.attrs.groups),
    )


def _dense_geometry(call: relay.Call) -> ConvGeometry:
    """Raises ValueError for a shape that is not static. All axes of the data but the last are the batch."""
    shape, weight = _shape(call.args[0]), _shape(call.args[1])
    if shape is None or weight is None:
        raise ValueError(_DYNAMIC)
    return ConvGeometry(math.prod(shape[:-1]), shape[-1], 1, 1, weight[0], (1, 1))


def _two(numbers: Any) -> tuple[int, int]:
    first, last = int(numbers[0]), int(numbers[-1])
    return first, last


def _oihw(layout: str) -> tuple[int, int, int, int]:
    """Where O, I, H and W are in a kernel layout."""
    o, i, h, w = (layout.index(letter) for letter in "OIHW")
    return o, i, h, w


def _weight(call: relay.Call, op: str, params: Mapping[str, Any]) -> tuple[Weight | None, str | None]:
    """The filters of an nn.conv2d or nn.dense, or why there are none.

    In canonical form they are a constant or a named parameter, times the constants that BatchNorm left.
    """
    axes = _filter_axes(call, op)
    if axes is None:
        return None, None
    expression, shape = call.args[1], _shape(call.args[1])
    scale = np.ones((1,) * len(axes))
    if shape is None:
        return None, _DYNAMIC
    while (factors := _constant_times(expression)) is not None:
        constant, expression = factors
        scale = scale * constant
    plain, transposed = untransposed(expression) if op == _FULLY_CONNECTED else (expression, False)
    name = plain.name_hint if isinstance(plain, relay.Var) else None
    if isinstance(plain, relay.Constant):
        stored = plain.data.numpy()
    elif name is None:
        return None, "no weights at hand: they are computed at run time"
    elif name not in params:
        return None, f"no weights at hand: {name} is an input of the module; pass it in params"
    else:
        stored = _array(params[name])
        if _shape(plain) not in (None, stored.shape):
            raise ValueError(f"params[{name!r}] has shape {stored.shape}, the module wants {_shape(plain)}")
    stored = np.broadcast_to(stored.T if transposed else stored, shape)
    return Weight(_four(_ordered(stored, axes)), _four(_ordered(scale, axes)), name), None


def _filter_axes(call: relay.Call, op: str) -> tuple[int, ...] | None:
    """Where output and input channels, and height and width of a filter, are in a weight that can be read."""
    if op == _FULLY_CONNECTED:
        return 0, 1
    if op != "nn.conv2d" or sorted(call.attrs.kernel_layout) != sorted("OIHW"):
        return None
    return _oihw(call.attrs.kernel_layout)


def _four(array: NDArray[Any]) -> NDArray[Any]:
    """With axes of length 1 for the filters of a fully-connected layer."""
    return array.reshape(*array.shape, *(1,) * (4 - array.ndim))


def _array(value: Any) -> NDArray[Any]:
    return np.asarray(value.numpy() if hasattr(value, "numpy") else value)


def _ordered(array: NDArray[Any], axes: tuple[int, ...]) -> NDArray[Any]:
    return np.ascontiguousarray(np.transpose(array, axes))


def _constant_times(expression: relay.Expr) -> tuple[NDArray[Any], relay.Expr] | None:
    """``(constant, rest)`` of a product with a constant; of two constants the smaller, which is the scale."""
    if not isinstance(expression, relay.Call) or expression.op != relay.op.get("multiply"):
        return None
    left, right = expression.args
    sizes = [arg.data.numpy().size if isinstance(arg, relay.Constant) else np.inf for arg in (left, right)]
    if min(sizes) == np.inf:
        return None
    scale, rest = (left, right) if sizes[0] < sizes[1] else (right, left)
    return scale.data.numpy(), rest
