"""Chains cut in every way against float64, layer by layer, through relay.build."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import tvm
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tvm import relay
from tvm.contrib import graph_executor

from jointsparse.passes.absorb_epilogues import AbsorbEpilogues
from jointsparse.schedules.attributes import strip_plan_of, winograd_plan_of
from jointsparse.schedules.constructors import conv2d_sparse_winograd, winograd_chain
from jointsparse.schedules.geometry import ConvGeometry
from jointsparse.schedules.operators import WINOGRAD, WINOGRAD_ADD
from jointsparse.schedules.strip_plan import StripPlan
from jointsparse.schedules.targets import cpu_facts
from jointsparse.schedules.winograd import transform
from tests import reference
from tests.host import AVX512, TARGETS
from tests.schedules.convolutions import TOLERANCE

MEETINGS = ("above", "below", "equal")
"""How images meet the width of a strip: the chains of one library."""

RANDOM = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@dataclass(frozen=True)
class Chain:
    """Convolutions one after the other, and how they are cut.

    Attributes:
        activations: of each, a key of ACTIVATIONS. vectors, parts: of the StripPlan.
        sparsity: of the Winograd weights of each.
    """

    batch: int
    channels: tuple[int, ...]
    kernels: tuple[int, ...]
    height: int
    width: int
    m: int
    groups: int
    activations: tuple[str, ...]
    residual: bool
    sparsity: tuple[float, ...]
    vectors: int
    parts: int
    seed: int

    @property
    def geometries(self) -> list[ConvGeometry]:
        sizes = zip(self.channels[:-1], self.channels[1:], self.kernels, strict=True)
        return [
            ConvGeometry(self.batch, c, self.height, self.width, k, (r, r), padding=(r // 2,) * 4, groups=self.groups)
            for c, k, r in sizes
        ]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the data."""
        return self.batch, self.channels[0], self.height, self.width

    @property
    def result_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.channels[-1], self.height, self.width


ACTIVATIONS = {
    "none": (lambda y: y, lambda y: y),
    "relu": (relay.nn.relu, lambda y: np.maximum(y, 0)),
    "clip": (lambda y: relay.clip(y, -0.7, 1.1), lambda y: np.clip(y, -0.7, 1.1)),
    # Not zero of zero: what lies around an image must not be activated.
    "clip above zero": (lambda y: relay.clip(y, 0.2, 1.5), lambda y: np.clip(y, 0.2, 1.5)),
    "leaky": (lambda y: relay.nn.leaky_relu(y, 0.1), lambda y: np.where(y > 0, y, 0.1 * y)),
}


def weights_of(chain: Chain) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Winograd weights and bias of each layer; results neither grow nor fade."""
    rng = np.random.default_rng(chain.seed)
    weights = []
    for geometry, sparsity in zip(chain.geometries, chain.sparsity, strict=True):
        size = geometry.kernel[0]
        kept = rng.random((*geometry.weight_shape[:2], *[chain.m + size - 1] * 2)) >= sparsity
        spatial = rng.standard_normal(geometry.weight_shape) / (size * geometry.weight_shape[1] ** 0.5)
        filters = transform(chain.m, size).filters(spatial) * kept
        weights.append((filters.astype(np.float32), rng.standard_normal(geometry.out_channels).astype(np.float32)))
    return weights


def inputs_of(chain: Chain) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(chain.seed + 1)
    return {
        "x": rng.standard_normal(chain.shape).astype(np.float32),
        "r": rng.standard_normal(chain.result_shape).astype(np.float32),
    }


def expected_of(chain: Chain) -> NDArray[np.float64]:
    inputs = inputs_of(chain)
    y = inputs["x"].astype(np.float64)
    layers = zip(chain.geometries, weights_of(chain), chain.activations, strict=True)
    for i, (geometry, (filters, bias), activation) in enumerate(layers):
        y = reference.winograd(y, filters, geometry, chain.m) + bias[:, None, None]
        if chain.residual and i == len(chain.kernels) - 1:
            y = y + inputs["r"]
        y = ACTIVATIONS[activation][1](y)
    return y


def alone(chain: Chain, x: relay.Expr, r: relay.Expr, target: str) -> relay.Expr:
    """Operator by operator, epilogues absorbed."""
    y = x
    layers = zip(chain.geometries, weights_of(chain), chain.activations, strict=True)
    for i, (geometry, (filters, bias), activation) in enumerate(layers):
        y = relay.nn.bias_add(conv2d_sparse_winograd(y, filters, geometry, chain.m, target), relay.const(bias))
        if chain.residual and i == len(chain.kernels) - 1:
            y = relay.add(y, r)
        y = ACTIVATIONS[activation][0](y)
    mod = AbsorbEpilogues()(tvm.IRModule.from_expr(relay.Function([x, r], y)))
    return relay.bind(mod["main"].body, dict(zip(mod["main"].params, [x, r], strict=True)))


def chained(chain: Chain, x: relay.Expr, r: relay.Expr, target: str) -> relay.Expr:
    """The same as one call, cut as the chain says."""
    calls: list[relay.Call] = []

    def visit(node: relay.Expr) -> None:
        if isinstance(node, relay.Call) and node.op.name in (WINOGRAD, WINOGRAD_ADD):
            calls.append(node)

    relay.analysis.post_order_visit(alone(chain, x, r, target), visit)
    assert len(calls) == len(chain.kernels)
    plan = StripPlan(tuple(winograd_plan_of(call.attrs) for call in calls), chain.vectors, chain.parts)
    call = winograd_chain(x, calls, plan, r if chain.residual else None)
    ungrouped = tuple(replace(one, geometry=replace(one.geometry, groups=1)) for one in plan.layers)
    tiles = [(one.positions, one.tiles, one.bundles, one.index_unit) for one in plan.layers]
    restored = strip_plan_of(call.attrs)
    assert [(one.positions, one.tiles, one.bundles, one.index_unit) for one in restored.layers] == tiles
    assert [one.geometry for one in restored.layers] == [one.geometry for one in ungrouped]
    assert (restored.vectors, restored.parts) == (plan.vectors, plan.parts)
    return call


def run(
    bodies: Sequence[relay.Expr], parameters: Sequence[relay.Var], values: Sequence[NDArray], target: str
) -> list[NDArray]:
    mod = tvm.IRModule.from_expr(relay.Function(list(parameters), relay.Tuple(list(bodies))))
    with tvm.transform.PassContext(opt_level=3):
        library = relay.build(mod, target)
    executor = graph_executor.GraphModule(library["default"](tvm.cpu()))
    for parameter, value in zip(parameters, values, strict=True):
        executor.set_input(parameter.name_hint, value)
    executor.run()
    return [executor.get_output(i).numpy() for i in range(len(bodies))]


def check(chains: Sequence[Chain], target: str) -> None:
    """Build all in one library and compare each with the reference."""
    parameters, values, bodies = [], [], []
    for i, chain in enumerate(chains):
        x, r = relay.var(f"x{i}", shape=chain.shape), relay.var(f"r{i}", shape=chain.result_shape)
        parameters += [x, r]
        values += inputs_of(chain).values()
        bodies.append(chained(chain, x, r, target))
    for chain, result in zip(chains, run(bodies, parameters, values, target), strict=True):
        # Relative to each pixel of the image: at the edges of a strip only few are wrong, if any.
        expected = expected_of(chain)
        error = np.abs(result - expected).max() / np.sqrt(np.mean(np.square(expected)))
        assert error <= 20 * TOLERANCE[chain.m], f"{error:.2e} {chain}"
        error = reference.relative_rms(result, expected)
        assert error <= 2 * TOLERANCE[chain.m], f"{error:.2e} {chain}"


def draw_chain(rng: np.random.Generator, lanes: int, meeting: str) -> Chain:
    """A chain of an image that is narrower than a strip, as wide, or wider."""
    layers, groups = int(rng.integers(1, 4)), int(rng.choice([1, 1, 1, 2]))
    least = 2 * layers // lanes + 1 if meeting == "above" else 1
    vectors = int(rng.integers(least, least + 4))
    strip, m = vectors * lanes, int(rng.choice([2, 4]))
    down, across = int(rng.integers(1, 9)), strip
    if meeting == "below":
        across = int(rng.integers(max(1, strip - lanes), strip))
    if meeting == "above":
        across = int(rng.integers(strip + 1, 3 * strip))
    names = list(ACTIVATIONS)
    return Chain(
        batch=int(rng.integers(1, 3)),
        channels=tuple(int(c) * groups for c in rng.integers(1, 6, layers + 1)),
        kernels=tuple(int(k) for k in rng.choice([3, 5], layers)),
        height=max(1, down * m - int(rng.integers(0, m))),
        width=max(1, across * m - int(rng.integers(0, m))),
        m=m,
        groups=groups,
        activations=tuple(names[i] for i in rng.integers(0, len(names), layers)),
        residual=bool(rng.integers(0, 2)),
        sparsity=tuple(float(one) for one in rng.choice([0.0, 0.5, 0.9, 0.9, 1.0], layers)),
        vectors=vectors,
        parts=int(rng.integers(1, 5)),
        seed=int(rng.integers(0, 2**16)),
    )


def test_random_chains(use_threads: Callable[[int], None]) -> None:
    seen: list[Chain] = []

    @RANDOM
    @given(seed=st.integers(0, 2**32 - 1), target=st.sampled_from(TARGETS), threads=st.sampled_from([1, 2]))
    def compare(seed: int, target: str, threads: int) -> None:
        rng, lanes = np.random.default_rng(seed), cpu_facts(target).lanes
        chains = [draw_chain(rng, lanes, meeting) for meeting in MEETINGS]
        use_threads(threads)
        check(chains, target)
        seen.extend(chains)

    compare()
    kinds = Counter((chain.m, kernel) for chain in seen for kernel in chain.kernels)
    assert min(kinds[m, kernel] for m in (2, 4) for kernel in (3, 5)) >= 3
    mixed = Counter(
        name
        for chain in seen
        for name, holds in {
            "several kernels": len(set(chain.kernels)) == 2,
            "several parts": chain.parts > 1,
            "partial tiles across": chain.width % chain.m > 0,
            "partial tiles down": chain.height % chain.m > 0,
            "residual": chain.residual,
            "batch": chain.batch == 2,
            "groups": chain.groups == 2,
            "no zeros": 0.0 in chain.sparsity,
            "nothing but zeros": 1.0 in chain.sparsity,
        }.items()
        if holds
    )
    assert len(mixed) == 9
    assert min(mixed.values()) >= 2, mixed


def _wide(target: str, m: int) -> Chain:
    """Several strips and parts, partial tiles; activations that keep what is no number."""
    lanes = cpu_facts(target).lanes
    vectors = 6 // lanes + 1
    return Chain(
        1, (2, 3, 3, 2), (3, 5, 3), 13 * m - 1, (3 * vectors * lanes - 5) * m - 1, m, 1,
        ("leaky", "none", "none"), True, (0.3, 0.3, 0.3), vectors, 3, 5,
    )  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_the_same_as_operator_by_operator_and_infinities_stay_where_they_were(
    target: str, use_threads: Callable[[int], None]
) -> None:
    """A pixel that is no number spoils the tiles that read it, layer after layer. Nothing else may have met it: not
    what lies beyond a strip, nor what was kept of rows before."""
    # Two, for no strip to mend what the one before it has written beyond its end.
    use_threads(2)
    chain = _wide(target, 4 if target == AVX512 else 2)
    x, r = relay.var("x", shape=chain.shape), relay.var("r", shape=chain.result_shape)
    data, rng = inputs_of(chain), np.random.default_rng(0)
    for _ in range(4):
        data["x"][0, 0, rng.integers(chain.height), rng.integers(chain.width)] = rng.choice([np.inf, np.nan])
    # In what is kept of a strip, the end of this row lies before the begin of the next one.
    data["x"][0, 0, 6 * chain.m] = np.nan
    both = [build(chain, x, r, target) for build in (alone, chained)]
    before, after = run(both, [x, r], list(data.values()), target)
    finite = np.isfinite(before)
    assert 0.2 < finite.mean() < 0.98
    np.testing.assert_array_equal(np.isfinite(after), finite)
    np.testing.assert_allclose(after[finite], before[finite], rtol=0, atol=1e-6 * np.abs(before[finite]).max())


def test_data_of_another_shape_is_refused() -> None:
    chain = _wide("llvm", 2)
    x, r = relay.var("x", shape=chain.shape), relay.var("r", shape=chain.result_shape)
    call = chained(chain, x, r, "llvm")
    other = relay.var("r", shape=(1, 1, chain.height, chain.width))
    for arguments in ([other, *call.args[1:]], [*call.args[:-1], other]):
        wrong = relay.Call(call.op, arguments, call.attrs)
        with pytest.raises((TypeError, tvm.TVMError), match="is made for float32"):
            relay.transform.InferType()(tvm.IRModule.from_expr(wrong))
