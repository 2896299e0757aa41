"""Which layer is pruned how in the Winograd domain."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tvm
from tvm import relay

from jointsparse.passes.collect_convolutions import CollectConvolutions
from jointsparse.passes.layers import Worklist
from jointsparse.passes.prune_winograd import PruneWinograd
from jointsparse.schedules.winograd import transform
from jointsparse.schedules.winograd_pruning import ATTRIBUTE, WinogradPruning
from tests.host import HOST

RNG = np.random.default_rng(0)
PARAMS = {
    "a.weight": RNG.standard_normal((4, 4, 3, 3)).astype("float32"),
    "b.weight": 5 * RNG.standard_normal((4, 4, 5, 5)).astype("float32"),
    "c.weight": RNG.standard_normal((4, 4, 1, 1)).astype("float32"),
}


def module(attribute=None, between=lambda name, weight: weight):
    x = relay.var("x", shape=(1, 4, 12, 12))
    body, weights = x, []
    for name, value in PARAMS.items():
        weights.append(relay.var(name, shape=value.shape))
        body = relay.nn.conv2d(body, between(name, weights[-1]))
    mod = tvm.IRModule.from_expr(relay.Function([x, *weights], body))
    return mod if attribute is None else mod.with_attr(ATTRIBUTE, json.dumps(attribute))


def prune(mod, sparsity=0.0, **options):
    worklist = Worklist()
    CollectConvolutions(worklist, PARAMS, tvm.target.Target(HOST))(mod)
    return worklist, PruneWinograd(worklist, sparsity, **options)(mod)


def entry(tile=4, threshold=0.5, weighted=True):
    return {"tile": tile, "origin": [0, 0], "threshold": threshold, "weighted": weighted}


def test_without_threshold_and_sparsity_both_tiles_are_allowed_and_nothing_is_pruned():
    worklist, _ = prune(module())
    a, b, c = worklist.layers
    for layer in (a, b):
        assert layer.pruning == {"winograd_f2": WinogradPruning(2), "winograd_f4": WinogradPruning(4)}
        dense = transform(4, layer.geometry.kernel[0]).filters(layer.weight.stored)
        np.testing.assert_allclose(layer.sparse_weight("winograd_f4"), dense, rtol=1e-6)
    assert c.pruning == {}
    assert c.unsupported["winograd_f2"] == "filter 1x1 is outside Winograd's reach (3x3 or 5x5)"


def test_a_threshold_of_the_model_allows_its_tile_only_and_is_used_up():
    mod = module({"a.weight": entry(tile=2)}).with_attr("note", "kept")
    worklist, result = prune(mod)
    a, b, _ = worklist.layers
    assert a.pruning == {"winograd_f2": WinogradPruning(2, 0.5)}
    assert a.unsupported == {"winograd_f4": "the model's Winograd threshold is for tile size 2"}
    assert b.pruning.keys() == {"winograd_f2", "winograd_f4"}
    assert result.get_attr(ATTRIBUTE) is None
    assert result.get_attr("note") == "kept"
    assert mod.get_attr(ATTRIBUTE) is not None
    assert worklist.warnings == []


def test_the_threshold_speaks_of_the_weight_before_scales_were_folded_in():
    scale = np.array([-2, 0.5, 1, 3], "float32").reshape(4, 1, 1, 1)
    mod = module(
        {"a.weight": entry(threshold=[0.5, 1.0, 0.0, 2.0], weighted=False)},
        lambda name, weight: relay.multiply(weight, relay.const(scale)) if name == "a.weight" else weight,
    )
    layer = prune(mod)[0].layers[0]
    dense = transform(4, 3).filters(PARAMS["a.weight"])
    expected = np.where(np.abs(dense) <= np.reshape([0.5, 1.0, 0.0, 2.0], (4, 1, 1, 1)), 0, dense) * scale
    np.testing.assert_allclose(layer.sparse_weight("winograd_f4"), expected, rtol=1e-6)


def test_a_scale_within_the_filter_leaves_the_threshold_behind():
    inside = relay.const(RNG.standard_normal((1, 1, 3, 3)).astype("float32"))
    mod = module({"a.weight": entry()}, lambda name, w: relay.multiply(w, inside) if name == "a.weight" else w)
    layer = prune(mod)[0].layers[0]
    assert layer.pruning == {}
    assert "scaled within a filter" in layer.unsupported["winograd_f4"]


def test_sparsity_prunes_all_layers_by_one_threshold_for_each_tile():
    worklist, _ = prune(module(), 0.7)
    for kernel in ("winograd_f2", "winograd_f4"):
        layers = [layer for layer in worklist.layers if kernel in layer.pruning]
        assert len({layer.pruning[kernel] for layer in layers}) == 1
        zeros = [(layer.sparse_weight(kernel) == 0).ravel() for layer in layers]
        assert np.concatenate(zeros).mean() == pytest.approx(0.7, abs=0.005)
        assert zeros[0].mean() > 0.8 > zeros[1].mean()


@pytest.mark.parametrize("shape", [(4, 1, 1, 1), (1, 1, 3, 3)])
def test_sparsity_counts_what_the_convolution_multiplies_by(shape):
    """With BatchNorm folded in, the smallest of the scaled Winograd weights go, not of the stored ones."""
    scale = np.exp(2 * RNG.standard_normal(shape)).astype("float32")
    mod = module(None, lambda name, w: relay.multiply(w, relay.const(scale)) if name == "a.weight" else w)
    layer = prune(mod, 0.7, weighted=False)[0].layers[0]
    dense = transform(4, 3).filters(PARAMS["a.weight"] * scale)
    kept = np.abs(dense) > layer.pruning["winograd_f4"].threshold
    assert 0 < kept.mean() < 1
    np.testing.assert_allclose(layer.sparse_weight("winograd_f4"), np.where(kept, dense, 0), rtol=1e-5, atol=1e-9)


def test_equal_magnitudes_leave_no_winograd_kernel_but_the_others():
    """Filters of one weight in the middle: raw magnitudes of F(2x2) are all equal, those of F(4x4) are not."""
    value = np.zeros((4, 4, 3, 3), "float32")
    value[:, :, 1, 1] = 1
    x = relay.var("x", shape=(1, 4, 12, 12))
    mod = tvm.IRModule.from_expr(relay.nn.conv2d(x, relay.const(value)))
    dense = transform(2, 3).filters(value)
    assert len(np.unique(np.abs(dense[dense != 0]))) == 1
    layer = prune(mod, 0.8, weighted=False)[0].layers[0]
    assert layer.pruning.keys() == {"winograd_f4"}
    assert "too many magnitudes are equal" in layer.unsupported["winograd_f2"]
    assert layer.left_alone is None
    assert "direct" not in layer.unsupported


def test_a_tile_asked_for_is_the_only_one():
    layer = prune(module(), tile=2)[0].layers[0]
    assert layer.pruning.keys() == {"winograd_f2"}
    assert layer.unsupported["winograd_f4"] == "tile size 2 asked for"


def test_a_tile_asked_for_against_the_model_leaves_no_winograd_kernel():
    layer = prune(module({"a.weight": entry(tile=4)}), tile=2)[0].layers[0]
    assert layer.pruning == {}
    assert "threshold is for tile size 4" in layer.unsupported["winograd_f2"]


def test_a_sparsity_against_the_models_own_thresholds_is_refused():
    with pytest.raises(ValueError, match="carries Winograd thresholds of its own"):
        prune(module({"a.weight": entry()}), 0.5)


def test_thresholds_of_a_wrong_number_are_refused_by_name():
    with pytest.raises(ValueError, match=r"'a\.weight': 2 thresholds for 4 output channels"):
        prune(module({"a.weight": entry(threshold=[0.1, 0.2])}))


def test_a_threshold_that_finds_no_weight_is_told():
    worklist, _ = prune(module({"gone.weight": entry()}))
    assert worklist.warnings == [
        "Winograd thresholds without a convolution's weight of that name (gone.weight): "
        "the module was bound or renamed before"
    ]


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_a_threshold_of_a_layer_of_another_type_is_told_by_its_type(dtype):
    x, weight = relay.var("x", shape=(1, 4, 12, 12), dtype=dtype), relay.const(PARAMS["a.weight"], dtype)
    mod = tvm.IRModule.from_expr(relay.nn.conv2d(x, weight)).with_attr(ATTRIBUTE, json.dumps({"a.weight": entry()}))
    worklist, _ = prune(mod)
    assert worklist.warnings == [
        "Winograd thresholds without a convolution's weight of that name (a.weight): the pruning of layers of data "
        f"type {dtype} is dropped, Winograd kernels compute in float32"
    ]
