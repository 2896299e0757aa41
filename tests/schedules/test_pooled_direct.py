"""Direct convolutions that pool their result, by plans and poolings of every form, against numpy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import tvm
from numpy.typing import NDArray
from tvm import te

from jointsparse.schedules import operators, pooled_direct  # noqa: F401  (readies LLVM)
from jointsparse.schedules.convolution_buffers import Arguments
from jointsparse.schedules.direct_plan import DirectPlan
from jointsparse.schedules.epilogues import RELU, Activation
from jointsparse.schedules.formats import pack_direct
from jointsparse.schedules.geometry import ConvGeometry
from jointsparse.schedules.max_pool import PoolGeometry
from jointsparse.schedules.pooled_direct import PooledPlan, why_not_pooled
from jointsparse.schedules.sparse_direct import sparse_direct
from jointsparse.schedules.targets import code_features
from tests import reference
from tests.schedules.convolutions import TOLERANCE, direct_case
from tests.schedules.test_direct_plans import TARGETS
from tests.schedules.test_max_pool import pooled

ACTIVATIONS = (Activation(), RELU, Activation("clip", -0.5, 0.5), Activation("leaky_relu", 0.25))


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one block too, for small images to be pooled."""
    monkeypatch.setattr(pooled_direct, "_BLOCKS_OF_CHUNK", 0)


def random_pooling(rng: np.random.Generator, geometry: ConvGeometry) -> PoolGeometry:
    height, width = geometry.out_height, geometry.out_width
    strides = (int(rng.integers(1, 4)), int(rng.integers(1, 4)))
    pool = (strides[0] + int(rng.integers(0, 3)), int(rng.integers(1, 5)))
    padding = (int(rng.integers(0, pool[0])), int(rng.integers(0, pool[1])))
    # Windows may reach beyond the image below and on the right.
    down, across = -(-(height + padding[0]) // strides[0]), -(-(width + padding[1]) // strides[1])
    return PoolGeometry(pool, strides, padding, (int(rng.integers(1, down + 1)), int(rng.integers(1, across + 1))))


def random_plan(rng: np.random.Generator, geometry: ConvGeometry, lanes: int, pool: PoolGeometry) -> DirectPlan:
    cols = lanes * -(-geometry.out_width // lanes)
    panels = int(rng.integers(1, 3))
    rows = pool.strides[0] * panels * int(rng.integers(1, 3))
    of_group = geometry.in_channels // geometry.groups
    channels = of_group if geometry.groups > 1 else int(rng.integers(1, geometry.in_channels + 1))
    return DirectPlan(geometry, lanes, rows, cols, channels, panels, rng.random() < 0.5)


def run_pooled(
    plan: DirectPlan,
    pool: PoolGeometry,
    activation: Activation,
    weight: NDArray,
    data: NDArray,
    bias: NDArray,
    target: str,
) -> NDArray[np.float32]:
    rows = pack_direct(weight, plan)
    arrays = [data, rows.values, rows.indices, rows.indptr, rows.filters, bias]
    names = ("data", "values", "indices", "indptr", "filters", "bias")
    inputs = {name: te.placeholder(a.shape, str(a.dtype), name) for name, a in zip(names, arrays, strict=True)}
    shape = (plan.geometry.batch, plan.geometry.out_channels, *pool.out)
    features = code_features(target)
    result = sparse_direct(
        Arguments(**inputs), plan=plan, shape=shape, activation=activation, features=features, pool=pool
    )
    kernel = tvm.build(te.create_schedule(result.op), [*inputs.values(), result], target)
    out = tvm.nd.array(np.full(shape, np.nan, np.float32))
    kernel(*[tvm.nd.array(a) for a in arrays], out)
    return out.numpy()


def check_pooled(
    rng: np.random.Generator, plan: DirectPlan, pool: PoolGeometry, activation: Activation, target: str
) -> None:
    geometry = plan.geometry
    weight = rng.standard_normal(geometry.weight_shape).astype(np.float32)
    weight[rng.random(weight.shape) < rng.choice([0.0, 0.7, 1.0])] = 0
    data = rng.standard_normal((geometry.batch, geometry.in_channels, geometry.in_height, geometry.in_width))
    data, bias = data.astype(np.float32), rng.standard_normal(geometry.out_channels).astype(np.float32)
    want = reference.conv2d(data, weight, geometry) + bias[:, None, None]
    if activation.activation == "clip":
        want = np.clip(want, activation.low, activation.high)
    elif activation.activation == "leaky_relu":
        want = np.where(want > 0, want, want * activation.low)
    result = run_pooled(plan, pool, activation, weight, data, bias, target)
    assert reference.relative_rms(result, pooled(want, pool)) <= TOLERANCE[0]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("target", "lanes"), TARGETS, ids=[target for target, _ in TARGETS])
@pytest.mark.usefixtures("short_chunks")
def test_poolings_of_every_form(target: str, lanes: int, threads: int, use_threads: Callable[[int], None]) -> None:
    use_threads(threads)
    rng, kinds, done = np.random.default_rng(lanes + threads), Counter[str](), 0
    while done < 16:
        geometry = direct_case(rng, large=False).geometry
        pool = random_pooling(rng, geometry)
        plan, activation = random_plan(rng, geometry, lanes, pool), ACTIVATIONS[done % 4]
        if why_not_pooled(plan, pool, activation) is not None:
            continue
        check_pooled(rng, plan, pool, activation, target)
        pooled_plan = PooledPlan(plan, pool)
        done += 1
        kinds["rows kept"] += pooled_plan.kept > 0
        kinds["none kept"] += pooled_plan.kept == 0
        kinds["several rows of a block"] += pooled_plan.results > 1
        kinds["several chunks"] += pooled_plan.chunks > 1
        kinds["several visits"] += plan.visits > 1
        kinds["one visit"] += plan.visits == 1
        kinds["begins inside"] += pooled_plan.top > 0
        kinds["begins outside"] += pooled_plan.top < 0
    assert len(kinds) == 8
    assert min(kinds.values()) >= 1, kinds


STEM = ConvGeometry(1, 3, 224, 224, 64, (7, 7), (2, 2), (3, 3, 3, 3))
STEM_PLAN = DirectPlan(STEM, 16, 2, 112, 1)
STEM_POOL = PoolGeometry((3, 3), (2, 2), (1, 1), (56, 56))


POOL_OF_ROW = PoolGeometry((1, 2), (1, 1), (0, 0), (1, 159))


def test_no_residual_of_what_is_pooled() -> None:
    x = te.placeholder((1,), name="x")
    arguments = Arguments(data=x, values=x, indices=x, indptr=x, filters=x, bias=x, residual=x)
    with pytest.raises(ValueError, match="residual"):
        sparse_direct(
            arguments,
            plan=STEM_PLAN,
            shape=(1, 64, 56, 56),
            activation=RELU,
            features=code_features("llvm"),
            pool=STEM_POOL,
        )


def test_the_stem_of_a_resnet_is_pooled() -> None:
    assert why_not_pooled(STEM_PLAN, STEM_POOL, RELU) is None


@pytest.mark.parametrize(
    ("plan", "pool", "activation", "reason"),
    [
        (STEM_PLAN, STEM_POOL, Activation("leaky_relu", -0.1), "falls"),
        (replace(STEM_PLAN, cols=64), STEM_POOL, RELU, "whole windows"),
        (replace(STEM_PLAN, rows=3), STEM_POOL, RELU, "whole windows"),
        (replace(STEM_PLAN, together=2), STEM_POOL, RELU, "twice"),
        (replace(STEM_PLAN, cols=120), STEM_POOL, RELU, "whole vectors"),
        (STEM_PLAN, PoolGeometry((2, 1), (2, 2), (0, 1), (56, 57)), RELU, "without a pixel"),
        (STEM_PLAN, PoolGeometry((2, 2), (2, 2), (0, 0), (57, 56)), RELU, "without a pixel"),
        (DirectPlan(ConvGeometry(4, 8, 1, 160, 4, (1, 1)), 16, 1, 160, 8), POOL_OF_ROW, RELU, "one row"),
        (STEM_PLAN, replace(STEM_POOL, pool=(5, 5)), RELU, "block above"),
        (STEM_PLAN, PoolGeometry((1, 1), (2, 2), (0, 0), (56, 56)), RELU, "block above"),
        (replace(STEM_PLAN, rows=4, panels=2), STEM_POOL, RELU, "few blocks"),
    ],
)
def test_what_is_not_pooled(plan: DirectPlan, pool: PoolGeometry, activation: Activation, reason: str) -> None:
    assert reason in str(why_not_pooled(plan, pool, activation))
