"""Convolutions one after the other on images in chunks: what one writes, zeros around the image included, the next one
reads."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import tvm
from numpy.typing import NDArray
from tvm import relay, te
from tvm.contrib import graph_executor

from jointsparse.passes.absorb_epilogues import AbsorbEpilogues
from jointsparse.passes.keep_tiles import KeepTiles
from jointsparse.schedules import sparse_winograd
from jointsparse.schedules.constructors import conv2d_sparse_winograd
from jointsparse.schedules.convolution_buffers import Arguments
from jointsparse.schedules.epilogues import Activation
from jointsparse.schedules.formats import pack_winograd
from jointsparse.schedules.geometry import ConvGeometry
from jointsparse.schedules.targets import code_features, cpu_facts
from jointsparse.schedules.tile_images import ImageEnds
from jointsparse.schedules.tiles import CHUNKS
from jointsparse.schedules.vector_code import is_far
from jointsparse.schedules.winograd import transform
from jointsparse.schedules.winograd_plan import winograd_plan
from tests import reference
from tests.host import TARGETS
from tests.schedules.convolutions import TOLERANCE
from tests.schedules.tiled import in_tiles, run

CHANNELS = (3, 5, 3)


def weights(geometry: ConvGeometry, tile: int, seed: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    dense = transform(tile, geometry.kernel[0]).filters(rng.standard_normal(geometry.weight_shape))
    dense[rng.random(dense.shape) < 0.6] = 0
    return dense.astype(np.float32)


def geometries(batch: int, height: int, width: int, kernel: int) -> list[ConvGeometry]:
    reach = (kernel - 1) // 2
    return [
        ConvGeometry(batch, c, height, width, k, (kernel, kernel), padding=(reach,) * 4) for c, k in pairwise(CHANNELS)
    ]


def check(layers: list[ConvGeometry], tile: int, target: str, use_threads: Callable[[int], None]) -> None:
    """Two convolutions, the second with the first's input added, with one thread and with two."""
    first = layers[0]
    shape = (first.batch, first.in_channels, first.in_height, first.in_width)
    data = np.random.default_rng(7).standard_normal(shape).astype(np.float32)
    both = [weights(layer, tile, seed) for seed, layer in enumerate(layers)]
    x = relay.var("x", shape=shape)
    middle = relay.nn.relu(conv2d_sparse_winograd(x, both[0], layers[0], tile, target))
    mod = tvm.IRModule.from_expr(
        relay.Function([x], relay.add(conv2d_sparse_winograd(middle, both[1], layers[1], tile, target), x))
    )
    mod = KeepTiles()(AbsorbEpilogues()(mod))
    assert str(mod).count("from_tiles") == 1, "between the two it stays in tiles"
    want = np.maximum(reference.winograd(data, both[0], layers[0], tile), 0)
    want = reference.winograd(want, both[1], layers[1], tile) + data
    with tvm.transform.PassContext(opt_level=3):
        library = relay.build(mod, target=target)
    for threads in (1, 2):
        use_threads(threads)
        executor = graph_executor.GraphModule(library["default"](tvm.cpu()))
        executor.set_input("x", data)
        executor.run()
        error = np.abs(executor.get_output(0).numpy() - want)
        assert np.sqrt(np.mean(error**2)) < 2 * TOLERANCE[tile] * np.sqrt(np.mean(want**2))
        assert error.max() < 50 * TOLERANCE[tile] * np.abs(want).max()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("kernel", "tile", "height", "width"),
    [
        (3, 4, 8, 64),  # one vector across with 16 lanes, and nothing beside the image
        (5, 4, 21, 253),  # the last tile and the last rows are partly of the image
        (3, 4, 3, 128),
        (3, 4, 40, 60),
        (5, 2, 9, 32),
        (3, 2, 7, 95),
        (5, 2, 30, 62),
    ],
)
def test_edges(
    target: str, kernel: int, tile: int, height: int, width: int, use_threads: Callable[[int], None]
) -> None:
    layers = geometries(2, height, width, kernel)
    assert all(winograd_plan(layer, tile, cpu_facts(target)).layout.form == CHUNKS for layer in layers)
    check(layers, tile, target, use_threads)


def kernel(geometry: ConvGeometry, tile: int, target: str) -> tuple[list[NDArray], list[te.Tensor], te.Tensor]:
    """A convolution on tiles by itself: its weights, its inputs, the data first, and its result."""
    plan = winograd_plan(geometry, tile, cpu_facts(target))
    rows, filters = pack_winograd(weights(geometry, tile, 0), plan), np.zeros(geometry.out_channels, np.float32)
    arrays = [rows.values, rows.indices, rows.indptr, rows.filters, filters]
    data = te.placeholder(plan.layout.shape(geometry.batch, geometry.in_channels), name="data")
    constants = [te.placeholder(array.shape, str(array.dtype), f"constant{i}") for i, array in enumerate(arrays)]
    names = ("values", "indices", "indptr", "filters", "bias")
    arguments = Arguments(data=data, **dict(zip(names, constants, strict=True)))
    result = sparse_winograd.sparse_winograd(
        arguments, plan=plan, activation=Activation(), ends=ImageEnds(), features=code_features(target)
    )
    return arrays, [data, *constants], result


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("batch", "height", "width", "blocks"),
    [(1, 5, 61, 1), (1, 7, 125, 2), (1, 21, 61, 3), (2, 9, 64, 4), (2, 41, 61, 12)],
)
def test_zeros_around_the_image(
    target: str, batch: int, height: int, width: int, blocks: int, use_threads: Callable[[int], None]
) -> None:
    """Whatever was there before, in every chunk; blocks in parallel, or parts of them."""
    geometry = ConvGeometry(batch, 2, height, width, 3, (3, 3), padding=(1, 1, 1, 1))
    plan = winograd_plan(geometry, 4, cpu_facts(target))
    assert plan.layout.form == CHUNKS
    if plan.layout.lanes == 16:
        assert batch * plan.blocking.blocks == blocks
    data = np.random.default_rng(5).standard_normal((batch, 2, height, width)).astype(np.float32)
    arrays, inputs, output = kernel(geometry, 4, target)
    use_threads(2)
    result = run([in_tiles(data, plan.layout), *arrays], inputs, output, target)
    image = in_tiles(np.ones((batch, 3, height, width)), plan.layout)
    np.testing.assert_array_equal(result[image == 0], 0)
    want = in_tiles(reference.winograd(data, weights(geometry, 4, 0), geometry, 4), plan.layout)
    assert np.abs(result - want).max() < 50 * TOLERANCE[4] * np.abs(want).max()


@pytest.mark.parametrize("target", TARGETS[:1])
def test_an_image_that_is_fetched_ahead(target: str, use_threads: Callable[[int], None]) -> None:
    layers = geometries(1, 900, 1024, 3)
    assert is_far(CHANNELS[1] * winograd_plan(layers[1], 4, cpu_facts(target)).layout.length)
    check(layers, 4, target, use_threads)
