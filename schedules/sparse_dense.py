"""Sparse fully-connected layer: for every non-zero, its value times the input that it belongs to.

``out[n, k] = sum over e of values[e] * data[n, indices[e]]``, e over the non-zeros of row k. A single image is bound by
the weights, which come from memory once and are used once: a value and the narrowest index that reaches every input.
So what counts is to keep up with memory: non-zeros come in groups whose sums do not depend on each other, the operands
of a group are gathered where the CPU does that well, else loaded one by one, and all rows go over a segment of the
inputs that stays in L1 before they go over the next. With more images the vectors run over images instead, from a
transposed copy of the data.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import tvm
from tvm import te, tir

from .targets import CodeFeatures
from .vector_code import VectorCode

COLUMNS = "jointsparse.dense.columns"
OUTPUT = "jointsparse.dense.output"

GROUP = 8
"""Independent sums: what hides the latency of a multiply-add, and the lanes of a gather in AVX2."""

_INSERTED = 4
"""Lanes of a vector made of single loads: longer ones take more shuffles than they save multiply-adds."""

_BYTES_AHEAD = 2048
"""How far ahead weights are fetched: enough to be in time from memory, and past the ends of pages, where hardware
stops."""

_CHUNKS = 16
"""Into how many parts outputs are split to run in parallel."""

_MOST_VECTORS = 8
"""Of images at a time."""


@dataclass(frozen=True)
class DensePlan:
    """A fully-connected layer and how it is stored.

    Attributes:
        batch, inputs, outputs: (batch, inputs) to (batch, outputs).
        group: of the SparseRows.
        segment: inputs of a segment.
    """

    batch: int
    inputs: int
    outputs: int
    group: int
    segment: int

    @property
    def segments(self) -> int:
        return -(-self.inputs // self.segment)


@dataclass(frozen=True)
class ImageBlock:
    """Images computed at a time.

    Attributes:
        lanes: of a vector. vectors: of images.
    """

    lanes: int
    vectors: int

    @property
    def images(self) -> int:
        return self.lanes * self.vectors


def image_block(batch: int, lanes: int) -> ImageBlock:
    """The fewest blocks of at most _MOST_VECTORS vectors, evenly filled; no longer vectors than there are images."""
    lanes = min(lanes, 1 << (batch - 1).bit_length())
    vectors = -(-batch // lanes)
    blocks = -(-vectors // _MOST_VECTORS)
    return ImageBlock(lanes, -(-vectors // blocks))


def nonzero_group(batch: int, lanes: int) -> int:
    """Non-zeros to a group, so that there are about GROUP sums, over groups and vectors of images."""
    return max(1, GROUP // image_block(batch, lanes).vectors)


def segment_length(batch: int, inputs: int, l1: int) -> int:
    """Inputs of a segment: half of L1, all segments alike; of several images each input is read once anyway."""
    segments = -(-4 * inputs // (l1 // 2)) if batch == 1 else 1
    return -(-inputs // segments)


def sparse_dense(
    data: te.Tensor,
    values: te.Tensor,
    indices: te.Tensor,
    indptr: te.Tensor,
    plan: DensePlan,
    lanes: int,
    *,
    features: CodeFeatures,
) -> te.Tensor:
    """Multiply.

    Args:
        data: (batch, inputs) float32. values, indices, indptr: SparseRows of formats.pack_dense.
        lanes: of the target's vectors. features: of its code.

    Returns:
        (batch, outputs).
    """
    # No address is read from more than once.
    features = replace(features, gather=features.gather and plan.group == GROUP, hold_address=False)
    if plan.batch == 1:
        lanes = GROUP if features.gather else min(lanes, plan.group, _INSERTED)
        body = partial(_one_image, plan, lanes, features)
    else:
        block = image_block(plan.batch, lanes)
        data = _columns(data, plan, block)
        body = partial(_images, plan, block, features)
    return te.extern(
        (plan.batch, plan.outputs),
        [data, values, indices, indptr],
        lambda ins, outs: body(*ins, *outs),
        dtype="float32",
        name="output",
        tag=OUTPUT,
    )


def _columns(data: te.Tensor, plan: DensePlan, block: ImageBlock) -> te.Tensor:
    """(blocks, inputs, images of a block): what one weight multiplies lies together; zeros for missing images."""
    blocks = -(-plan.batch // block.images)

    def element(b: tir.Var, c: tir.Var, i: tir.Var) -> tir.PrimExpr:
        image = b * block.images + i
        return tir.if_then_else(image < plan.batch, data[image, c], tir.const(0, "float32"))

    return te.compute((blocks, plan.inputs, block.images), element, name="columns", tag=COLUMNS)


def _one_image(
    plan: DensePlan,
    lanes: int,
    features: CodeFeatures,
    data: tir.Buffer,
    values: tir.Buffer,
    indices: tir.Buffer,
    indptr: tir.Buffer,
    out: tir.Buffer,
) -> tir.Stmt:
    """The lanes are the non-zeros of a group."""
    ib = tvm.tir.ir_builder.create()
    code = VectorCode(ib, lanes, features=features)
    chunk = -(-plan.outputs // _CHUNKS)
    with (
        code.loop(-(-plan.outputs // chunk), "chunk", "parallel") as part,
        code.loop(plan.segments, "segment") as segment,
        code.loop(tir.min(chunk, plan.outputs - part * chunk), "k") as of_chunk,
    ):
        k, first = part * chunk + of_chunk, segment * plan.segment
        sums = code.array(-(-plan.group // lanes), "sums")
        for vector in sums:
            code.set(vector, code.splat(0.0))
        row = code.let(segment * plan.outputs + k)
        start = code.let(tir.BufferLoad(indptr, [row]))
        with ib.for_range(0, tir.BufferLoad(indptr, [row + 1]) - start, name="e") as e:
            for buffer in (values, indices):
                code.fetch(buffer, (start + e) * plan.group + _elements_ahead(buffer))
            for v, vector in enumerate(sums):
                at = (start + e) * plan.group + v * lanes
                place = code.load(indices, at).astype("int32" if lanes == 1 else f"int32x{lanes}")
                operand = _gathered(data, first, place) if features.gather else tir.BufferLoad(data, [0, first + place])
                code.set(vector, vector + code.load(values, at) * operand)
        total = _sum([element for vector in sums for element in _elements(vector, lanes)])
        before = tir.if_then_else(segment == 0, tir.const(0, "float32"), tir.BufferLoad(out, [0, k]))
        ib.emit(tir.BufferStore(out, before + total, [0, k]))
    return ib.get()


def _images(
    plan: DensePlan,
    block: ImageBlock,
    features: CodeFeatures,
    columns: tir.Buffer,
    values: tir.Buffer,
    indices: tir.Buffer,
    indptr: tir.Buffer,
    out: tir.Buffer,
) -> tir.Stmt:
    """The lanes are images; the weight is the same in all."""
    ib = tvm.tir.ir_builder.create()
    code = VectorCode(ib, block.lanes, features=features)
    with (
        ib.for_range(0, plan.outputs, name="k", kind="parallel") as k,
        ib.for_range(0, int(columns.shape[0]), name="b") as b,
    ):
        sums = code.array(plan.group * block.vectors, "sums")
        for vector in sums:
            code.set(vector, code.splat(0.0))
        start = code.let(tir.BufferLoad(indptr, [k]))
        with ib.for_range(0, tir.BufferLoad(indptr, [k + 1]) - start, name="e") as e:
            for buffer in (values, indices):
                code.fetch(buffer, (start + e) * plan.group + _elements_ahead(buffer))
            for g in range(plan.group):
                at = (start + e) * plan.group + g
                weight = code.splat(tir.BufferLoad(values, [at]))
                column = tir.BufferLoad(indices, [at]).astype("int32")
                for v in range(block.vectors):
                    vector = sums[v * plan.group + g]
                    code.set(vector, vector + weight * code.load(columns, b, column, v * block.lanes))
        for v in range(block.vectors):
            mine = sums[v * plan.group : (v + 1) * plan.group]
            code.set(mine[0], _sum(mine))
            for lane, element in enumerate(_elements(mine[0], block.lanes)):
                image = b * block.images + v * block.lanes + lane
                with ib.if_scope(image < plan.batch):
                    ib.emit(tir.BufferStore(out, element, [image, k]))
    return ib.get()


def _elements_ahead(buffer: tir.Buffer) -> int:
    return _BYTES_AHEAD // (tvm.DataType(buffer.dtype).bits // 8)


def _gathered(data: tir.Buffer, first: tir.PrimExpr, place: tir.PrimExpr) -> tir.PrimExpr:
    """Eight elements of the only image. TVM itself makes single loads of such an access, and LLVM leaves it at that."""
    every_lane = tir.reinterpret("float32x8", tir.Broadcast(tir.const(-1, "int32"), GROUP))
    return tir.call_llvm_pure_intrin(
        "float32x8",
        "llvm.x86.avx2.gather.d.ps.256",
        tir.const(5, "uint32"),
        tir.Broadcast(tir.const(0.0, "float32"), GROUP),
        tir.address_of(tir.BufferLoad(data, [0, first])),
        place,
        every_lane,
        tir.const(4, "int8"),
    )


def _elements(vector: tir.BufferLoad, lanes: int) -> list[tir.PrimExpr]:
    (index,) = vector.indices
    first = index.base if isinstance(index, tir.Ramp) else index
    return [tir.BufferLoad(vector.buffer, [first + lane]) for lane in range(lanes)]


def _sum(terms: list[tir.PrimExpr]) -> tir.PrimExpr:
    """In pairs, for accuracy and speed."""
    while len(terms) > 1:
        half = len(terms) // 2
        terms = [a + b for a, b in zip(terms[:half], terms[half : 2 * half], strict=True)] + terms[2 * half :]
    return terms[0]
