"""How an operator of this project comes into Relay, from Python."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import lru_cache
from typing import Any, TypeVar

# Without it relay.build tries to download TVM's records of tuned schedules.
os.environ.setdefault("TOPHUB_LOCATION", "NONE")

import tvm
from tvm import relay, te
from tvm.relay.op import op as relay_op

from .targets import why_not_target

T = TypeVar("T")

_MIXED_PRECISION_NEVER = 2

Compute = Callable[[tvm.ir.Attrs, Mapping[str, te.Tensor], tvm.target.Target], te.Tensor]
Schedule = Callable[[tvm.ir.Attrs, Sequence[te.Tensor], tvm.target.Target], te.Schedule]
DataShape = Callable[[tvm.ir.Attrs, Sequence[int | None]], Sequence[int | None]]
ResultShape = Callable[[tvm.ir.Attrs, Sequence[int]], Sequence[int]]
OtherShape = Callable[[Sequence[int]], Sequence[int]]
_Sizes = tuple[int | None, ...]
_Shapes = tuple[_Sizes, tuple[int, ...]]


def register(
    name: str,
    description: str,
    arguments: Mapping[str, str],
    data_shape: DataShape,
    result_shape: ResultShape,
    compute: Compute,
    schedule: Schedule,
    *,
    other_shapes: Mapping[str, OtherShape] | None = None,
    fusable: bool = False,
) -> None:
    """Register an operator of float32 data.

    Args:
        arguments: meaning by name; the first is the data.
        data_shape: of the data that a call is made for, from its attributes and the shape that it is given (None for
            what is not fixed).
        result_shape: from attributes and shape of the data.
        compute: from attributes and arguments by name.
        other_shapes: of further arguments that are float32, by name, from the shape of the result.
        fusable: whether what follows it elementwise becomes part of its schedule.
    """
    relay_op.register(name, description)
    operator = relay_op.get(name)
    operator.set_num_inputs(len(arguments))
    for argument, meaning in arguments.items():
        operator.add_argument(argument, "Tensor", meaning)
    operator.set_attrs_type_key("DictAttrs")
    # Passes ask for the type of a call again and again, more often the larger the network: most of its build otherwise.
    shapes = lru_cache(maxsize=4096)(lambda attrs, sizes: _shapes(data_shape, result_shape, attrs, sizes))
    names = list(arguments)
    others = {names.index(argument): (argument, shape) for argument, shape in (other_shapes or {}).items()}
    operator.add_type_rel(name, lambda types, attrs: _result_type(name, shapes, others, types, attrs))
    operator.set_support_level(10)
    pattern = relay_op.OpPattern.OUT_ELEMWISE_FUSABLE if fusable else relay_op.OpPattern.OPAQUE
    relay_op.register_pattern(name, pattern)
    relay_op.register_stateful(name, False)
    relay_op.register_mixed_precision_conversion(
        name, lambda call, dtype: [_MIXED_PRECISION_NEVER, "float32", "float32"]
    )

    @tvm.target.override_native_generic_func(f"{name}.strategy")
    def strategy(attrs: Any, inputs: Any, out_type: Any, target: tvm.target.Target) -> Any:
        reason = why_not_target(target)
        if reason is not None:
            raise ValueError(reason)
        implementation = relay_op.OpStrategy()
        implementation.add_implementation(
            lambda attrs, inputs, out_type: [compute(attrs, dict(zip(names, inputs, strict=True)), target)],
            schedule,
            name=f"{name}.cpu",
        )
        return implementation

    relay_op.register_strategy(name, strategy)


def call(name: str, arguments: Sequence[relay.Expr], **attributes: Any) -> relay.Expr:
    """A call of a registered operator."""
    return relay.Call(relay_op.get(name), list(arguments), tvm.ir.make_node("DictAttrs", **attributes))


def attributes_of(call: relay.Call) -> dict[str, Any]:
    """By name, to make a call like this one."""
    return {name: call.attrs[name] for name in call.attrs.keys()}  # noqa: SIM118


def unpack(kind: type[T], attrs: tvm.ir.Attrs) -> T:
    """The dataclass whose fields are among the attributes, by name."""
    return kind(**{field.name: plain(attrs[field.name]) for field in fields(kind)})  # type: ignore[arg-type]


def plain(value: Any) -> Any:
    """What an attribute was made of: a number, a string, or a tuple of numbers."""
    if isinstance(value, list | tuple | tvm.ir.Array):
        return tuple(plain(v) for v in value)
    if isinstance(value, tvm.tir.IntImm):
        return bool(value.value) if value.dtype == "bool" else int(value.value)
    if isinstance(value, tvm.tir.FloatImm):
        return float(value.value)
    return value if isinstance(value, int | float) else str(value)


def _shapes(data_shape: DataShape, result_shape: ResultShape, attrs: tvm.ir.Attrs, sizes: _Sizes) -> _Shapes:
    """(Of the data that a call is made for, of the result)."""
    expected = tuple(data_shape(attrs, sizes))
    return expected, tuple(result_shape(attrs, [size for size in expected if size is not None]))


def _result_type(
    name: str,
    shapes: Callable[[tvm.ir.Attrs, _Sizes], _Shapes],
    others: Mapping[int, tuple[str, OtherShape]],
    types: Sequence[tvm.ir.Type],
    attrs: tvm.ir.Attrs,
) -> tvm.ir.Type | None:
    if not all(isinstance(types[place], relay.TensorType) for place in (0, *others)):
        return None
    expected, result = shapes(attrs, _sizes(types[0]))
    _check(name, "data", types[0], expected)
    for place, (argument, shape) in others.items():
        _check(name, argument, types[place], tuple(shape(result)))
    return relay.TensorType(list(result), "float32")


def _check(name: str, argument: str, given: relay.TensorType, expected: _Sizes) -> None:
    if given.dtype != "float32" or _sizes(given) != expected or None in expected:
        shape = "fixed shape" if None in expected else f"shape {expected}"
        raise TypeError(f"{name} is made for float32 {argument} of {shape}, got {given}")


def _sizes(given: relay.TensorType) -> _Sizes:
    return tuple(int(size) if isinstance(size, tvm.tir.IntImm) else None for size in given.shape)
