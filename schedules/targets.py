"""What the schedules need to know of a CPU, as data."""

from __future__ import annotations

from dataclasses import dataclass

import tvm

STACK_BYTES = 1024
"""TVM keeps a buffer smaller than this on the stack, where LLVM can turn it into registers (kMaxStackAlloca)."""


@dataclass(frozen=True)
class CpuFacts:
    """Vector unit and caches of one core.

    Attributes:
        lanes: float32 lanes of a vector. registers: architectural vector registers.
        l1, l2: data cache bytes that one core has to itself.
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


_KIB = 1024

# (features, all of them needed; lanes; registers), best first.
_VECTOR_UNITS = (
    (("avx512f", "avx512bw"), 16, 32),
    (("avx2",), 8, 16),
    (("avx",), 8, 16),
    (("sse2",), 4, 16),
    (("neon",), 4, 32),
)

# -mcpu: (L1 data, L2). Where cores of one name differ, the smaller.
_CACHES = {
    "haswell": (32 * _KIB, 256 * _KIB),
    "broadwell": (32 * _KIB, 256 * _KIB),
    "skylake": (32 * _KIB, 256 * _KIB),
    "skylake-avx512": (32 * _KIB, 1024 * _KIB),
    "cascadelake": (32 * _KIB, 1024 * _KIB),
    "icelake-client": (48 * _KIB, 512 * _KIB),
    "icelake-server": (48 * _KIB, 1280 * _KIB),
    "sapphirerapids": (48 * _KIB, 2048 * _KIB),
    "emeraldrapids": (48 * _KIB, 2048 * _KIB),
    "alderlake": (48 * _KIB, 1280 * _KIB),
    "znver1": (32 * _KIB, 512 * _KIB),
    "znver2": (32 * _KIB, 512 * _KIB),
    "znver3": (32 * _KIB, 512 * _KIB),
    "znver4": (32 * _KIB, 1024 * _KIB),
    "cortex-a53": (32 * _KIB, 128 * _KIB),
    "cortex-a55": (32 * _KIB, 128 * _KIB),
    "cortex-a72": (32 * _KIB, 256 * _KIB),
    "cortex-a76": (64 * _KIB, 256 * _KIB),
    "neoverse-n1": (64 * _KIB, 512 * _KIB),
}
_DEFAULT_CACHES = (32 * _KIB, 512 * _KIB)


def cpu_facts(target: tvm.target.Target | str | None = None) -> CpuFacts:
    """Facts of a target's CPU; of the current target, or plain ``llvm``, when None."""
    resolved = _resolve(target)
    lanes, registers = _vector_unit(resolved)
    l1, l2 = _CACHES.get(str(resolved.attrs.get("mcpu", "")), _DEFAULT_CACHES)
    return CpuFacts(lanes, registers, l1, l2)


def why_not_target(target: tvm.target.Target | str) -> str | None:
    """Why the sparse operators cannot be compiled for a target, or None if they can."""
    resolved = _resolve(target)
    if "cpu" not in resolved.keys:
        return f"no sparse schedule for target kind {resolved.kind.name}"
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
