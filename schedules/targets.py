"""What the schedules need to know of a CPU, as data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import tvm

STACK_BYTES = 1024
"""TVM keeps a buffer smaller than this on the stack, where LLVM can turn it into registers (kMaxStackAlloca)."""


@dataclass(frozen=True)
class CpuFacts:
    """Vector unit and cache of one core.

    Attributes:
        lanes: float32 lanes of a vector. registers: architectural vector registers.
        l1: bytes of first-level data cache. l2: bytes of second-level cache that one core has to itself.
    """

    lanes: int
    registers: int
    l1: int
    l2: int

    @property
    def accumulators(self) -> int:
        """Vectors to accumulate at once: three quarters of the registers (24 of 32, 12 of 16), as long as they fit
        into a buffer that stays on the stack."""
        return max(1, min(self.registers * 3 // 4, (STACK_BYTES - 1) // (4 * self.lanes)))


# (features, all of them needed; lanes; registers), best first.
_VECTOR_UNITS = (
    (("avx512f", "avx512bw"), 16, 32),
    (("avx2",), 8, 16),
    (("avx",), 8, 16),
    (("sse2",), 4, 16),
    (("neon", "d32"), 4, 16),  # 32-bit ARM, where two of its 32 registers make a vector
    (("neon",), 4, 32),
)

# By -mcpu, with - for _. Where cores of one name differ, the smaller; of a cache shared by cores, the share of one.
_L2_KIB = {
    "nehalem": 256,
    "westmere": 256,
    "sandybridge": 256,
    "ivybridge": 256,
    "core-avx-i": 256,
    "haswell": 256,
    "core-avx2": 256,
    "broadwell": 256,
    "skylake": 256,
    "cannonlake": 256,
    "skylake-avx512": 1024,
    "skx": 1024,
    "cascadelake": 1024,
    "cooperlake": 1024,
    "icelake-client": 512,
    "rocketlake": 512,
    "tigerlake": 1280,
    "icelake-server": 1280,
    "sapphirerapids": 2048,
    "emeraldrapids": 2048,
    "graniterapids": 2048,
    # Of the efficient cores, four to 2 MiB.
    "alderlake": 512,
    "raptorlake": 512,
    "meteorlake": 512,
    "znver1": 512,
    "znver2": 512,
    "znver3": 512,
    "znver4": 1024,
    "znver5": 1024,
    "cortex-a53": 128,
    "cortex-a55": 128,
    "cortex-a57": 512,
    "cortex-a72": 256,
    "cortex-a73": 256,
    "cortex-a75": 256,
    "cortex-a76": 256,
    "cortex-a77": 256,
    "cortex-a78": 256,
    "cortex-a710": 256,
    "cortex-x1": 512,
    "cortex-x2": 512,
    "neoverse-n1": 512,
    "neoverse-n2": 512,
    "neoverse-v1": 512,
    "neoverse-v2": 1024,
    "apple-m1": 1024,
}
_DEFAULT_L2_KIB = 512

# By -mcpu, where it is not the 32 KiB of most.
_L1_KIB = {
    "icelake-client": 48,
    "icelake-server": 48,
    "rocketlake": 48,
    "tigerlake": 48,
    "sapphirerapids": 48,
    "emeraldrapids": 48,
    "graniterapids": 48,
    "znver5": 48,
    "cortex-a76": 64,
    "cortex-a77": 64,
    "cortex-a78": 64,
    "neoverse-n1": 64,
    "neoverse-n2": 64,
    "neoverse-v1": 64,
    "neoverse-v2": 64,
    "cortex-x1": 64,
    "cortex-x2": 64,
    "apple-m1": 64,
}
_DEFAULT_L1_KIB = 32


def cpu_facts(target: tvm.target.Target | str | None = None) -> CpuFacts:
    """Facts of a target's CPU; of the current target, or plain ``llvm``, when None."""
    return _facts(str(_resolve(target)))


@cache
def _facts(text: str) -> CpuFacts:
    """Of the target that this describes: LLVM takes a millisecond to tell its features, and cost models ask often."""
    target = tvm.target.Target(text)
    lanes, registers = _vector_unit(target)
    name = str(target.attrs.get("mcpu", "")).replace("_", "-")
    l1, l2 = _L1_KIB.get(name, _DEFAULT_L1_KIB), _L2_KIB.get(name, _DEFAULT_L2_KIB)
    return CpuFacts(lanes, registers, 1024 * l1, 1024 * l2)


@dataclass(frozen=True)
class CodeFeatures:
    """What kernels may have the code generator do beyond loads, stores and arithmetic. By default nothing, as of source
    code in C.

    Attributes:
        fetch: fetch ahead.
        align_frame: align a function's frame on the stack to whole vectors.
        gather: AVX2's gather, worth its while by LLVM's tables. For a CPU whose microcode has slowed gathers down
            since, ``-mattr=-fast-gather`` says so.
        hold_address: give an address a register of its own, where multiply-adds are the better for it.
        embed_broadcast: have multiply-adds broadcast a number in memory themselves.
    """

    fetch: bool = False
    align_frame: bool = False
    gather: bool = False
    hold_address: bool = False
    embed_broadcast: bool = False


PLAIN_CODE = CodeFeatures()

_OPAQUE_POINTERS = 15  # the LLVM that reads `ptr`, in what kernels bring along in its language


def code_features(target: tvm.target.Target | str | None = None) -> CodeFeatures:
    """Of a target; of the current target, or plain ``llvm``, when None."""
    resolved = _resolve(target)
    if resolved.kind.name != "llvm":
        return PLAIN_CODE
    reads_ptr = tvm.target.codegen.llvm_version_major() >= _OPAQUE_POINTERS

    def has(*features: str) -> bool:
        return bool(tvm.target.codegen.target_has_features(list(features), resolved))

    return CodeFeatures(
        fetch=True,
        align_frame=reads_ptr,
        gather=has("avx2", "fast-gather"),
        hold_address=reads_ptr and has("avx", "fma"),
        embed_broadcast=reads_ptr and has("avx512f", "avx512bw"),
    )


# Beginnings of -mtriple. Sparse Winograd loads several indices as one number.
_BIG_ENDIAN = ("aarch64_be", "armeb", "thumbeb", "mips-", "mips64-", "powerpc-", "powerpc64-", "s390x", "sparc")


def why_not_target(target: tvm.target.Target | str) -> str | None:
    """Why the sparse operators cannot be compiled for a target, or None if they can."""
    resolved = _resolve(target)
    if "cpu" not in resolved.keys:
        return f"no sparse schedule for target kind {resolved.kind.name}"
    triple = str(resolved.attrs.get("mtriple", ""))
    if triple.startswith(_BIG_ENDIAN):
        return f"no sparse schedule for big-endian CPUs, {triple}"
    return None


def _resolve(target: tvm.target.Target | str | None) -> tvm.target.Target:
    if target is None:
        target = tvm.target.Target.current(allow_none=True) or "llvm"
    return tvm.target.Target(target)


def _vector_unit(target: tvm.target.Target) -> tuple[int, int]:
    if target.kind.name != "llvm":
        return 1, 16  # source code generators know no vectors
    for features, lanes, registers in _VECTOR_UNITS:
        if tvm.target.codegen.target_has_features(list(features), target):
            return lanes, registers
    return 4, 16
