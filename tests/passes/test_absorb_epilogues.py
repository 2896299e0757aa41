"""AbsorbEpilogues: what sparse convolutions take on, what they leave, and that every graph computes what it did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import tvm
from tvm import relay

from jointsparse.passes.absorb_epilogues import AbsorbEpilogues
from jointsparse.schedules.epilogues import RELU, Activation
from jointsparse.schedules.operators import DIRECT, DIRECT_ADD, WINOGRAD, WINOGRAD_ADD
from jointsparse.schedules.registration import unpack
from tests.passes.sparse_graphs import (
    SHAPE,
    Expr,
    Results,
    before_and_after,
    constant,
    conv,
    image,
    main,
    operators,
    run_both,
    twice,
)
from tests.reference import relative_rms

KINDS = {"direct": 0, "winograd": 2}
each_kind = pytest.mark.parametrize("kind", KINDS)
relu, add, bias_add = relay.nn.relu, relay.add, relay.nn.bias_add


@dataclass(frozen=True)
class Case:
    """A graph of a convolution and two images, and what it calls after the pass, conversions apart."""

    build: Callable[[Callable[..., Expr], Expr, Expr], Expr]
    after: str


CASES = {
    "nothing": Case(lambda conv, x, r: conv(x), "conv"),
    "bias": Case(lambda conv, x, r: bias_add(conv(x), constant(4)), "conv"),
    "two biases": Case(lambda conv, x, r: add(bias_add(conv(x), constant(4)), constant(4, 1, 1)), "conv"),
    "bias of rows": Case(lambda conv, x, r: bias_add(conv(x), constant(9), axis=2), "conv nn.bias_add"),
    "bias that is no constant": Case(
        lambda conv, x, r: bias_add(conv(x), relay.mean(r, (0, 2, 3))), "conv mean nn.bias_add"
    ),
    "number": Case(lambda conv, x, r: add(conv(x), constant()), "conv"),
    "number in four dimensions": Case(lambda conv, x, r: add(constant(1, 1, 1, 1), conv(x)), "conv"),
    "column": Case(lambda conv, x, r: relu(add(conv(x), constant(4, 1, 1))), "conv"),
    "column from the left": Case(lambda conv, x, r: relu(add(constant(1, 4, 1, 1), conv(x))), "conv"),
    "row": Case(lambda conv, x, r: relu(add(conv(x), constant(10))), "conv add nn.relu"),
    "batch made by adding": Case(lambda conv, x, r: relu(add(conv(x), constant(2, 4, 1, 1))), "conv add nn.relu"),
    "image that is a constant": Case(lambda conv, x, r: relu(add(conv(x), constant(*SHAPE))), "conv_add"),
    "residual": Case(lambda conv, x, r: relu(add(r, conv(x))), "conv_add"),
    "residual that is the input": Case(lambda conv, x, r: relu(add(conv(x), x)), "conv_add"),
    "residual of one channel": Case(
        lambda conv, x, r: add(conv(x), relay.max(r, 1, keepdims=True)), "conv max add"
    ),
    "bias around a residual": Case(
        lambda conv, x, r: relu(add(constant(4, 1, 1), add(bias_add(conv(x), constant(4)), r))), "conv_add"
    ),
    "two residuals": Case(lambda conv, x, r: add(add(conv(x), r), x), "conv_add add"),
    "sum of two": Case(lambda conv, x, r: relu(add(conv(x), conv(x, seed=1))), "conv conv_add"),
    "sum of three": Case(
        lambda conv, x, r: add(add(conv(x), conv(x, seed=1)), conv(x, seed=2)), "conv conv_add conv_add"
    ),
    "residual block": Case(lambda conv, x, r: relu(add(conv(relu(conv(x)), seed=1), x)), "conv conv_add"),
    "clip": Case(lambda conv, x, r: relay.clip(conv(x), 0.1, 0.6), "conv"),
    "clip below zero": Case(lambda conv, x, r: relay.clip(conv(x), -0.6, -0.1), "conv"),
    "leaky": Case(lambda conv, x, r: relay.nn.leaky_relu(bias_add(conv(x), constant(4)), 0.3), "conv"),
    "tanh": Case(lambda conv, x, r: relay.tanh(conv(x)), "conv tanh"),
    "clip of what is activated": Case(lambda conv, x, r: relay.clip(relu(conv(x)), 0.1, 0.6), "conv clip"),
    "bias behind an activation": Case(lambda conv, x, r: bias_add(relu(conv(x)), constant(4)), "conv nn.bias_add"),
    "number behind an activation": Case(lambda conv, x, r: add(relu(conv(x)), constant()), "conv add"),
    "residual behind an activation": Case(lambda conv, x, r: relu(add(relu(conv(x)), r)), "conv add nn.relu"),
    "multiplied": Case(
        lambda conv, x, r: bias_add(relay.multiply(conv(x), constant(4, 1, 1)), constant(4)),
        "conv multiply nn.bias_add",
    ),
    "added to itself": Case(lambda conv, x, r: (lambda y: add(y, y))(conv(x)), "conv add"),
    "activated and read": Case(lambda conv, x, r: twice(conv(x), relu), "conv nn.relu"),
    "biased and read": Case(
        lambda conv, x, r: twice(conv(x), lambda y: bias_add(y, constant(4))), "conv nn.bias_add"
    ),
    "residual added and read": Case(lambda conv, x, r: twice(conv(x), lambda y: add(y, r)), "conv add"),
    "biased, then activated and read": Case(
        lambda conv, x, r: twice(bias_add(conv(x), constant(4)), relu), "conv nn.relu"
    ),
    "activated, then read twice": Case(
        lambda conv, x, r: twice(relu(conv(x)), lambda y: add(y, r)), "conv add"
    ),
    "activated twice over": Case(
        lambda conv, x, r: (lambda y: add(relay.nn.leaky_relu(y, 0.3), relu(y)))(conv(x)),
        "conv nn.leaky_relu nn.relu add",
    ),
    "both inputs of a sum read": Case(
        lambda conv, x, r: (lambda a, b: relay.Tuple([add(a, b), a, b]))(conv(x), conv(x, seed=1)), "conv conv add"
    ),
    "part of a tuple": Case(
        lambda conv, x, r: relu(relay.TupleGetItem(relay.Tuple([conv(x), r]), 0)), "conv nn.relu"
    ),
}  # fmt: skip


def build_of(name: str, kind: str) -> Callable[[Expr, Expr], Expr]:
    return partial(CASES[name].build, partial(conv, tile=KINDS[kind]))


def graph(name: str, kind: str) -> tvm.IRModule:
    x, r = image("x"), image("r")
    return main(x, r, body=build_of(name, kind)(x, r))


@each_kind
@pytest.mark.parametrize("name", CASES)
def test_operators_left(name: str, kind: str) -> None:
    left = [operator for operator in operators(AbsorbEpilogues()(graph(name, kind))) if operator not in ("to", "from")]
    assert Counter(left) == Counter(CASES[name].after.replace("conv", kind).split())


@each_kind
@pytest.mark.parametrize("name", CASES)
def test_a_second_time_nothing_changes_and_the_argument_never_does(name: str, kind: str) -> None:
    mod = graph(name, kind)
    before = tvm.ir.load_json(tvm.ir.save_json(mod))
    once = AbsorbEpilogues()(mod)
    tvm.ir.assert_structural_equal(mod, before)
    tvm.ir.assert_structural_equal(AbsorbEpilogues()(once), once)


@pytest.fixture(scope="module", params=KINDS)
def results(request: pytest.FixtureRequest) -> Results:
    """Of each case without the pass and with it."""
    return before_and_after({name: build_of(name, request.param) for name in CASES}, AbsorbEpilogues())


@pytest.mark.parametrize("name", CASES)
def test_computes_what_it_did(name: str, results: Results) -> None:
    for plain, absorbed in zip(*results[name], strict=True):
        assert np.std(plain) > 0.01
        assert relative_rms(absorbed, plain.astype(np.float64)) < 1e-5


def convolution(mod: tvm.IRModule) -> relay.Call:
    """The only one."""
    found: list[relay.Call] = []

    def visit(node: Expr) -> None:
        if isinstance(node, relay.Call) and node.op.name in (DIRECT, DIRECT_ADD, WINOGRAD, WINOGRAD_ADD):
            found.append(node)

    relay.analysis.post_order_visit(mod["main"].body, visit)
    (one,) = found
    return one


@each_kind
@pytest.mark.parametrize(
    ("follows", "activation"),
    [
        (relu, RELU),
        (lambda y: relay.clip(y, 0.0, 6.0), Activation("clip", 0.0, 6.0)),
        (lambda y: relay.nn.leaky_relu(y, 0.25), Activation("leaky_relu", 0.25)),
        (relay.sigmoid, Activation()),
    ],
    ids=["relu", "clip", "leaky", "sigmoid"],
)
def test_activations(kind: str, follows: Callable[[Expr], Expr], activation: Activation) -> None:
    x = image("x")
    found = convolution(AbsorbEpilogues()(main(x, body=follows(conv(x, KINDS[kind])))))
    assert unpack(Activation, found.attrs) == activation


@each_kind
def test_biases_are_added_up(kind: str) -> None:
    x = image("x")
    body = add(constant(), add(bias_add(conv(x, KINDS[kind]), constant(4)), constant(4, 1, 1)))
    *_, bias = convolution(AbsorbEpilogues()(main(x, body=body))).args
    np.testing.assert_allclose(bias.data.numpy(), constant().data.numpy() + 2 * constant(4).data.numpy(), rtol=1e-6)


@pytest.mark.parametrize("order", [1, -1])
def test_a_residual_goes_to_winograd_first(order: int) -> None:
    """Whose result may stay in tiles."""
    x = image("x")
    body = add(*[conv(x, 0), conv(x, 2)][::order])
    assert Counter(operators(AbsorbEpilogues()(main(x, body=body)))) == Counter(
        ["direct", "to", "to", "winograd_add", "from"]
    )


def test_direct_and_winograd_in_turn() -> None:
    x, shape = image("x"), SHAPE
    y = relu(add(conv(relu(bias_add(conv(x, 0), constant(4))), 2, 1), x))
    y = relay.clip(add(conv(relay.nn.leaky_relu(conv(y, 2, 2), 0.1), 0, 3), y), -0.5, 0.5)
    mod = main(x, body=y)
    absorbed = AbsorbEpilogues()(mod)
    assert set(operators(absorbed)) == {"to", "from", "direct", "direct_add", "winograd", "winograd_add"}
    data = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    (plain,), (result,) = run_both(mod, AbsorbEpilogues(), x=data)
    assert relative_rms(result, plain.astype(np.float64)) < 1e-5


@each_kind
def test_what_is_no_plain_graph_is_handed_back(kind: str) -> None:
    x, y = image("x"), image("y")
    mod = main(x, body=relay.Let(y, relu(conv(x, KINDS[kind])), relu(y)))
    tvm.ir.assert_structural_equal(AbsorbEpilogues()(mod), mod)


@each_kind
def test_depth_is_no_limit(kind: str) -> None:
    x, depth = image("x"), 300
    body = conv(x, KINDS[kind])
    for _ in range(depth):
        body = add(body, constant(4, 1, 1))
    assert len(operators(AbsorbEpilogues()(main(x, body=relu(body))))) == (3 if KINDS[kind] else 1)
