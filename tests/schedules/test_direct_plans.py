"""The direct kernel by plans of every form, whether they would be chosen or not, with infinities in the input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import tvm
from numpy.typing import NDArray
from tvm import te

from jointsparse.schedules import operators  # noqa: F401  (readies LLVM)
from jointsparse.schedules.convolution_buffers import Arguments
from jointsparse.schedules.direct_plan import DirectPlan, in_one_row
from jointsparse.schedules.epilogues import Activation
from jointsparse.schedules.formats import pack_direct
from jointsparse.schedules.geometry import ConvGeometry
from jointsparse.schedules.sparse_direct import sparse_direct
from jointsparse.schedules.targets import code_features
from tests import reference
from tests.host import AVX512, HASWELL, host_has
from tests.schedules.convolutions import TOLERANCE, direct_case

TARGETS = [
    (target, lanes)
    for target, lanes, feature in ((AVX512, 16, "avx512bw"), (HASWELL, 8, "avx2"), ("llvm", 4, "sse2"))
    if host_has(feature)
] or [("llvm", 4)]


def random_plan(rng: np.random.Generator, geometry: ConvGeometry, lanes: int) -> DirectPlan:
    """Of any form that the geometry has."""
    geometry = in_one_row(geometry)
    pixelwise = geometry.in_height == 1 and geometry.kernel == geometry.strides == (1, 1) and not any(geometry.padding)
    channels = int(rng.integers(1, geometry.in_channels + 1))
    if geometry.groups > 1:
        of_group = geometry.in_channels // geometry.groups
        channels = of_group * int(rng.choice([g for g in (1, 2, 3) if geometry.groups % g == 0]))
    cols = lanes * int(rng.integers(1, 3))
    if pixelwise and cols <= geometry.out_width and rng.random() < 0.7:
        return DirectPlan(geometry, lanes, 1, cols, channels, packed=False)
    panels = int(rng.integers(1, 4))
    if geometry.out_width <= lanes // 2 and rng.random() < 0.8:
        cols = 1 << (geometry.out_width - 1).bit_length()
        lifted = rng.random() < 0.7
        return DirectPlan(geometry, lanes, panels * lanes // cols, cols, channels, panels, lifted=lifted)
    return DirectPlan(geometry, lanes, panels * int(rng.integers(1, 4)), cols, channels, panels, rng.random() < 0.4)


def run_plan(
    plan: DirectPlan,
    geometry: ConvGeometry,
    weight: NDArray,
    data: NDArray,
    bias: NDArray,
    residual: NDArray,
    target: str,
) -> NDArray[np.float32]:
    rows = pack_direct(weight, plan)
    arrays = [data, rows.values, rows.indices, rows.indptr, rows.filters, bias, residual]
    inputs = [te.placeholder(a.shape, str(a.dtype), name=f"a{i}") for i, a in enumerate(arrays)]
    names = ("data", "values", "indices", "indptr", "filters", "bias", "residual")
    arguments = Arguments(**dict(zip(names, inputs, strict=True)))
    result = sparse_direct(
        arguments,
        plan=plan,
        shape=geometry.out_shape,
        activation=Activation("leaky_relu", 0.5),
        features=code_features(target),
    )
    kernel = tvm.build(te.create_schedule(result.op), [*inputs, result], target)
    out = tvm.nd.empty(geometry.out_shape)
    kernel(*[tvm.nd.array(a) for a in arrays], out)
    return out.numpy()


def check_plan(
    rng: np.random.Generator, geometry: ConvGeometry, plan: DirectPlan, sparsity: float, target: str
) -> bool:
    """Right, and an infinity is felt where it is read and nowhere else; whether there is such a place."""
    weight = rng.standard_normal(geometry.weight_shape).astype(np.float32)
    weight[rng.random(weight.shape) < sparsity] = 0
    weight[rng.random(len(weight)) < 0.2] = 0
    shape = (geometry.batch, geometry.in_channels, geometry.in_height, geometry.in_width)
    data = rng.standard_normal(shape).astype(np.float32)
    bias = rng.standard_normal(geometry.out_channels).astype(np.float32)
    residual = rng.standard_normal(geometry.out_shape).astype(np.float32)
    is_infinite = rng.random(shape) < 1 / data[0].size
    finite = np.where(is_infinite, 0, data)
    result = run_plan(plan, geometry, weight, np.where(is_infinite, np.float32(np.inf), data), bias, residual, target)
    want = reference.conv2d(finite, weight, geometry) + bias[:, None, None] + residual
    want = np.where(want > 0, want, 0.5 * want)
    reached = reference.conv2d(is_infinite.astype(np.float64), (weight != 0).astype(np.float64), geometry) > 0.5
    assert not np.isfinite(result[reached]).any(), plan
    if reached.all():
        return False
    assert reference.relative_rms(result[~reached], want[~reached]) <= TOLERANCE[0], plan
    return True


@pytest.mark.parametrize(("target", "lanes"), TARGETS, ids=[target for target, _ in TARGETS])
def test_plans_of_every_form(target: str, lanes: int) -> None:
    rng, kinds, compared = np.random.default_rng(lanes), Counter[str](), 0
    for i in range(80):
        geometry = direct_case(rng, large=i % 10 == 0).geometry
        if i % 4 == 0:
            geometry = replace(geometry, kernel=(1, 1), strides=(1, 1), padding=(0, 0, 0, 0), in_height=1 + i % 11)
        plan = replace(random_plan(rng, geometry, lanes), together=(1, 2, 3, 4)[i % 4])
        compared += check_plan(rng, geometry, plan, (0.0, 0.5, 0.8, 0.95, 1.0)[i % 5], target)
        kinds["not packed"] += not plan.packed
        kinds["panels"] += plan.panels > 1
        kinds["aligned"] += plan.packed and plan.shifted and geometry.kernel[1] > 1
        kinds["unaligned"] += not plan.shifted and geometry.kernel[1] > 1
        kinds["rows share vectors"] += plan.cols < lanes
        kinds["more planes for that"] += plan.phases != replace(plan, lifted=False).phases
        kinds["parallel blocks"] += plan.blocks_in_parallel
        kinds["parallel filters"] += plan.in_parts
        kinds["one visit"] += plan.visits == 1
        kinds["every second pixel"] += geometry.strides[1] == 2
        kinds["uneven channels"] += geometry.in_channels % plan.channels != 0
    assert compared >= 65
    assert len(kinds) == 11
    assert min(kinds.values()) >= 4, kinds


def few_blocks(
    batch: int, channels: int, size: tuple[int, int], filters: int, rows: int, cols: int, together: int, groups: int = 1
) -> tuple[ConvGeometry, DirectPlan]:
    """3x3, in blocks of rows x cols outputs, so many channels together."""
    geometry = ConvGeometry(batch, channels, *size, filters, (3, 3), padding=(1, 1, 1, 1), groups=groups)
    return geometry, DirectPlan(geometry, 4, rows, cols, together)


def few_blocks_unpacked(batch: int, channels: int, width: int, filters: int) -> tuple[ConvGeometry, DirectPlan]:
    """1x1, in blocks of 8 outputs, two channels together."""
    geometry = ConvGeometry(batch, channels, 1, width, filters, (1, 1))
    return geometry, DirectPlan(geometry, 4, 1, 8, 2, packed=False)


# By what is shared out among threads, with vectors of four.
SHARED = {
    "one block": few_blocks(1, 9, (4, 7), 11, 4, 8, 2),
    "fewer channels and filters than parts": few_blocks(1, 3, (4, 4), 2, 4, 4, 1),
    "two blocks": few_blocks(1, 5, (7, 8), 6, 4, 8, 2),
    "three images": few_blocks(3, 7, (4, 8), 5, 4, 8, 3),
    "blocks of channels of groups": few_blocks(1, 6, (4, 8), 9, 4, 8, 2, groups=3),
    "blocks of channels of two images": few_blocks(2, 8, (4, 6), 4, 4, 8, 2, groups=4),
    "not packed": few_blocks_unpacked(3, 5, 8, 7),
    "not packed, blocks that overlap": few_blocks_unpacked(1, 5, 21, 7),
}


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", SHARED)
def test_few_blocks_are_shared_out(name: str, threads: int, use_threads: Callable[[int], None]) -> None:
    use_threads(threads)
    geometry, plan = SHARED[name]
    check_plan(np.random.default_rng(threads), geometry, plan, 0.5, "llvm")


def test_what_is_shared_out() -> None:
    """Each way at least once."""
    plans = [plan for _, plan in SHARED.values()]
    assert not any(plan.blocks_in_parallel for plan in plans)
    packed = [plan for plan in plans if plan.in_parts and plan.packed]
    assert {plan.all_blocks for plan in packed} == {1, 2, 3}
    assert any(plan.part_channels == plan.part_filters == 1 and plan.visits > 1 for plan in packed)
    assert any(plan.channel_parts * plan.part_channels > plan.geometry.in_channels for plan in packed)
    assert any(plan.filter_parts * plan.part_filters > plan.geometry.out_channels for plan in packed)
    assert {plan.geometry.batch for plan in plans if not plan.in_parts and plan.channel_blocks > 1} == {1, 2}
    assert {plan.blocks[1] for plan in plans if not plan.packed} == {1, 3}
