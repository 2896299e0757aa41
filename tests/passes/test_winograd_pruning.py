"""Thresholds in the Winograd domain: what they mean, and how they are read."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jointsparse.passes.winograd_pruning import WinogradThreshold, global_threshold, parse_thresholds
from jointsparse.schedules.winograd import transform

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
    pruned = WinogradThreshold(tile, (threshold,), weighted).weights(weight)
    assert np.array_equal(pruned == 0, magnitude <= threshold)
    assert np.array_equal(pruned[pruned != 0], dense[magnitude > threshold])


def test_zero_prunes_nothing():
    weight = filters()
    assert np.array_equal(WinogradThreshold(4).weights(weight), transform(4, 3).filters(weight))


def test_one_threshold_for_each_output_channel():
    weight = filters((3, 4, 3, 3))
    pruned = WinogradThreshold(2, (0.0, 1e9, 0.0), False).weights(weight)
    assert not pruned[1].any()
    assert pruned[0].all()
    assert pruned[2].all()
    with pytest.raises(ValueError, match="2 thresholds for 3 output channels"):
        WinogradThreshold(2, (0.0, 1.0), False).weights(weight)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.8, 0.999])
def test_global_threshold_prunes_the_share_over_all_layers_together(sparsity):
    layers = [filters((8, 8, 3, 3)), 10 * filters((4, 8, 3, 3), 1), filters((8, 2, 5, 5), 2)]
    threshold = global_threshold(layers, 4, sparsity, True)
    pruned = np.concatenate([(WinogradThreshold(4, (threshold,)).weights(w) == 0).ravel() for w in layers])
    assert pruned.mean() == pytest.approx(sparsity, abs=2 / pruned.size)
    assert pruned.mean() >= sparsity


def test_global_threshold_of_equal_weights_prunes_them_all():
    layers = [np.ones((2, 2, 3, 3), np.float32)]
    threshold = global_threshold(layers, 2, 0.999, False)
    assert not WinogradThreshold(2, (threshold,), False).weights(layers[0]).any()


def test_no_sparsity_or_no_layer_gives_zero():
    assert global_threshold([filters()], 4, 0.0, True) == 0
    assert global_threshold([], 4, 0.5, True) == 0


def test_parse():
    text = json.dumps({"a.weight": ENTRY, "b.weight": ENTRY | {"tile": 2, "threshold": [0, 1.5], "weighted": False}})
    assert parse_thresholds(text) == {
        "a.weight": WinogradThreshold(4, (0.5,), True),
        "b.weight": WinogradThreshold(2, (0.0, 1.5), False),
    }


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
        parse_thresholds(json.dumps({"a.weight": ENTRY | change}))
    assert "a.weight" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"a": 3}', '{"a": {"tile": 2}}'])
def test_what_is_no_attribute_is_refused(text):
    with pytest.raises(ValueError, match=r"jointsparse\.winograd"):
        parse_thresholds(text)
