"""The machine that runs the tests, and targets that may be more than it has."""

from __future__ import annotations

import pytest
import tvm

HASWELL = "llvm -mcpu=haswell"
AVX512 = "llvm -mcpu=skylake-avx512"
HOST = f"llvm -mcpu={tvm.target.codegen.llvm_get_system_cpu()}"


def host_has(*features: str) -> bool:
    """Whether this CPU has all these features, by LLVM's names."""
    return bool(tvm.target.codegen.target_has_features(list(features), tvm.target.Target(HOST)))


TARGETS = [
    target for target, feature in ((HASWELL, "avx2"), (AVX512, "avx512bw"), ("llvm", "sse2")) if host_has(feature)
] or ["llvm"]
"""That this machine runs, of these."""

needs_avx2 = pytest.mark.skipif(not host_has("avx2", "fma"), reason="this machine has no AVX2")
