"""Convolutions of every kind against float64, through relay.build: 324 different ones in a run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tvm
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.schedules.convolutions import AVX512, HASWELL, Case, check, direct_cases, host_has, winograd_cases

PER_LIBRARY = 6
"""Convolutions in one library; compiling one by one would take too long."""

TARGETS = [
    target for target, feature in ((HASWELL, "avx2"), (AVX512, "avx512bw"), ("llvm", "sse2")) if host_has(feature)
] or ["llvm"]

RANDOM = settings(
    max_examples=27,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def several(cases: st.SearchStrategy[Case]) -> st.SearchStrategy[list[Case]]:
    return st.lists(cases, min_size=PER_LIBRARY, max_size=PER_LIBRARY)


@pytest.fixture(autouse=True, scope="module")
def default_threads() -> Iterator[None]:
    yield
    _use_threads(0)


def _use_threads(count: int) -> None:
    tvm.get_global_func("runtime.config_threadpool")(0, count)


@given(cases=several(direct_cases()), target=st.sampled_from(TARGETS), threads=st.sampled_from([1, 2]))
@RANDOM
def test_direct(cases: list[Case], target: str, threads: int) -> None:
    _use_threads(threads)
    check(cases, target)


@given(cases=several(winograd_cases()), target=st.sampled_from(TARGETS), threads=st.sampled_from([1, 2]))
@RANDOM
def test_winograd(cases: list[Case], target: str, threads: int) -> None:
    _use_threads(threads)
    check(cases, target)
