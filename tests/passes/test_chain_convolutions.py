"""ChainConvolutions as in the pipeline: which convolutions are chained, and that every graph computes what it did."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import tvm
from tvm import relay

from jointsparse.passes import chain_convolutions
from jointsparse.passes.absorb_epilogues import AbsorbEpilogues
from jointsparse.passes.chain_convolutions import ChainConvolutions, Link, chained
from jointsparse.passes.keep_tiles import KeepTiles
from jointsparse.schedules.attributes import strip_plan_of
from jointsparse.schedules.geometry import ConvGeometry
from jointsparse.schedules.operators import WINOGRAD_CHAIN, WINOGRAD_CHAIN_ADD
from jointsparse.schedules.targets import cpu_facts
from jointsparse.schedules.winograd_plan import winograd_plan
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

relu, tanh = relay.nn.relu, relay.tanh


def alone(mod: tvm.IRModule) -> tvm.IRModule:
    return KeepTiles()(AbsorbEpilogues()(mod))


def joined(mod: tvm.IRModule) -> tvm.IRModule:
    """As in the pipeline."""
    return ChainConvolutions()(alone(mod))


def nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if caches were so small that every image is wide, and there were one thread."""
    monkeypatch.setattr(chain_convolutions, "_BEYOND_CACHES", 0)
    monkeypatch.setattr(chain_convolutions, "_TRANSFORMS", {True: 99.0})
    monkeypatch.setattr(chain_convolutions, "_LEAST_UNITS", 1)


def _block(x: Expr) -> Expr:
    return relu(relay.add(conv(relu(conv(x)), seed=1), x))


# Where no image fits into a cache.
CASES = {
    "two": Case(lambda x, r: conv(relu(conv(x)), seed=1), "chain"),
    "one": Case(lambda x, r: conv(x), "chain"),
    "three kinds of activation": Case(
        lambda x, r: relay.clip(conv(relay.nn.leaky_relu(conv(relu(conv(x))), 0.1), seed=2), -0.2, 0.3), "chain"
    ),
    "filters of 3 and 5": Case(lambda x, r: conv(relu(conv(x)), size=5, seed=1), "chain"),
    "residual": Case(lambda x, r: _block(x), "chain_add"),
    "residual of another image": Case(lambda x, r: relay.add(conv(relu(conv(x)), seed=1), tanh(r)), "tanh chain_add"),
    "its image is read elsewhere": Case(lambda x, r: relay.Tuple([conv(relu(conv(x)), seed=1), tanh(x)]), "chain tanh"),
    "read between": Case(
        lambda x, r: (lambda y: relay.Tuple([conv(y, seed=1), y]))(relu(conv(x))), "to winograd winograd from from"
    ),
    "two read between": Case(
        lambda x, r: (lambda y: relay.multiply(conv(y, seed=1), conv(y, seed=2)))(relu(conv(x))),
        "to winograd winograd winograd multiply from",
    ),
    "residual in tiles": Case(
        lambda x, r: (lambda y: relay.add(conv(relu(conv(y, seed=1)), seed=2), y))(relu(conv(x))),
        "to winograd winograd winograd_add from",
    ),
    "residual inside": Case(lambda x, r: conv(_block(x), seed=2), "to winograd winograd_add winograd from"),
    "the end is read twice": Case(
        lambda x, r: twice(conv(relu(conv(x)), seed=1), tanh), "to winograd winograd tanh from from"
    ),
    "the end is converted once and read twice": Case(
        lambda x, r: (lambda y: relay.Tuple([relay.sigmoid(y), relay.exp(y)]))(conv(relu(conv(x)), seed=1)),
        "chain sigmoid exp",
    ),
    "tanh between": Case(lambda x, r: conv(tanh(conv(x)), seed=1), "to winograd tanh winograd from"),
    "tiles of 2 before 4": Case(lambda x, r: conv(relu(conv(x)), tile=4, seed=1), "chain chain"),
    "smaller image": Case(lambda x, r: conv(conv(x, padding=(0, 0, 0, 0)), seed=1), "to winograd from chain"),
    "same size, moved": Case(
        lambda x, r: conv(conv(x, padding=(0, 2, 2, 0)), padding=(2, 0, 0, 2), seed=1),
        "to winograd from to winograd from",
    ),
    "sparse direct between": Case(lambda x, r: conv(conv(relu(conv(x)), tile=0, seed=1), seed=2), "chain direct chain"),
    "shared input": Case(lambda x, r: relay.concatenate([conv(x), r, conv(x, seed=1)], 1), "chain chain concatenate"),
    "number added between": Case(lambda x, r: conv(relay.add(conv(x), constant()), seed=1), "chain"),
}  # fmt: skip
SHORT = {WINOGRAD_CHAIN: "chain", WINOGRAD_CHAIN_ADD: "chain_add"}


def names(mod: tvm.IRModule) -> Counter[str]:
    return Counter(SHORT.get(name, name) for name in operators(mod))


@pytest.mark.parametrize("name", CASES)
def test_operators_left(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing_fits(monkeypatch)
    assert names(joined(graph(CASES[name]))) == Counter(CASES[name].after.split())


@pytest.mark.parametrize("name", CASES)
def test_small_images_are_left_alone(name: str) -> None:
    mod = alone(graph(CASES[name]))
    tvm.ir.assert_structural_equal(ChainConvolutions()(mod), mod)


@pytest.mark.parametrize("name", CASES)
def test_a_second_time_nothing_changes_and_the_argument_never_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing_fits(monkeypatch)
    mod = alone(graph(CASES[name]))
    before = tvm.ir.load_json(tvm.ir.save_json(mod))
    once = ChainConvolutions()(mod)
    tvm.ir.assert_structural_equal(mod, before)
    tvm.ir.assert_structural_equal(ChainConvolutions()(once), once)


COMPUTED = (
    "three kinds of activation", "filters of 3 and 5", "residual of another image", "tiles of 2 before 4",
    "the end is converted once and read twice", "number added between",
)  # fmt: skip


@pytest.fixture(scope="module")
def results() -> Results:
    """Of cases without the pass and with it."""
    with pytest.MonkeyPatch.context() as patch:
        nothing_fits(patch)
        return before_and_after({name: CASES[name].build for name in COMPUTED}, joined)


@pytest.mark.parametrize("name", COMPUTED)
def test_computes_what_it_did(name: str, results: Results) -> None:
    for plain, result in zip(*results[name], strict=True):
        assert np.std(plain) > 0.01
        assert relative_rms(result, plain.astype(np.float64)) < 1e-5


def test_a_wide_image() -> None:
    """Of 64 MiB at each convolution, with nothing changed."""
    x = relay.var("x", shape=(1, 4, 1024, 2064))
    mod = alone(main(x, body=relay.add(conv(relu(conv(relu(conv(x, 4)), 4, seed=1)), 4, seed=2), x)))
    assert names(ChainConvolutions()(mod)) == Counter(["chain_add"])
    chain = ChainConvolutions()(mod)["main"].body
    plan = strip_plan_of(chain.attrs)
    assert len(plan.layers) == 3
    assert plan.strips * plan.parts > 1
    data = np.random.default_rng(0).standard_normal((1, 4, 1024, 2064)).astype(np.float32)
    for plain, result in zip(*run_both(mod, ChainConvolutions(), x=data), strict=True):
        assert np.abs(result - plain).max() < 1e-5 * np.abs(plain).max()


def test_what_has_functions_inside_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing_fits(monkeypatch)
    x, z = image("x"), image("z")
    mod = main(x, body=relay.Call(relay.Function([z], relu(z)), [conv(relu(conv(x)), seed=1)]))
    tvm.ir.assert_structural_equal(joined(mod), relay.transform.InferType()(mod))


def _links(channels: list[int], height: int, width: int, products: float = 0.0) -> list[Link]:
    cpu = cpu_facts("llvm -mcpu=skylake-avx512")
    return [
        Link(winograd_plan(ConvGeometry(1, c, height, width, k, (3, 3), padding=(1, 1, 1, 1)), 4, cpu), products)
        for c, k in pairwise(channels)
    ]


@pytest.mark.parametrize("count", [2, 6, 18])
def test_all_layers_are_in_one_chain_after_another(count: int) -> None:
    links = _links([32] * (count + 1), 720, 1280)
    chains = chained(links)
    assert [layer for plan in chains for layer in plan.layers] == [link.plan for link in links]
    assert len(chains) < count


def test_no_chain_where_it_would_not_pay() -> None:
    assert chained([]) == []
    assert chained(_links([64] * 4, 256, 256)) == [], "images that are still in a cache"
    assert chained(_links([64] * 4, 2400, 60)) != []
    assert chained(_links([64] * 4, 2400, 66)) == [], "two strips of 16 tiles for 17"
    assert chained(_links([512] * 4, 200, 200)) == [], "rows that do not fit"
    assert chained(_links([32] * 3, 720, 1280, products=40.0)) != []
    assert chained(_links([32] * 3, 720, 1280, products=5000.0)) == [], "more is multiplied twice than memory costs"
