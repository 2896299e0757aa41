"""Which conversions AbsorbConversions takes away, and that every graph computes what it did."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tvm
from tvm import relay

from jointsparse.passes.absorb_conversions import AbsorbConversions
from jointsparse.passes.absorb_epilogues import AbsorbEpilogues
from jointsparse.passes.keep_tiles import KeepTiles
from jointsparse.schedules import tile_images
from jointsparse.schedules.geometry import ConvGeometry
from jointsparse.schedules.winograd_plan import WinogradPlan
from tests.passes.sparse_graphs import Expr, conv, main, operators, run_both, twice

SHAPE = (2, 4, 8, 16)
"""Of rows that are whole vectors of the tests' target."""
NARROW = (1, 4, 8, 14)

relu = relay.nn.relu


def absorbed(mod: tvm.IRModule) -> tvm.IRModule:
    """As in the pipeline."""
    return AbsorbConversions()(KeepTiles()(AbsorbConversions(preferred=True)(AbsorbEpilogues()(mod))))


def graph(build: Callable[[Expr, Expr], Expr], shape: tuple[int, ...] = SHAPE) -> tvm.IRModule:
    x, r = relay.var("x", shape=shape), relay.var("r", shape=shape)
    return main(x, r, body=build(x, r))


# Built like this, what is left where tiles are preferred, and where images are.
CASES: dict[str, tuple[Callable[[Expr, Expr], Expr], str, str]] = {
    "one": (lambda x, r: relu(conv(x)), "winograd", "winograd"),
    "two": (lambda x, r: conv(relu(conv(x)), seed=1), "winograd winograd", "winograd winograd"),
    "with something between": (
        lambda x, r: conv(relay.sigmoid(conv(x)), seed=1),
        "winograd sigmoid winograd",
        "winograd sigmoid winograd",
    ),
    "a residual that is read in tiles anyway": (
        lambda x, r: relu(relay.add(conv(relu(conv(x)), seed=1), x)),
        "to winograd winograd_add from",
        "winograd winograd_add",
    ),
    "a residual of its own": (lambda x, r: relay.add(conv(x), r), "winograd_add", "winograd_add"),
    "two that read one image": (
        lambda x, r: relay.Tuple([conv(x), conv(x, seed=1)]),
        "to winograd winograd",
        "winograd winograd",
    ),
    "a result that is read in both forms": (
        lambda x, r: twice(relu(conv(x)), lambda y: conv(y, seed=1)),
        "winograd winograd from",
        "winograd winograd",
    ),
    "a result with two readers of NCHW": (
        lambda x, r: twice(conv(x), relay.sigmoid),
        "winograd sigmoid",
        "winograd sigmoid",
    ),
    "the input elsewhere": (lambda x, r: conv(x, padding=(0, 0, 0, 0)), "to winograd from", "to winograd from"),
    "direct": (lambda x, r: conv(x, tile=0), "direct", "direct"),
}


@pytest.fixture(params=[False, True], ids=["tiles", "images"])
def images_preferred(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Vectors of the tests' target are too short for that to be measured faster."""
    if request.param:
        monkeypatch.setattr(tile_images, "_VECTOR", 4)
    return bool(request.param)


@pytest.mark.parametrize("name", CASES)
def test_what_is_left(name: str, images_preferred: bool) -> None:
    build, *left = CASES[name]
    mod = absorbed(graph(build))
    assert sorted(operators(mod)) == sorted(left[images_preferred].split())
    tvm.ir.assert_structural_equal(absorbed(mod), mod)


@pytest.mark.parametrize("name", CASES)
def test_computes_the_same(name: str, images_preferred: bool) -> None:
    build, *_ = CASES[name]
    rng = np.random.default_rng(0)
    inputs = {name: rng.standard_normal(SHAPE).astype(np.float32) for name in ("x", "r")}
    before, after = run_both(graph(build), absorbed, **inputs)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("height", "width", "lanes", "preferred"),
    [(56, 56, 16, True), (224, 224, 16, True), (56, 56, 8, False), (256, 256, 16, False), (64, 64, 16, True)],
)
def test_preferred(height: int, width: int, lanes: int, preferred: bool) -> None:
    geometry = ConvGeometry(1, 8, height, width, 8, (3, 3), padding=(1, 1, 1, 1))
    assert tile_images.prefers_images(WinogradPlan.of(geometry, 4, lanes, 2, 4)) is preferred


def test_rows_that_are_not_whole_vectors_are_converted() -> None:
    assert sorted(operators(absorbed(graph(lambda x, r: conv(x), NARROW)))) == ["from", "to", "winograd"]


def test_an_activation_behind_what_was_absorbed_stays_correct() -> None:
    """The pass before it, run once more, takes in what it had not seen."""
    x, r = relay.var("x", shape=SHAPE), relay.var("r", shape=SHAPE)
    mod = absorbed(main(x, r, body=conv(x)))
    again = main(*mod["main"].params, body=relu(relay.add(mod["main"].body, mod["main"].params[1])))
    assert operators(absorbed(again)) == ["winograd_add"]
    rng = np.random.default_rng(0)
    inputs = {name: rng.standard_normal(SHAPE).astype(np.float32) for name in ("x", "r")}
    (before,), (after,) = run_both(again, absorbed, **inputs)
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5)
