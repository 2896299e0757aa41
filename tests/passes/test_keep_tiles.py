"""KeepTiles: which conversions are left, what the kernels absorb, and that every graph computes what it did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import tvm
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tvm import relay
from tvm.contrib import graph_executor

from jointsparse.passes.keep_tiles import KeepTiles
from jointsparse.schedules.geometry import ConvGeometry
from jointsparse.schedules.operators import FROM_TILES, TO_TILES, WINOGRAD, WINOGRAD_ADD, conv2d_sparse_winograd
from jointsparse.schedules.registration import unpack
from jointsparse.schedules.tiles import TileLayout
from jointsparse.schedules.winograd import transform
from tests.reference import relative_rms

TARGET = "llvm"
SHAPE = (1, 4, 9, 10)
SHORT = {TO_TILES: "to", FROM_TILES: "from", WINOGRAD: "winograd", WINOGRAD_ADD: "winograd_add"}
Expr = relay.Expr


def conv(x: Expr, tile: int = 2, seed: int = 0, size: int = 3, padding: tuple[int, ...] | None = None) -> Expr:
    """Four sparse filters of any image."""
    shape = [int(s) for s in relay.transform.InferTypeLocal(x).shape]
    geometry = ConvGeometry(*shape, 4, (size, size), padding=padding or (size // 2,) * 4)  # type: ignore[arg-type]
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(geometry.weight_shape) / (size * shape[1] ** 0.5)
    filters = transform(tile, size).filters(weight)
    # As many zeros in each, for like layers to share a kernel.
    filters.reshape(-1)[rng.permutation(filters.size)[: filters.size // 3]] = 0
    return conv2d_sparse_winograd(x, filters.astype(np.float32), geometry, tile, TARGET)


def constant(*shape: int) -> Expr:
    return relay.const(np.random.default_rng(9).uniform(0.2, 0.9, shape).astype(np.float32))


def main(*parameters: relay.Var, body: Expr) -> tvm.IRModule:
    return relay.transform.InferType()(tvm.IRModule.from_expr(relay.Function(list(parameters), body)))


def operators(mod: tvm.IRModule) -> list[str]:
    """Names of all calls."""
    names: list[str] = []

    def visit(node: Expr) -> None:
        if isinstance(node, relay.Call):
            names.append(SHORT.get(node.op.name, node.op.name))

    relay.analysis.post_order_visit(mod["main"].body, visit)
    return names


def run(mod: tvm.IRModule, **inputs: NDArray) -> list[NDArray]:
    with tvm.transform.PassContext(opt_level=3):
        library = relay.build(mod, TARGET)
    executor = graph_executor.GraphModule(library["default"](tvm.cpu()))
    executor.set_input(**inputs)
    executor.run()
    return [executor.get_output(i).numpy() for i in range(executor.get_num_outputs())]


@dataclass(frozen=True)
class Case:
    """A graph of two images, and the operators that it has after the pass."""

    build: Callable[[Expr, Expr], Expr]
    after: str


def twice(y: Expr, use: Callable[[Expr], Expr]) -> Expr:
    """Something done to an image that has another reader."""
    return relay.Tuple([use(y), y])


relu, tanh, sigmoid = relay.nn.relu, relay.tanh, relay.sigmoid

CASES = {
    "one": Case(lambda x, r: conv(x), "to winograd from"),
    "two": Case(lambda x, r: conv(relu(conv(x)), seed=1), "to winograd winograd from"),
    "three": Case(
        lambda x, r: conv(relay.nn.leaky_relu(conv(relu(conv(x)), seed=1), 0.1), seed=2),
        "to winograd winograd winograd from",
    ),
    "residual block": Case(
        lambda x, r: relu(relay.add(conv(relu(conv(x)), seed=1), x)), "to winograd winograd_add from"
    ),
    "two residual blocks": Case(
        lambda x, r: (
            lambda y: relu(relay.add(y, conv(relu(conv(y, seed=2)), seed=3)))
        )(relu(relay.add(conv(relu(conv(x)), seed=1), x))),
        "to winograd winograd_add winograd winograd_add from",
    ),
    "residual from outside": Case(lambda x, r: relu(relay.add(r, conv(x))), "to to winograd_add from"),
    "bias around a residual": Case(
        lambda x, r: relu(
            relay.add(constant(4, 1, 1), relay.add(relay.nn.bias_add(conv(x), constant(4)), r))
        ),
        "to to winograd_add from",
    ),
    "sum of three": Case(
        lambda x, r: relay.add(relay.add(conv(x), conv(x, seed=1)), conv(x, seed=2)),
        "to winograd winograd_add winograd_add from",
    ),
    "shared input": Case(
        lambda x, r: relay.multiply(relu(conv(x)), conv(x, seed=1)), "to winograd winograd multiply from"
    ),
    "image added to itself": Case(lambda x, r: (lambda y: relay.add(y, y))(conv(x)), "to winograd add from"),
    "activated and read": Case(lambda x, r: twice(conv(x), relu), "to winograd nn.relu from from"),
    "biased and read": Case(
        lambda x, r: twice(conv(x), lambda y: relay.nn.bias_add(y, constant(4))), "to winograd from nn.bias_add"
    ),
    "residual added and read": Case(
        lambda x, r: twice(conv(x), lambda y: relay.add(y, r)), "to winograd from add"
    ),
    "biased, then activated and read": Case(
        lambda x, r: twice(relay.nn.bias_add(conv(x), constant(4)), relu), "to winograd nn.relu from from"
    ),
    "activated twice over": Case(
        lambda x, r: (lambda y: relay.add(relay.nn.leaky_relu(y, 0.3), relu(y)))(conv(x)),
        "to winograd nn.leaky_relu nn.relu add from",
    ),
    "both inputs of a sum read": Case(
        lambda x, r: (lambda a, b: relay.Tuple([relay.add(a, b), a, b]))(conv(x), conv(x, seed=1)),
        "to winograd winograd add from from from",
    ),
    "concatenate": Case(
        lambda x, r: conv(relay.concatenate([relu(conv(x)), conv(x, seed=1)], 1), seed=2),
        "to winograd winograd concatenate winograd from",
    ),
    "concatenate with another": Case(
        lambda x, r: conv(relay.concatenate([conv(x), r], 1), seed=2),
        "to winograd from concatenate to winograd from",
    ),
    "concatenate rows": Case(
        lambda x, r: relay.concatenate([conv(x), conv(x, seed=1)], 2), "to winograd winograd from from concatenate"
    ),
    "tiles of 2 before 4": Case(
        lambda x, r: conv(relu(conv(x)), tile=4, seed=1), "to winograd from to winograd from"
    ),
    "tiles of 2 beside 4": Case(
        lambda x, r: relay.add(conv(x), conv(x, tile=4)), "to to winograd from to winograd_add from"
    ),
    "filters of 3 and 5": Case(lambda x, r: conv(relu(conv(x)), size=5, seed=1), "to winograd winograd from"),
    "sigmoid": Case(lambda x, r: conv(sigmoid(conv(x)), seed=1), "to winograd from sigmoid to winograd from"),
    "tanh": Case(lambda x, r: conv(tanh(conv(x)), seed=1), "to winograd tanh winograd from"),
    "clip": Case(lambda x, r: conv(relay.clip(conv(x), 0.1, 0.6), seed=1), "to winograd winograd from"),
    "clip below zero": Case(lambda x, r: conv(relay.clip(conv(x), -0.6, -0.1), seed=1), "to winograd winograd from"),
    "clip of what is activated": Case(
        lambda x, r: conv(relay.clip(relu(conv(x)), 0.1, 0.6), seed=1), "to winograd from clip to winograd from"
    ),
    "clip around zero of what is activated": Case(
        lambda x, r: conv(relay.clip(relu(conv(x)), -0.1, 0.6), seed=1), "to winograd clip winograd from"
    ),
    "number added": Case(lambda x, r: conv(relay.add(conv(x), constant()), seed=1), "to winograd winograd from"),
    "number added and read": Case(
        lambda x, r: (lambda y: relay.add(conv(relay.add(y, constant()), seed=1), y))(conv(x)),
        "to winograd from add to winograd_add from",
    ),
    "number added behind an activation": Case(
        lambda x, r: conv(relay.add(relu(conv(x)), constant()), seed=1), "to winograd from add to winograd from"
    ),
    "column added": Case(lambda x, r: relu(relay.add(conv(x), constant(4, 1, 1))), "to winograd from"),
    "column added from the left": Case(
        lambda x, r: relu(relay.add(constant(1, 4, 1, 1), conv(x))), "to winograd from"
    ),
    "row added": Case(lambda x, r: relu(relay.add(conv(x), constant(10))), "to winograd from add nn.relu"),
    "image added to a constant": Case(
        lambda x, r: relu(relay.add(conv(x), constant(*SHAPE))), "to to winograd_add from"
    ),
    "batch made by adding": Case(
        lambda x, r: relu(relay.add(conv(x), constant(2, 4, 1, 1))), "to winograd from add nn.relu"
    ),
    "multiplied by a constant": Case(
        lambda x, r: conv(relay.multiply(conv(x), constant(4, 1, 1)), seed=1),
        "to winograd from multiply to winograd from",
    ),
    "divided": Case(
        lambda x, r: conv(relay.divide(conv(x), relay.add(relu(conv(x, seed=1)), constant())), seed=2),
        "to winograd winograd from from add divide to winograd from",
    ),
    "minimum, maximum, difference": Case(
        lambda x, r: (lambda a, b: relay.subtract(relay.maximum(a, b), relay.minimum(a, b)))(conv(x), conv(x, seed=1)),
        "to winograd winograd maximum minimum subtract from",
    ),
    "broadcast over channels": Case(
        lambda x, r: relay.multiply(
            conv(x), relay.strided_slice(relu(conv(x, seed=1)), [0, 0, 0, 0], [1, 1, 9, 10])
        ),
        "to winograd winograd from from strided_slice multiply",
    ),
    "part of a tuple": Case(
        lambda x, r: conv(relay.split(conv(x), 2, 1)[1], seed=1), "to winograd from split to winograd from"
    ),
    "out of a tuple": Case(
        lambda x, r: conv(relay.TupleGetItem(relay.Tuple([conv(x), r]), 0), seed=1),
        "to winograd from to winograd from",
    ),
    "pooled between": Case(
        lambda x, r: conv(relay.nn.max_pool2d(relu(conv(x)), (2, 2), (2, 2)), seed=1),
        "to winograd from nn.max_pool2d to winograd from",
    ),
    "smaller image": Case(
        lambda x, r: conv(conv(x, padding=(0, 0, 0, 0)), seed=1), "to winograd from to winograd from"
    ),
    "same size, moved": Case(
        lambda x, r: conv(conv(x, padding=(0, 2, 2, 0)), padding=(2, 0, 0, 2), seed=1),
        "to winograd from to winograd from",
    ),
}  # fmt: skip


def outputs(body: Expr) -> list[Expr]:
    return list(body.fields) if isinstance(body, relay.Tuple) else [body]


def image(name: str) -> relay.Var:
    return relay.var(name, shape=SHAPE)


def graph(case: Case) -> tvm.IRModule:
    x, r = image("x"), image("r")
    return main(x, r, body=case.build(x, r))


@pytest.mark.parametrize("name", CASES)
def test_operators_left(name: str) -> None:
    assert Counter(operators(KeepTiles()(graph(CASES[name])))) == Counter(CASES[name].after.split())


@pytest.mark.parametrize("name", CASES)
def test_a_second_time_nothing_changes_and_the_argument_never_does(name: str) -> None:
    mod = graph(CASES[name])
    before = tvm.ir.load_json(tvm.ir.save_json(mod))
    once = KeepTiles()(mod)
    tvm.ir.assert_structural_equal(mod, before)
    tvm.ir.assert_structural_equal(KeepTiles()(once), once)


@pytest.fixture(scope="module")
def results() -> dict[str, tuple[list[NDArray], list[NDArray]]]:
    """Outputs of each case without the pass and with it; of one library each, like kernels compile once."""
    rng = np.random.default_rng(0)
    inputs, bodies, parameters = {}, [], []
    for i, case in enumerate(CASES.values()):
        x, r = image(f"x{i}"), image(f"r{i}")
        parameters += [x, r]
        bodies.append(outputs(case.build(x, r)))
        inputs |= {var.name_hint: rng.standard_normal(SHAPE).astype(np.float32) for var in (x, r)}
    mod = main(*parameters, body=relay.Tuple([y for body in bodies for y in body]))
    plain, kept = (iter(run(module, **inputs)) for module in (mod, KeepTiles()(mod)))
    return {
        name: ([next(plain) for _ in body], [next(kept) for _ in body])
        for name, body in zip(CASES, bodies, strict=True)
    }


@pytest.mark.parametrize("name", CASES)
def test_computes_what_it_did(name: str, results: dict[str, tuple[list[NDArray], list[NDArray]]]) -> None:
    for plain, kept in zip(*results[name], strict=True):
        assert np.std(plain) > 0.01
        assert relative_rms(kept, plain.astype(np.float64)) < 1e-5


def test_layouts_of_the_conversions_left_are_those_of_the_kernels() -> None:
    layouts = []

    def visit(node: Expr) -> None:
        if isinstance(node, relay.Call) and node.op.name in (TO_TILES, FROM_TILES):
            layouts.append(unpack(TileLayout, node.attrs).m)

    x = image("x")
    mod = KeepTiles()(main(x, body=conv(relu(conv(relu(conv(x)), seed=1)), tile=4, seed=2)))
    relay.analysis.post_order_visit(mod["main"].body, visit)
    assert layouts == [2, 2, 4, 4]


def test_attributes_parameters_and_other_functions_stay() -> None:
    x, unused = image("x"), image("unused")
    mod = main(x, unused, body=conv(relu(conv(x)), seed=1)).with_attr("note", "kept")
    y = relay.var("y", shape=(2,))
    mod["other"] = relay.Function([y], relay.negative(y))
    result = KeepTiles()(mod)
    assert result.get_attr("note") == "kept"
    assert [var.name_hint for var in result["main"].params] == ["x", "unused"]
    tvm.ir.assert_structural_equal(result["other"], relay.transform.InferType()(mod)["other"])
    tvm.ir.assert_structural_equal(result["main"].checked_type, relay.transform.InferType()(mod)["main"].checked_type)


def _nested(x: relay.Var) -> Expr:
    z = image("z")
    return relay.Call(relay.Function([z], relu(z)), [conv(relu(conv(x)), seed=1)])


def _branches(x: relay.Var) -> Expr:
    positive = relay.greater(relay.sum(x), relay.const(0.0))
    return relay.If(positive, conv(relu(conv(x)), seed=1), x)


def _bound(x: relay.Var) -> Expr:
    y = image("y")
    return relay.Let(y, conv(relu(conv(x)), seed=1), relu(y))


@pytest.mark.parametrize("build", [_nested, _branches, _bound])
def test_what_is_no_plain_graph_is_handed_back(build: Callable[[relay.Var], Expr]) -> None:
    x = image("x")
    mod = main(x, body=build(x))
    tvm.ir.assert_structural_equal(KeepTiles()(mod), mod)


def test_a_module_without_winograd_is_handed_back() -> None:
    x = image("x")
    mod = main(x, body=relu(x))
    tvm.ir.assert_structural_equal(KeepTiles()(mod), mod)


def test_depth_is_no_limit() -> None:
    x, depth = image("x"), 300
    body = layer = conv(x)
    kernel = layer.args[0]
    into, *weights = kernel.args
    for _ in range(depth):
        body = relu(relay.add(body, constant(4, 1, 1)))
        # As conv(body), without inferring the type of all of it again.
        tiles = relay.Call(into.op, [body], into.attrs)
        body = relay.Call(layer.op, [relay.Call(kernel.op, [tiles, *weights], kernel.attrs)], layer.attrs)
    assert Counter(operators(KeepTiles()(main(x, body=body)))) == {"to": 1, "winograd": depth + 1, "from": 1}


UNARY: dict[str, Callable[[Expr], Expr]] = {
    "relu": relu,
    "leaky": lambda y: relay.nn.leaky_relu(y, 0.2),
    "clip": lambda y: relay.clip(y, -0.4, 0.5),
    "clip above zero": lambda y: relay.clip(y, 0.1, 0.5),
    "tanh": tanh,
    "sigmoid": sigmoid,
    "bias": lambda y: relay.nn.bias_add(y, constant(4)),
    "number": lambda y: relay.add(y, constant()),
    "scale": lambda y: relay.multiply(y, constant(4, 1, 1)),
    "F2": lambda y: conv(y, 2, 1),
    "F2 again": lambda y: conv(y, 2, 2),
    "F2 5x5": lambda y: conv(y, 2, 3, 5),
    "F4": lambda y: conv(y, 4, 4),
    "moved": lambda y: conv(y, 2, 5, 3, (2, 0, 0, 2)),
}
BINARY: dict[str, Callable[[Expr, Expr], Expr]] = {
    "add": relay.add,
    "residual": lambda a, b: relay.add(conv(a, 2, 6), b),
    "subtract": relay.subtract,
    "maximum": relay.maximum,
    "concatenate": lambda a, b: conv(relay.concatenate([a, b], 1), 2, 7),
}


@settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    size=st.sampled_from([(1, 9, 10), (2, 5, 4), (1, 14, 3)]),
    seed=st.integers(0, 2**32 - 1),
)
def test_random_graphs(size: tuple[int, int, int], seed: int) -> None:
    """Any step may read any image made before it, most often a late one; what nobody reads is a result."""
    batch, height, width = size
    rng = np.random.default_rng(seed)
    x = relay.var("x", shape=(batch, 4, height, width))
    images: list[Expr] = [conv(x)]
    read: set[int] = set()
    for name in rng.choice([*UNARY, *BINARY, "F2", "residual", "add"], 14):
        operands = [max(0, len(images) - 1 - int(rng.integers(reach))) for reach in (3, 6)[: 1 + (name in BINARY)]]
        read.update(operands)
        images.append((UNARY | BINARY)[name](*(images[i] for i in operands)))
    mod = main(x, body=relay.Tuple([y for i, y in enumerate(images) if i not in read]))
    data = np.random.default_rng(1).standard_normal((batch, 4, height, width)).astype(np.float32)
    for plain, result in zip(run(mod, x=data), run(KeepTiles()(mod), x=data), strict=True):
        assert relative_rms(result, plain.astype(np.float64)) < 5e-5
