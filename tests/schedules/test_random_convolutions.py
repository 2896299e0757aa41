"""Convolutions of every kind against float64, through relay.build: at least 300 different ones in a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from jointsparse.schedules.direct_plan import direct_plan
from jointsparse.schedules.geometry import ConvGeometry
from jointsparse.schedules.targets import cpu_facts
from jointsparse.schedules.tile_images import why_not_images
from jointsparse.schedules.tiles import FORMS
from jointsparse.schedules.winograd_plan import winograd_plan
from tests.host import TARGETS
from tests.schedules.convolutions import (
    Case,
    check,
    direct_case,
    weights_of,
    winograd_case,
)

PER_LIBRARY = 6
"""Convolutions in one library, the last of them large; compiling one by one would take too long."""

AT_LEAST = 150
"""Different geometries that each test must have run."""

RANDOM = settings(
    max_examples=26,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def test_direct(use_threads: Callable[[int], None]) -> None:
    _check_many(direct_case, use_threads)


def test_winograd(use_threads: Callable[[int], None]) -> None:
    seen = _check_many(winograd_case, use_threads)
    kinds = Counter((case.geometry.kernel, case.tile) for case, _ in seen)
    assert len(kinds) == 4
    assert min(kinds.values()) >= 20
    plans = [winograd_plan(case.geometry, case.tile, cpu_facts(target)) for case, target in seen]
    forms = Counter(plan.layout.form for plan in plans)
    assert set(forms) == set(FORMS)
    assert min(forms.values()) >= 15
    assert sum(why_not_images(plan) is None for plan in plans) >= 10


def _check_many(draw_case: Callable[..., Case], use_threads: Callable[[int], None]) -> list[tuple[Case, str]]:
    """Draw, build and compare; then see that what was drawn is as varied as it should be."""
    seen: dict[ConvGeometry, tuple[Case, str]] = {}

    @RANDOM
    @given(
        seed=st.integers(0, 2**32 - 1),
        target=st.sampled_from(TARGETS),
        threads=st.sampled_from([1, 2]),
    )
    def run(seed: int, target: str, threads: int) -> None:
        rng = np.random.default_rng(seed)
        cases = [draw_case(rng, large=i == PER_LIBRARY - 1) for i in range(PER_LIBRARY)]
        # Hypothesis may repeat a seed with another target: that would be the same convolutions again.
        assume(seen.keys().isdisjoint(case.geometry for case in cases))
        use_threads(threads)
        check(cases, target)
        # Only now: shrinking runs failures again.
        seen.update({case.geometry: (case, target) for case in cases})

    run()
    assert len(seen) >= AT_LEAST
    assert sum(weights_of(case).any() for case, _ in seen.values()) > 0.9 * len(seen)
    blocks = [_blocks(case, target) for case, target in seen.values()]
    assert sum(number > 1 for number in blocks) >= 10
    # Blocks run in parallel from 4 on; with fewer, parts of their channels and filters.
    assert sum(number == 1 for number in blocks) >= 10
    assert sum(1 < number < 4 for number in blocks) >= 10
    assert sum(number >= 4 for number in blocks) >= 5
    return list(seen.values())


def _blocks(case: Case, target: str) -> int:
    """Of all images."""
    facts = cpu_facts(target)
    if case.tile:
        return winograd_plan(case.geometry, case.tile, facts).all_blocks
    return direct_plan(case.geometry, facts).all_blocks
