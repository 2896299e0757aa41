"""Convolutions that read and write images NCHW, against the same through conversions of layout: bit for bit, and with
nothing read or written beside an image."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import tvm
from numpy.typing import NDArray
from tvm import relay, te, tir
from tvm.contrib import graph_executor

from jointsparse.passes.absorb_conversions import AbsorbConversions
from jointsparse.passes.absorb_epilogues import AbsorbEpilogues
from jointsparse.passes.keep_tiles import KeepTiles
from jointsparse.schedules import sparse_winograd, vector_code
from jointsparse.schedules.constructors import conv2d_sparse_winograd
from jointsparse.schedules.convolution_buffers import Arguments
from jointsparse.schedules.epilogues import Activation
from jointsparse.schedules.geometry import ConvGeometry
from jointsparse.schedules.targets import code_features, cpu_facts
from jointsparse.schedules.tile_images import ImageEnds, Images, why_not_images
from jointsparse.schedules.tiles import TileLayout
from jointsparse.schedules.vector_code import VectorCode
from jointsparse.schedules.winograd import transform
from jointsparse.schedules.winograd_plan import WinogradPlan, winograd_plan
from tests.host import TARGETS

SIZES = ((56, 56), (64, 64), (63, 64), (13, 112), (7, 128), (6, 256), (30, 24), (2, 200))
"""Heights and widths: rows of whole vectors, and half a vector more; of one chunk, of whole ones, of a part more."""


def geometry_of(height: int, width: int, kernel: int, batch: int = 1) -> ConvGeometry:
    return ConvGeometry(batch, 3, height, width, 5, (kernel, kernel), padding=(kernel // 2,) * 4)


def modules(geometry: ConvGeometry, tile: int, target: str) -> tuple[tvm.IRModule, tvm.IRModule]:
    """A convolution with all that may follow it: through conversions, and without. Its input is x, its residual r."""
    rng = np.random.default_rng(3)
    dense = transform(tile, geometry.kernel[0]).filters(rng.standard_normal(geometry.weight_shape))
    dense[rng.random(dense.shape) < 0.5] = 0
    shape = (geometry.batch, geometry.in_channels, geometry.in_height, geometry.in_width)
    x = relay.var("x", shape=shape)
    y = conv2d_sparse_winograd(x, dense.astype(np.float32), geometry, tile, target)
    y = relay.nn.bias_add(y, relay.const(rng.standard_normal(geometry.out_channels).astype(np.float32)))
    r = relay.var("r", shape=geometry.out_shape)
    body = relay.Function([x, r], relay.nn.leaky_relu(relay.add(y, r), 0.1))
    through = KeepTiles()(AbsorbEpilogues()(tvm.IRModule.from_expr(body)))
    return through, AbsorbConversions()(through)


def build(mod: tvm.IRModule, target: str) -> graph_executor.GraphModule:
    with tvm.transform.PassContext(opt_level=3):
        library = relay.build(mod, target=target)
    return graph_executor.GraphModule(library["default"](tvm.cpu()))


def run(
    executor: graph_executor.GraphModule, data: NDArray[np.float32], residual: NDArray[np.float32]
) -> NDArray[np.float32]:
    executor.set_input("x", data)
    executor.set_input("r", residual)
    executor.run()
    return executor.get_output(0).numpy()


def data_of(geometry: ConvGeometry) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Input and residual."""
    shape = (geometry.batch, geometry.in_channels, geometry.in_height, geometry.in_width)
    rng = np.random.default_rng(4)
    return rng.standard_normal(shape).astype(np.float32), rng.standard_normal(geometry.out_shape).astype(np.float32)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("tile", "kernel", "sizes"), [(2, 3, 0), (4, 3, 1), (2, 5, 2), (4, 5, 0), (4, 3, 2)])
def test_the_same_as_through_conversions(
    tile: int, kernel: int, sizes: int, target: str, use_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with an image far away, of which the rows behind are fetched; and with pixels that are no numbers, which
    must spoil what they spoil through conversions and nothing else."""
    absorbed = 0
    for number, (height, width) in enumerate(SIZES[sizes::3]):
        geometry = geometry_of(height, width, kernel, batch=1 + number % 2)
        monkeypatch.setattr(vector_code, "_FAR", (0, 1 << 40)[number % 2])
        through, without = modules(geometry, tile, target)
        if why_not_images(winograd_plan(geometry, tile, cpu_facts(target))) is not None:
            assert tvm.ir.structural_equal(through, without)
            continue
        absorbed += 1
        assert "tiles" not in str(without), "no conversion is left"
        data, residual = data_of(geometry)
        both = [build(mod, target) for mod in (through, without)]
        for threads in (1, 2):
            use_threads(threads)
            want, got = (run(executor, data, residual) for executor in both)
            np.testing.assert_array_equal(got, want)
        for y, x in ((0, 0), (height - 1, width - 1), (height // 2, width - 1), (height - 1, min(63, width // 2))):
            spoilt = data.copy()
            spoilt[0, 1, y, x] = (np.nan, np.inf)[y % 2]
            want, got = (run(executor, spoilt, residual) for executor in both)
            assert not np.isfinite(want).all()
            np.testing.assert_array_equal(got, want)
    assert absorbed or target == "llvm"


@pytest.mark.parametrize(
    ("height", "width", "tile", "target", "reason"),
    [
        (56, 56, 4, "llvm -mcpu=skylake-avx512", None),
        (56, 56, 4, "llvm -mcpu=haswell", None),
        (720, 1280, 4, "llvm -mcpu=skylake-avx512", None),
        (60, 60, 4, "llvm -mcpu=skylake-avx512", "rows are not whole vectors"),
        (240, 248, 4, "llvm -mcpu=skylake-avx512", "rows are not whole vectors"),
        (28, 28, 4, "llvm -mcpu=skylake-avx512", "tiles are not in chunks"),
        (64, 64, 4, "llvm", "vectors are too short"),
    ],
)
def test_where_it_is_possible(height: int, width: int, tile: int, target: str, reason: str | None) -> None:
    assert why_not_images(winograd_plan(geometry_of(height, width, 3), tile, cpu_facts(target))) == reason


def test_shapes() -> None:
    plan = winograd_plan(geometry_of(56, 64, 3, batch=2), 4, cpu_facts("llvm -mcpu=skylake-avx512"))
    tiles = plan.layout.length
    assert ImageEnds().data_shape(plan) == (2, 3, tiles)
    assert ImageEnds().result_shape(plan) == (2, 5, tiles)
    assert ImageEnds(nchw_data=True).data_shape(plan) == (2, 3, 56, 64)
    assert ImageEnds(nchw_data=True).result_shape(plan) == (2, 5, tiles)
    assert ImageEnds(nchw_result=True).result_shape(plan) == (2, 5, 56, 64)


def guarded(shape: tuple[int, ...], at_end: bool) -> NDArray[np.float32]:
    """An array between two pages that nobody may touch, which begins or ends where its page does."""
    size, page = 4 * int(np.prod(shape)), mmap.PAGESIZE
    inside = -(-size // page) * page
    memory = mmap.mmap(-1, inside + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for start in (address, address + page + inside):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start), page, 0) == 0
    offset = page + (inside - size if at_end else 0)
    return np.frombuffer(memory, np.float32, size // 4, offset).reshape(shape)


def touch_the_ends(target: str) -> None:
    """Run between guarded pages; a process that reads or writes beside its images does not survive it."""
    touched = 0
    for height, width in SIZES[:6]:
        geometry = geometry_of(height, width, 5, batch=2)
        if why_not_images(winograd_plan(geometry, 4, cpu_facts(target))) is not None:
            continue
        touched += 1
        through, without = modules(geometry, 4, target)
        want, executor = run(build(through, target), *data_of(geometry)), build(without, target)
        for at_end in (False, True):
            result = guarded(want.shape, at_end)
            # Held here: the executor only knows where they are.
            inputs = {name: guarded(one.shape, at_end) for name, one in zip("xr", data_of(geometry), strict=True)}
            for (name, data), one in zip(inputs.items(), data_of(geometry), strict=True):
                data[...] = one
                executor.set_input_zero_copy(name, tvm.nd.from_dlpack(data))
            executor.set_output_zero_copy(0, tvm.nd.from_dlpack(result))
            executor.run()
            np.testing.assert_array_equal(result, want)
    assert touched


@pytest.mark.skipif(sys.platform == "win32", reason="guards pages by mprotect")
@pytest.mark.parametrize("target", [target for target in TARGETS if target != "llvm"])
def test_nothing_beside_an_image_is_touched(target: str) -> None:
    call = f"from tests.schedules.test_tile_images import touch_the_ends; touch_the_ends({target!r})"
    subprocess.run([sys.executable, "-c", call], check=True)


def test_images_where_it_is_impossible_are_refused() -> None:
    plan = winograd_plan(geometry_of(28, 28, 3), 4, cpu_facts("llvm -mcpu=skylake-avx512"))
    arguments = Arguments(
        **{
            name: te.placeholder((1,), name=name, dtype=dtype)
            for name, dtype in (("data", "float32"), ("values", "float32"), ("indices", "int32"), ("bias", "float32"))
        },
        indptr=te.placeholder((1,), name="indptr", dtype="int32"),
    )
    with pytest.raises(ValueError, match="images NCHW: tiles are not in chunks"):
        sparse_winograd.sparse_winograd(
            arguments, plan=plan, activation=Activation(), ends=ImageEnds(nchw_result=True), features=code_features()
        )


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("vector", [0, 16])
def test_what_is_fetched_is_what_the_next_block_reads(size: int, vector: int) -> None:
    """But for the first rows of its tiles."""
    geometry = ConvGeometry(1, 1, 64, 256, 1, (size, size), padding=(size // 2,) * 4)
    layout, reach, vectors = WinogradPlan.of(geometry, 4, 16, 32, 4).layout, size // 2, 2
    first = 6 * (layout.cols // layout.lanes)
    fetched = _touched(layout, first, vectors, vector, reach)[0]
    read = _touched(layout, first + vectors, vectors, vector, reach)[1]
    top = 6 * layout.m
    own = {(row, column) for row, column in read if row not in range(top, top + reach)}
    # Vectors beside the tiles are read for a column or two of theirs.
    left, right = min(column for _, column in fetched), max(column for _, column in fetched)
    assert right - left == 3 * layout.lanes
    assert fetched == {(row, column) for row, column in own if left <= column <= right}
    assert {row for row, _ in fetched} == {*range(top - reach, top), *range(top + reach, top + layout.m + reach)}


def _touched(
    layout: TileLayout, first: int, vectors: int, vector: int, reach: int
) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """(row, column) where a vector of a block fetches, and where it loads."""
    simplify = tvm.arith.Analyzer().simplify
    fetched: set[tuple[int, int]] = set()
    loaded: set[tuple[int, int]] = set()
    code = VectorCode(tvm.tir.ir_builder.create(), layout.lanes, features=code_features())
    # All is constant here: no variable in between.
    code.let = lambda value: value  # type: ignore[method-assign]
    code.fetch = lambda _, *index: fetched.add((int(simplify(index[2])), int(simplify(index[3]))))  # type: ignore
    buffer = tir.decl_buffer((1, 1, layout.height, layout.width))
    zero, one = tir.const(0, "int32"), tir.const(vector, "int32")
    pixels = Images(code, layout, tir.const(first, "int32"), vectors, fetch=True).reader(buffer, zero, zero)(one, reach)

    def visit(node: object) -> None:
        if isinstance(node, tir.BufferLoad) and node.buffer.same_as(buffer):
            loaded.add((int(simplify(node.indices[2])), int(simplify(node.indices[3].base))))

    for row in range(-reach, layout.m + reach):
        for number in pixels.loaded:
            tir.stmt_functor.post_order_visit(tir.Evaluate(pixels.load(row, number)), visit)
    return fetched, loaded
