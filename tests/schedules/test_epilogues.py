"""Activations that a kernel applies itself, against Relay's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import tvm
from numpy.typing import NDArray
from tvm import relay, te, tir
from tvm.contrib import graph_executor

from jointsparse.schedules import operators  # noqa: F401  (readies LLVM)
from jointsparse.schedules.epilogues import ACTIVATIONS, LARGEST, RELU, Activation
from jointsparse.schedules.vector_code import VectorCode

VALUES = np.array(
    [0.0, -0.0, 0.25, -0.25, 0.5, 1.5, -1.5, 6.0, 7.0, -7.0, 3e38, -3e38, 1e-42, np.inf, -np.inf, np.nan], np.float32
)

CASES: dict[str, tuple[Activation, Callable[[relay.Expr], relay.Expr]]] = {
    "none": (Activation(), lambda x: x),
    "relu": (RELU, relay.nn.relu),
    "relu6": (Activation("clip", 0.0, 6.0), lambda x: relay.clip(x, 0.0, 6.0)),
    "bounds": (Activation("clip", -0.5, 1.0), lambda x: relay.clip(x, -0.5, 1.0)),
    "bounds above zero": (Activation("clip", 0.25, 1.0), lambda x: relay.clip(x, 0.25, 1.0)),
    "bounds below zero": (Activation("clip", -1.0, -0.25), lambda x: relay.clip(x, -1.0, -0.25)),
    "no lower bound": (Activation("clip", -LARGEST, 1.0), lambda x: relay.minimum(x, relay.const(np.float32(1.0)))),
    "bounds the wrong way round": (Activation("clip", 1.0, -1.0), lambda x: relay.clip(x, 1.0, -1.0)),
    "leaky": (Activation("leaky_relu", 0.1), lambda x: relay.nn.leaky_relu(x, 0.1)),
    "leaky, falling": (Activation("leaky_relu", -0.5), lambda x: relay.nn.leaky_relu(x, -0.5)),
}


def ours(activation: Activation, lanes: int) -> NDArray:
    def emit(ins: Sequence[tir.Buffer], outs: Sequence[tir.Buffer]) -> tir.Stmt:
        code = VectorCode(tvm.tir.ir_builder.create(), lanes)
        with code.loop(len(VALUES) // lanes, "i") as i:
            code.store(outs[0], activation.emit(code, code.load(ins[0], i * lanes)), i * lanes)
        return code.ib.get()

    source = te.placeholder(VALUES.shape, name="source")
    target = te.extern([VALUES.shape], [source], emit, dtype="float32")
    function = tvm.build(te.create_schedule(target.op), [source, target], "llvm")
    result = tvm.nd.array(np.zeros_like(VALUES))
    function(tvm.nd.array(VALUES), result)
    return result.numpy()


def relays(build: Callable[[relay.Expr], relay.Expr]) -> NDArray:
    x = relay.var("x", shape=VALUES.shape)
    library = relay.build(tvm.IRModule.from_expr(relay.Function([x], build(x))), "llvm")
    executor = graph_executor.GraphModule(library["default"](tvm.cpu()))
    executor.set_input("x", VALUES)
    executor.run()
    return executor.get_output(0).numpy()


@pytest.mark.parametrize("lanes", [1, 4, 16])
@pytest.mark.parametrize("name", CASES)
def test_as_relay(name: str, lanes: int) -> None:
    """NaN included."""
    activation, build = CASES[name]
    assert activation.activation in ACTIVATIONS
    np.testing.assert_array_equal(ours(activation, lanes), relays(build))
