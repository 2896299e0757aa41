"""What LLVM makes of a frame that is to be aligned."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tvm
from tvm import relay, te, tir

from jointsparse.schedules.aligned_stack import align_stack
from jointsparse.schedules.constructors import conv2d_sparse_winograd
from jointsparse.schedules.geometry import ConvGeometry
from tests.host import AVX512, HASWELL

VECTOR = {HASWELL: 32, AVX512: 64}

pytestmark = pytest.mark.skipif(
    tvm.target.codegen.llvm_version_major() < 15, reason="this LLVM does not read what aligns the stack"
)


def aligned_to(assembly: str) -> set[int]:
    """Bytes that frames are aligned to, of AT&T assembly."""
    return {int(one) for one in re.findall(r"andq\s+\$-(\d+), %rsp", assembly)}


@pytest.mark.parametrize("target", VECTOR)
def test_two_kernels_of_a_library_spill_whole_vectors_into_lines(target: str) -> None:
    geometry = ConvGeometry(1, 4, 30, 64, 4, (5, 5), padding=(2, 2, 2, 2))
    x = relay.var("x", shape=(1, 4, 30, 64))
    y = relay.sigmoid(conv2d_sparse_winograd(x, np.ones((4, 4, 8, 8), np.float32), geometry, 4, target))
    y = conv2d_sparse_winograd(y, np.ones((4, 4, 6, 6), np.float32), ConvGeometry(
        1, 4, 30, 64, 4, (3, 3), padding=(1, 1, 1, 1)), 4, target)  # fmt: skip
    with tvm.transform.PassContext(opt_level=3):
        assembly = relay.build(tvm.IRModule.from_expr(y), target=target).lib.get_source("asm")
    assert VECTOR[target] in aligned_to(assembly)
    register = {32: "ymm", 64: "zmm"}[VECTOR[target]]
    assert len(re.findall(rf"vmovaps\s+%{register}\d+, \d*\(%rsp\)", assembly)) > 20


@pytest.mark.parametrize(("alignment", "target"), [(16, AVX512), (32, HASWELL), (64, AVX512)])
def test_alone(alignment: int, target: str) -> None:
    """Nothing but the frame changes; 16 bytes it always has."""

    def emit(ins: list[tir.Buffer], outs: list[tir.Buffer]) -> tir.Stmt:
        ib = tvm.tir.ir_builder.create()
        align_stack(ib, alignment)
        ib.emit(tir.BufferStore(outs[0], ins[0].vload([0]) + 1, [0]))
        return ib.get()

    data = te.placeholder((1,), name="data")
    result = te.extern([(1,)], [data], emit, dtype="float32")
    assembly = tvm.build(te.create_schedule(result.op), [data, result], target).get_source("asm")
    assert aligned_to(assembly) == ({alignment} if alignment > 16 else set())
    assert "jointsparse_align_stack" not in assembly
