"""What a plan tells."""

from __future__ import annotations

import json
import subprocess
import sys

from jointsparse.passes.plan import LayerPlan, Plan

SPARSE = LayerPlan(
    name="body.0",
    op="nn.conv2d",
    kernel="winograd_f4",
    reason="2.5 times as fast as dense",
    input_shape=(1, 16, 32, 32),
    weight_shape=(16, 16, 3, 3),
    output_shape=(1, 16, 32, 32),
    strides=(1, 1),
    padding=(1, 1, 1, 1),
    dilation=(1, 1),
    groups=1,
    spatial_sparsity=0.8,
    winograd_sparsity={"winograd_f4": 0.9},
    costs={"dense": 0.5, "direct": 0.3, "winograd_f4": 0.2},
    borrowed={"dense": "avx2", "direct": "avx512", "winograd_f4": "avx2"},
    break_even={"direct": 0.7, "winograd_f4": 0.6},
    overtaken={"direct": 0.9},
    unsupported={"winograd_f2": "tile size 4 asked for"},
    multiplications=8192,
)
ALONE = LayerPlan(
    name="head",
    op="nn.conv2d",
    kernel="dense",
    reason="layout NHWC",
    strides=(2, 1),
    dilation=(2, 2),
    groups=4,
    spatial_sparsity=0.99996,
)
PLAN = Plan("llvm -mcpu=haswell", "auto", (SPARSE, ALONE), ("mind the gap",))


def test_sums_count_the_layers_that_could_be_predicted():
    assert PLAN.cost == 0.2
    assert PLAN.dense_cost == 0.5
    assert Plan("llvm", "auto", (ALONE,)).cost is None


def test_layers_by_name_and_in_order():
    assert [layer.name for layer in PLAN] == ["body.0", "head"]
    assert len(PLAN) == 2
    assert PLAN["head"] is ALONE


def test_table_has_a_line_a_layer_a_sum_and_the_warnings():
    lines = str(PLAN).splitlines()
    assert max(map(len, lines)) <= 160
    layer = next(line for line in lines if line.startswith("body.0"))
    for cell in ("16x16x3x3", "1x16x32x32", "80 %", "F4 90 %", "winograd_f4", "0.2 ms", "0.5 ms", "2.5 times as fast"):
        assert cell in layer
    alone = next(line for line in lines if line.startswith("head"))
    for cell in ("layout NHWC", "stride 2x1", "dilation 2", "groups 4", "99.9 %"):
        assert cell in alone
    assert lines[-4] == (
        "1 of 2 layers sparse, domain auto, target llvm -mcpu=haswell; predicted 0.2 ms against 0.5 ms dense"
    )
    assert lines[-3:] == [
        "not measured on CPUs like the target's, predicted as on avx2: dense, winograd_f4",
        "not measured on CPUs like the target's, predicted as on avx512: direct",
        "mind the gap",
    ]


def test_nothing_borrowed_needs_no_line():
    assert "not measured" not in str(Plan("llvm", "auto", (ALONE,)))


def test_json_is_stable():
    document = json.loads(PLAN.to_json())
    assert document.keys() == {
        "format", "version", "target", "domain", "cost_ms", "dense_cost_ms", "warnings", "layers"
    }  # fmt: skip
    assert (document["format"], document["version"]) == ("jointsparse.plan", 1)
    assert document["layers"][0] == {
        "name": "body.0",
        "op": "nn.conv2d",
        "kernel": "winograd_f4",
        "reason": "2.5 times as fast as dense",
        "input_shape": [1, 16, 32, 32],
        "weight_shape": [16, 16, 3, 3],
        "output_shape": [1, 16, 32, 32],
        "strides": [1, 1],
        "padding": [1, 1, 1, 1],
        "dilation": [1, 1],
        "groups": 1,
        "spatial_sparsity": 0.8,
        "winograd_sparsity": {"winograd_f4": 0.9},
        "costs": {"dense": 0.5, "direct": 0.3, "winograd_f4": 0.2},
        "borrowed": {"dense": "avx2", "direct": "avx512", "winograd_f4": "avx2"},
        "break_even": {"direct": 0.7, "winograd_f4": 0.6},
        "overtaken": {"direct": 0.9},
        "unsupported": {"winograd_f2": "tile size 4 asked for"},
        "multiplications": 8192,
    }
    assert document["layers"][1]["input_shape"] is None


def test_a_plan_is_readable_without_tvm_and_torch():
    code = "import sys; from jointsparse.passes import Plan; sys.exit(bool({'tvm', 'torch'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
