"""KeepTiles after AbsorbEpilogues: which conversions are left, and that every graph computes what it did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import tvm
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tvm import relay

from jointsparse.passes.absorb_epilogues import AbsorbEpilogues
from jointsparse.passes.keep_tiles import KeepTiles
from jointsparse.schedules.operators import FROM_TILES, TO_TILES
from jointsparse.schedules.registration import unpack
from jointsparse.schedules.tiles import TileLayout
from tests.passes.sparse_graphs import (
    Case,
    Expr,
    Results,
    before_and_after,
    constant,
    conv,
    graph,
    image,
    main,
    operators,
    run_both,
    twice,
)
from tests.reference import relative_rms


def kept(mod: tvm.IRModule) -> tvm.IRModule:
    """As in the pipeline."""
    return KeepTiles()(AbsorbEpilogues()(mod))


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
    "biased, then activated and read": Case(
        lambda x, r: twice(relay.nn.bias_add(conv(x), constant(4)), relu), "to winograd nn.relu from from"
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


@pytest.mark.parametrize("name", CASES)
def test_operators_left(name: str) -> None:
    assert Counter(operators(kept(graph(CASES[name])))) == Counter(CASES[name].after.split())


@pytest.mark.parametrize("name", CASES)
def test_a_second_time_nothing_changes_and_the_argument_never_does(name: str) -> None:
    mod = graph(CASES[name])
    before = tvm.ir.load_json(tvm.ir.save_json(mod))
    once = kept(mod)
    tvm.ir.assert_structural_equal(mod, before)
    tvm.ir.assert_structural_equal(kept(once), once)


@pytest.fixture(scope="module")
def results() -> Results:
    """Of each case without the passes and with them."""
    return before_and_after({name: case.build for name, case in CASES.items()}, kept)


@pytest.mark.parametrize("name", CASES)
def test_computes_what_it_did(name: str, results: Results) -> None:
    for plain, result in zip(*results[name], strict=True):
        assert np.std(plain) > 0.01
        assert relative_rms(result, plain.astype(np.float64)) < 1e-5


def test_layouts_of_the_conversions_left_are_those_of_the_kernels() -> None:
    layouts = []

    def visit(node: Expr) -> None:
        if isinstance(node, relay.Call) and node.op.name in (TO_TILES, FROM_TILES):
            layouts.append(unpack(TileLayout, node.attrs).m)

    x = image("x")
    mod = kept(main(x, body=conv(relu(conv(relu(conv(x)), seed=1)), tile=4, seed=2)))
    relay.analysis.post_order_visit(mod["main"].body, visit)
    assert layouts == [2, 2, 4, 4]


def test_attributes_parameters_and_other_functions_stay() -> None:
    x, unused = image("x"), image("unused")
    mod = main(x, unused, body=conv(relu(conv(x)), seed=1)).with_attr("note", "kept")
    y = relay.var("y", shape=(2,))
    mod["other"] = relay.Function([y], relay.negative(y))
    result = kept(mod)
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
    assert Counter(operators(kept(main(x, body=body)))) == {"to": 1, "winograd": depth + 1, "from": 1}


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
    max_examples=3,
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
    for plain, result in zip(*run_both(mod, kept, x=data), strict=True):
        assert relative_rms(result, plain.astype(np.float64)) < 5e-5
