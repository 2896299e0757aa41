"""Pruning in the Winograd domain: what thresholds mean, how they are found, and how they are read."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jointsparse.schedules.winograd import transform
from jointsparse.schedules.winograd_pruning import WinogradPruning, dump, magnitudes, parse, separating_threshold

ENTRY = {"tile": 4, "origin": [0, 0], "threshold": 0.5, "weighted": True}


def filters(shape=(6, 5, 3, 3), seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("tile", "size"), [(2, 3), (4, 3), (2, 5), (4, 5)])
def test_entries_at_or_below_the_threshold_are_zero_and_the_others_untouched(tile, size, weighted):
    weight = filters((6, 5, size, size))
    winograd = transform(tile, size)
    dense = winograd.filters(weight)
    magnitude = np.abs(dense) * (winograd.importance() if weighted else 1)
    threshold = float(np.sort(magnitude, axis=None)[magnitude.size // 2])
    pruned = WinogradPruning(tile, threshold, weighted).filters(weight)
    assert np.array_equal(pruned == 0, magnitude <= threshold)
    assert np.array_equal(pruned[pruned != 0], dense[magnitude > threshold])


def test_zero_prunes_nothing():
    weight = filters()
    assert np.array_equal(WinogradPruning(4).filters(weight), transform(4, 3).filters(weight))


def test_one_threshold_for_each_output_channel():
    weight = filters((3, 4, 3, 3))
    pruned = WinogradPruning(2, (0.0, 1e9, 0.0), False).filters(weight)
    assert not pruned[1].any()
    assert pruned[0].all()
    assert pruned[2].all()
    with pytest.raises(ValueError, match="2 thresholds for 3 output channels"):
        WinogradPruning(2, (0.0, 1.0), False).filters(weight)


@given(hnp.arrays(np.float64, st.integers(2, 400), elements=st.integers(0, 12).map(float)), st.floats(0.0, 0.95))
@settings(deadline=None, max_examples=100)
def test_separating_threshold_never_touches_a_magnitude(values: np.ndarray, share: float) -> None:
    wanted = int(np.ceil(share * values.size))
    ordered = np.sort(values)
    if wanted == 0 or not ordered[-1]:
        assert separating_threshold(values, share) == 0
        return
    if ordered[wanted - 1] == ordered[-1]:
        with pytest.raises(ValueError, match="would be pruned"):
            separating_threshold(values, share)
        return
    threshold = separating_threshold(values, share)
    assert not (values == threshold).any()
    # As few as ties allow, but for the slack in which the widest gap is looked for.
    least = (values <= ordered[wanted - 1]).sum()
    assert wanted <= least <= (values <= threshold).sum() <= least + 1 + values.size // 1000


def test_separating_threshold_takes_the_widest_gap_nearby() -> None:
    values = np.r_[np.arange(5000.0), 5000.5 + np.arange(5000)]
    assert separating_threshold(values, 0.4995) == 4999.75
    assert separating_threshold(values, 0.4) == 3999.5


def test_threshold_lies_clear_of_every_magnitude() -> None:
    values = np.abs(np.random.default_rng(0).normal(size=10_000))
    for sparsity in (0.1, 0.5, 0.99):
        threshold = separating_threshold(values, sparsity)
        assert sparsity <= np.mean(values <= threshold) <= sparsity + 0.0012
        assert np.abs(values - threshold).min() > 1e-6
    assert separating_threshold(np.r_[2.0, np.ones(10), np.zeros(10)], 12 / 21) == 1.5


def test_scaled_filters_lose_the_same_entries() -> None:
    weight, scale = filters((4, 5, 3, 3)), np.array([0.1, -3.0, 1.0, 0.0])
    pruning = WinogradPruning(4, separating_threshold(magnitudes(weight, 4, True).ravel(), 0.6))
    kept = pruning.filters(weight) != 0
    scaled = pruning.scaled(scale).filters(weight * scale[:, None, None, None])
    assert np.array_equal(scaled[:3] != 0, kept[:3])
    assert not scaled[3].any()
    assert pruning.sparsity(weight) == np.mean(~kept)


def test_parse():
    text = json.dumps({"a.weight": ENTRY, "b.weight": ENTRY | {"tile": 2, "threshold": [0, 1.5], "weighted": False}})
    spec = {"a.weight": WinogradPruning(4, 0.5, True), "b.weight": WinogradPruning(2, (0.0, 1.5), False)}
    assert parse(text, "test") == spec
    assert parse(dump(spec), "test", {"a.weight": (8, 2, 3, 3), "b.weight": (2, 1, 5, 5)}) == spec


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({}, "no weight of the model"),
        ({"a.weight": (8, 2, 3, 1)}, "no Winograd form"),
        ({"a.weight": (8,)}, "no W"),
    ],
)
def test_a_weight_that_does_not_fit_is_refused(shapes, message):
    with pytest.raises(ValueError, match=message):
        parse({"a.weight": ENTRY}, "test", shapes)


def test_as_many_thresholds_as_output_channels():
    with pytest.raises(ValueError, match="or 3 of them"):
        parse({"a.weight": ENTRY | {"threshold": [0.1, 0.2]}}, "test", {"a.weight": (3, 2, 3, 3)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tile": 3}, "tile must be one of"),
        ({"tile": [2]}, "tile must be one of"),
        ({"origin": [1, 0]}, r"must start at \[0, 0\]"),
        ({"threshold": -1.0}, "finite number >= 0"),
        ({"threshold": []}, "finite number >= 0"),
        ({"threshold": "a"}, "finite number >= 0"),
        ({"threshold": float("nan")}, "finite number >= 0"),
        ({"weighted": 1}, "true or false"),
    ],
)
def test_a_malformed_entry_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message) as error:
        parse(json.dumps({"a.weight": ENTRY | change}), "test")
    assert "a.weight" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"a": 3}', '{"a": {"tile": 2}}'])
def test_what_is_no_attribute_is_refused(text):
    with pytest.raises(ValueError, match=r"jointsparse\.winograd"):
        parse(text, "test")
