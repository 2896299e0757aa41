"""Buffers are as large as said, and what 32 bits cannot index is refused; nothing of that size is allocated here."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tvm
from tvm import te

from jointsparse.schedules.buffers import (
    argument_buffers,
    direct_buffers,
    why_too_large,
    winograd_buffers,
)
from jointsparse.schedules.constructors import why_not_direct, why_not_winograd
from jointsparse.schedules.convolution_buffers import Arguments
from jointsparse.schedules.direct_plan import direct_plan
from jointsparse.schedules.epilogues import Activation
from jointsparse.schedules.formats import pack_direct, pack_winograd
from jointsparse.schedules.geometry import ConvGeometry
from jointsparse.schedules.sparse_direct import sparse_direct
from jointsparse.schedules.sparse_winograd import sparse_winograd
from jointsparse.schedules.targets import STACK_BYTES, code_features, cpu_facts
from jointsparse.schedules.tile_images import ImageEnds
from jointsparse.schedules.winograd_plan import winograd_plan

GEOMETRIES = {
    "one block": ConvGeometry(1, 4, 11, 13, 6, (3, 3), padding=(1, 1, 1, 1)),
    "many blocks": ConvGeometry(2, 30, 120, 130, 5, (3, 3), padding=(1, 1, 1, 1)),
    "few blocks": ConvGeometry(3, 128, 5, 5, 9, (5, 5), padding=(2, 2, 2, 2)),
    "strided and dilated": ConvGeometry(1, 40, 60, 60, 3, (3, 3), dilation=(1, 2), strides=(2, 3)),
    "one pixel": ConvGeometry(1, 1, 1, 1, 3, (1, 1)),
}
each_target = pytest.mark.parametrize("target", ["llvm", "llvm -mcpu=haswell", "llvm -mcpu=skylake-avx512"])


def arguments(shape: tuple[int, ...], rows: int, biases: int, filters: int = 0) -> Arguments[te.Tensor]:
    """Of a convolution; filters: rows that say whose they are."""
    return Arguments(
        data=te.placeholder(shape, name="data"),
        values=te.placeholder((16,), name="values"),
        indices=te.placeholder((16,), "int32", name="indices"),
        indptr=te.placeholder((rows + 1,), "int32", name="indptr"),
        filters=te.placeholder((filters,), "int32", name="filters") if filters else None,
        bias=te.placeholder((biases,), name="bias"),
    )


def allocated(inputs: Arguments[te.Tensor], result: te.Tensor) -> dict[str, int]:
    """Elements by name of buffer, the largest of each, before buffers that do not live together are merged."""
    with tvm.transform.PassContext(disabled_pass=["tir.StorageRewrite"]):
        given = [tensor for tensor in vars(inputs).values() if tensor is not None]
        mod = tvm.lower(te.create_schedule(result.op), [*given, result])
    sizes = {}

    def visit(node: tvm.tir.Stmt) -> None:
        if isinstance(node, tvm.tir.Allocate):
            elements = math.prod(int(extent) for extent in node.extents)
            sizes[node.buffer_var.name] = max(elements, sizes.get(node.buffer_var.name, 0))

    for function in mod.functions.values():
        tvm.tir.stmt_functor.post_order_visit(function.body, visit)
    return sizes


@each_target
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_direct_buffers_are_those_of_the_code(geometry: ConvGeometry, target: str) -> None:
    plan = direct_plan(geometry, cpu_facts(target))
    shape = (geometry.batch, geometry.in_channels, geometry.in_height, geometry.in_width)
    bundles = plan.channel_blocks * plan.segments * plan.bundles
    inputs = arguments(shape, bundles, geometry.out_channels, bundles * plan.together)
    result = sparse_direct(
        inputs, plan=plan, shape=geometry.out_shape, activation=Activation(), features=code_features(target)
    )
    sizes = allocated(inputs, result)
    buffers = direct_buffers(plan)
    assert (buffers["packed input"], buffers["sums"]) == (sizes.get("planes", 0), sizes["sums"])
    full = pack_direct(np.ones(geometry.weight_shape), plan).indptr[-1] * plan.together
    assert full <= buffers["weights in bundles"] <= 1.5 * full
    # Registers apart, which are small arrays.
    assert max(sizes.values()) == max(sizes.get("planes", 0), sizes["sums"]) or 4 * max(sizes.values()) < STACK_BYTES


@each_target
@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("name", ["one block", "many blocks", "few blocks"])
def test_winograd_buffers_are_those_of_the_code(name: str, tile: int, target: str) -> None:
    geometry = GEOMETRIES[name]
    plan = winograd_plan(geometry, tile, cpu_facts(target))
    bundles = plan.bundles * plan.positions
    shape = plan.layout.shape(geometry.batch, geometry.in_channels)
    inputs = arguments(shape, bundles, geometry.out_channels, bundles * plan.blocking.together)
    result = sparse_winograd(
        inputs, plan=plan, activation=Activation(), ends=ImageEnds(), features=code_features(target)
    )
    sizes = allocated(inputs, result)
    buffers = winograd_buffers(plan)
    assert buffers["input in tiles"] == math.prod(int(size) for size in inputs.data.shape)
    assert buffers["result in tiles"] == math.prod(int(size) for size in result.shape)
    assert (buffers["transformed input"], buffers["products"]) == (sizes["V"], sizes["M"])
    assert max(sizes.values()) == max(sizes["V"], sizes["M"])
    n = round(plan.positions**0.5)
    full = pack_winograd(np.ones((*geometry.weight_shape[:2], n, n)), plan)
    assert buffers["weights in bundles"] == full.indptr[-1] * plan.blocking.together


@pytest.mark.parametrize(
    ("geometry", "what"),
    [
        (ConvGeometry(1, 3, 40_000, 40_000, 1, (3, 3)), "input of 4800000000 elements"),
        (ConvGeometry(1000, 64, 224, 224, 1, (3, 3)), "input of 3211264000 elements"),
        (ConvGeometry(1, 1, 10_000, 10_000, 30, (3, 3)), "output of 2998800120 elements"),
        (ConvGeometry(1, 20_000, 3, 3, 20_000, (3, 3)), "weights of"),
    ],
    ids=["image", "batch", "output", "weights"],
)
def test_arguments_beyond_32_bits_are_refused(geometry: ConvGeometry, what: str) -> None:
    for reason in (why_not_direct(geometry), why_not_winograd(geometry, 2), why_not_winograd(geometry, 4)):
        assert what in str(reason)
        assert "32-bit offsets" in str(reason)


def test_the_last_size_that_fits() -> None:
    most = 2**31 - 1
    assert why_too_large({"this": most}) is None
    assert why_too_large({"this": most, "that": most + 1}) == f"that of {most + 1} elements exceeds 32-bit offsets"
    assert argument_buffers(ConvGeometry(2, 4, 5, 6, 8, (3, 3), groups=2), 9) == {
        "input": 240, "output": 2 * 8 * 3 * 4, "weights": 8 * 2 * 9
    }  # fmt: skip


def test_buffers_in_between_beyond_32_bits_are_refused() -> None:
    """Input, output and weights are small here; what lies between is not."""
    tall = ConvGeometry(1, 30_000, 1, 1, 1, (2, 2), padding=(0, 0, 40_000, 1), dilation=(40_000, 1))
    assert "packed input of 2400240004 elements" in str(why_not_direct(tall, "llvm"))
    sums = ConvGeometry(4, 2, 1, 1, 300_000_000, (2, 1), padding=(0, 0, 9000, 0), dilation=(9000, 1))
    assert "sums of" in str(why_not_direct(sums, "llvm -mcpu=skylake-avx512"))
    deep = ConvGeometry(1, 10_000_000, 1, 1, 1, (5, 5), padding=(2, 2, 2, 2))
    assert "transformed input of 2560001280 elements" in str(why_not_winograd(deep, 4, "llvm"))
    deeper = ConvGeometry(1, 30_000_000, 1, 1, 1, (3, 3), padding=(1, 1, 1, 1))
    assert "input in tiles of 3840000000 elements" in str(why_not_winograd(deeper, 4, "llvm"))
    many = ConvGeometry(1, 1, 1, 1, 30_000_000, (3, 3), padding=(1, 1, 1, 1))
    assert "result in tiles of 3840000000 elements" in str(why_not_winograd(many, 4, "llvm"))
    # Sums of one filter at a time: all would be of 2400000000 elements.
    full = ConvGeometry(1, 1, 1, 1, 600_000_000, (1, 1))
    assert [why_not_direct(geometry, "llvm") for geometry in (deep, deeper, many, full)] == [None] * 4
    # 33 rows at a position, and three that fill the last bundle up.
    uneven = ConvGeometry(1, 4_000_000, 1, 1, 33, (3, 3), padding=(1, 1, 1, 1))
    assert argument_buffers(uneven, 16)["weights"] < 2**31 - 1
    assert "weights in bundles of 2304000000 elements" in str(why_not_winograd(uneven, 2, "llvm"))


def test_a_large_image_that_is_computed_in_blocks_is_taken() -> None:
    """Transformed at once it would have more than 2**31 elements."""
    ultra_hd = ConvGeometry(1, 80, 2160, 3840, 80, (3, 3), padding=(1, 1, 1, 1))
    assert 16 * 80 * (2160 // 2) * (3840 // 2) > 2**31 - 1
    assert why_not_direct(ultra_hd) is None
    assert why_not_winograd(ultra_hd, 2) is None
