"""Facts of targets, and what is compiled for them."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
import tvm
from tvm import relay

from jointsparse.schedules.constructors import conv2d_sparse_direct, conv2d_sparse_winograd
from jointsparse.schedules.direct_plan import direct_plan
from jointsparse.schedules.geometry import ConvGeometry
from jointsparse.schedules.targets import _L1_KIB, _L2_KIB, STACK_BYTES, code_features, cpu_facts, why_not_target
from jointsparse.schedules.winograd import transform
from jointsparse.schedules.winograd_plan import winograd_plan

LAYER = ConvGeometry(1, 64, 56, 56, 64, (3, 3), padding=(1, 1, 1, 1))
DEEP = ConvGeometry(1, 256, 14, 14, 16, (3, 3), padding=(1, 1, 1, 1))
"""Few vectors at once; Winograd has rows of weights side by side for that."""

X86 = {
    "llvm -mtriple=x86_64-linux-gnu": (4, 16, "xmm"),
    "llvm -mtriple=x86_64-linux-gnu -mcpu=haswell": (8, 16, "ymm"),
    "llvm -mtriple=x86_64-linux-gnu -mcpu=skylake-avx512": (16, 32, "zmm"),
    "llvm -mtriple=x86_64-linux-gnu -mcpu=sapphirerapids": (16, 32, "zmm"),
    "llvm -mtriple=x86_64-linux-gnu -mcpu=znver3": (8, 16, "ymm"),
    "llvm -mtriple=x86_64-linux-gnu -mcpu=x86-64 -mattr=+avx2,+fma": (8, 16, "ymm"),
}
ARM = "llvm -mtriple=aarch64-linux-gnu -mattr=+neon"
"""-mcpu=cortex-a72 gives the same lanes."""
ARM32 = "llvm -mtriple=armv7-linux-gnueabihf -mattr=+neon"


@cache
def library(target: str, tile: int = 0, geometry: ConvGeometry = LAYER) -> tvm.runtime.Module:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(geometry.weight_shape).astype(np.float32)
    x = relay.var("x", shape=(1, geometry.in_channels, geometry.in_height, geometry.in_width))
    if tile:
        filters = transform(tile, 3).filters(weight).astype(np.float32)
        y = conv2d_sparse_winograd(x, filters, geometry, tile, target)
    else:
        y = conv2d_sparse_direct(x, weight, geometry, target)
    with tvm.transform.PassContext(opt_level=3):
        return relay.build(tvm.IRModule.from_expr(relay.Function([x], y)), target).get_lib()


def assembly(target: str, tile: int = 0, geometry: ConvGeometry = LAYER) -> str:
    return library(target, tile, geometry).get_source("asm")


def innermost_loops(text: str) -> list[str]:
    """From a label to the jump back to it, without another jump between."""
    loops, label, body = [], "", []
    for line in text.splitlines():
        words = line.split()
        if re.match(r"\.LBB\w+:", line):
            label, body = line.split(":")[0], []
        elif words and words[0].startswith("j"):
            if words[-1] == label:
                loops.append("\n".join(body))
            label, body = "", []
        body.append(line)
    return loops


@pytest.mark.parametrize("target", X86)
def test_vector_units(target: str) -> None:
    facts = cpu_facts(target)
    assert (facts.lanes, facts.registers) == X86[target][:2]
    assert facts.accumulators * facts.lanes * 4 < STACK_BYTES


def test_arm_and_source_targets() -> None:
    assert (cpu_facts(ARM).lanes, cpu_facts(ARM).registers, cpu_facts(ARM).accumulators) == (4, 32, 24)
    for target in (ARM32, "llvm -mtriple=armv7l-linux-gnueabihf -mcpu=cortex-a9"):
        facts = cpu_facts(target)
        assert (facts.lanes, facts.registers, facts.accumulators) == (4, 16, 12)
    assert cpu_facts("c").lanes == 1


@pytest.mark.parametrize(
    ("target", "l1", "l2"),
    [
        ("llvm -mtriple=aarch64-linux-gnu -mcpu=cortex-a72", 32, 256),
        ("llvm -mtriple=aarch64-linux-gnu -mcpu=neoverse-v2", 64, 1024),
        ("llvm -mcpu=haswell", 32, 256),
        ("llvm -mcpu=icelake-server", 48, 1280),
        ("llvm -mcpu=icelake_server", 48, 1280),
        ("llvm -mcpu=x86-64-v3", 32, 512),
        ("llvm", 32, 512),
    ],
)
def test_caches(target: str, l1: int, l2: int) -> None:
    facts = cpu_facts(target)
    assert (facts.l1, facts.l2) == (l1 * 1024, l2 * 1024)


def test_every_cpu_of_the_table_is_known_to_llvm() -> None:
    known = {
        str(name)
        for triple in ("x86_64-linux-gnu", "aarch64-linux-gnu")
        for name in tvm.target.codegen.llvm_get_cpu_archlist(tvm.target.Target(f"llvm -mtriple={triple}"))
    }
    # An alias that LLVM takes and does not list.
    assert (set(_L1_KIB) | set(_L2_KIB)) - known <= {"apple-m1"}


@pytest.mark.parametrize("target", ["opencl", "vulkan", "metal"])
def test_targets_without_schedules(target: str) -> None:
    assert target in str(why_not_target(target))


def test_no_schedule_for_big_endian_cpus() -> None:
    assert "aarch64_be-linux-gnu" in str(why_not_target("llvm -mtriple=aarch64_be-linux-gnu -mattr=+neon"))
    assert why_not_target("llvm -mtriple=aarch64-linux-gnu -mattr=+neon") is None


@pytest.mark.parametrize("target", [t for t in X86 if "haswell" in t or "sapphire" in t])
@pytest.mark.parametrize("tile", [0, 4], ids=["direct", "winograd"])
@pytest.mark.parametrize("geometry", [LAYER, DEEP], ids=["wide", "deep"])
def test_products_are_multiply_adds_from_memory_into_registers(target: str, tile: int, geometry: ConvGeometry) -> None:
    """A loop of broadcasts and nothing but multiply-adds with an operand in memory, whose address is in one register.
    No accumulator goes to memory. Of AVX-512 a multiply-add with a single vector broadcasts itself.

    That of Winograd fetches a line of weights ahead, multiplies no index, has none in a vector, and shifts them only to
    take them out of the one load of a row.
    """
    facts, register = cpu_facts(target), X86[target][2]
    if tile:
        blocking = winograd_plan(geometry, tile, facts).blocking
        vectors, broadcasts = blocking.vectors, blocking.together
    else:
        plan = direct_plan(geometry, facts)
        vectors, broadcasts = plan.panel_vectors, plan.together
    embedded = bool(tile) and vectors == 1 and code_features(target).embed_broadcast
    in_one_register = r"-?\d*\(%\w+\)"
    place = in_one_register + (r"\{1to16\}" if embedded else "")
    multiply_add = re.compile(rf"vfmadd(?:132|231)ps\s+{place}, %{register}\d+, %{register}\d+")
    inner = [
        loop
        for loop in innermost_loops(assembly(target, tile, geometry))
        if (weights := len(multiply_add.findall(loop)) / vectors)
        and weights % broadcasts == 0
        and loop.count("vbroadcastss") == (0 if embedded else weights)
        and not re.search(rf"vmov\w*\s+%{register}\d+, .*\(", loop)
        and (not tile or ("prefetch" in loop and not re.search(r"\b(shl|sa[lr]|imul|vpextr|vmov[dq]\b)", loop)))
        and len(re.findall(r"\bshr", loop)) <= (weights if broadcasts in (2, 4) else 0)
    ]
    assert inner


@pytest.mark.parametrize("target", [t for t in X86 if "haswell" in t or "sapphire" in t])
@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("geometry", [LAYER, DEEP], ids=["wide", "deep"])
def test_vectors_in_between_are_on_the_stack(target: str, tile: int, geometry: ConvGeometry) -> None:
    """Of the runtime only large buffers are asked for. Small arrays from there, not on the stack, once made kernels 1.5
    times slower."""
    code = library(target, tile, geometry).get_source("ll")
    calls = re.findall(r"call \S+ %\w+\(i32 (?:noundef )?1, i32 .*?, i64 (?:noundef )?(\d+),", code)
    assert len(calls) >= 2
    assert min(int(size) for size in calls) >= STACK_BYTES


@pytest.mark.parametrize("tile", [0, 4], ids=["direct", "winograd"])
@pytest.mark.parametrize(
    ("target", "multiply_add"),
    [(ARM, r"fmla\s+v\d+\.4s, v\d+\.4s, v\d+\."), (ARM32, r"vm(la|ul)\.f32\s+q\d+, q\d+, [qd]\d+")],
    ids=["64 bits", "32 bits"],
)
def test_arm_code_is_vector_code(target: str, multiply_add: str, tile: int) -> None:
    assert re.search(multiply_add, assembly(target, tile, ConvGeometry(1, 8, 20, 20, 8, (3, 3))))


def test_formats_and_geometry_need_no_tvm() -> None:
    program = (
        "import sys\n"
        "from jointsparse.schedules import ConvGeometry, pack_winograd, transform\n"
        "from jointsparse.schedules import blocking, direct_plan, formats\n"
        "assert 'tvm' not in sys.modules and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
