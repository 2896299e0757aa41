"""BatchNorm folding against ONNX Runtime on the unfolded graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, NodeProto, checker, helper, numpy_helper

from jointsparse.frontends import batch_norm, onnx_graph, winograd_spec
from jointsparse.schedules.winograd_pruning import WinogradPruning
from tests.frontends.graphs import floats, model, run


def _statistics(channels: int, prefix: str = "n") -> dict[str, np.ndarray]:
    return {
        f"{prefix}.gamma": floats(channels, seed=1),
        f"{prefix}.beta": floats(channels, seed=2),
        f"{prefix}.mean": floats(channels, seed=3),
        f"{prefix}.var": np.abs(floats(channels, seed=4)) + 0.1,
    }


def _norm(source: str, target: str, prefix: str = "n", **attributes: Any) -> NodeProto:
    inputs = [source, *(f"{prefix}.{key}" for key in ("gamma", "beta", "mean", "var"))]
    return helper.make_node("BatchNormalization", inputs, [target], **attributes)


def _types(proto: ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node]


def _assert_same_after_folding(proto: ModelProto, *inputs: np.ndarray) -> tuple[ModelProto, dict[str, Any]]:
    folded = ModelProto()
    folded.CopyFrom(proto)
    scalings = batch_norm.fold(folded)
    checker.check_model(folded)
    for before, after in zip(run(proto, *inputs), run(folded, *inputs), strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)
    return folded, scalings


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolution(bias: bool, groups: int) -> None:
    constants = {"w": floats(8, 4 // groups, 3, 3), **_statistics(8)} | ({"b": floats(8, seed=9)} if bias else {})
    conv = helper.make_node("Conv", ["x", "w", *(["b"] if bias else [])], ["c"], group=groups, strides=[2, 1])
    proto = model([conv, _norm("c", "y", epsilon=1e-3)], {"x": (2, 4, 9, 9)}, constants)
    folded, scalings = _assert_same_after_folding(proto, floats(2, 4, 9, 9))
    assert _types(folded) == ["Conv"]
    scale = scalings["w"].scale
    expected = constants["w"] * scale.reshape(-1, 1, 1, 1)
    stored = numpy_helper.to_array(onnx_graph.initializers(folded)["w"])
    np.testing.assert_array_equal(stored, expected)


def test_transposed_convolution() -> None:
    constants = {"w": floats(4, 6, 2, 2), **_statistics(6)}
    nodes = [helper.make_node("ConvTranspose", ["x", "w"], ["c"], strides=[2, 2]), _norm("c", "y")]
    folded, scalings = _assert_same_after_folding(model(nodes, {"x": (1, 4, 5, 5)}, constants), floats(1, 4, 5, 5))
    assert _types(folded) == ["ConvTranspose"]
    assert scalings["w"].axis == 1


def test_grouped_transposed_convolution_is_left() -> None:
    constants = {"w": floats(4, 3, 2, 2), **_statistics(6)}
    nodes = [helper.make_node("ConvTranspose", ["x", "w"], ["c"], group=2), _norm("c", "y")]
    folded, scalings = _assert_same_after_folding(model(nodes, {"x": (1, 4, 5, 5)}, constants), floats(1, 4, 5, 5))
    assert _types(folded) == ["ConvTranspose", "BatchNormalization"]
    assert not scalings


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("bias", [(), (1,), (7,), (1, 7)])
def test_gemm(transposed: int, bias: tuple[int, ...]) -> None:
    shape = (7, 5) if transposed else (5, 7)
    constants = {"w": floats(*shape), "b": floats(*bias, seed=5), **_statistics(7)}
    gemm = helper.make_node("Gemm", ["x", "w", "b"], ["c"], transB=transposed, alpha=0.5, beta=2.0)
    folded, _ = _assert_same_after_folding(model([gemm, _norm("c", "y")], {"x": (3, 5)}, constants), floats(3, 5))
    assert _types(folded) == ["Gemm"]


def test_gemm_with_a_row_of_its_own_for_each_sample_is_left() -> None:
    constants = {"w": floats(5, 7), "b": floats(3, 7), **_statistics(7)}
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["c"]), _norm("c", "y")]
    folded, _ = _assert_same_after_folding(model(nodes, {"x": (3, 5)}, constants), floats(3, 5))
    assert _types(folded) == ["Gemm", "BatchNormalization"]


def test_weight_shared_by_two_normalised_and_one_plain_convolution() -> None:
    conv = [helper.make_node("Conv", [f"x{i}", "w", "b"], [f"c{i}"], pads=[1, 1, 1, 1]) for i in range(3)]
    norms = [_norm("c0", "x1", "n"), _norm("c1", "x2", "m")]
    constants = {"w": floats(4, 4, 3, 3), "b": floats(4, seed=8), **_statistics(4), **_statistics(4, "m")}
    constants["m.gamma"] = constants["m.gamma"] * 3
    nodes = [conv[0], norms[0], conv[1], norms[1], conv[2]]
    proto = model(nodes, {"x0": (1, 4, 6, 6)}, constants, ["c2"])
    folded, scalings = _assert_same_after_folding(proto, floats(1, 4, 6, 6))
    assert _types(folded) == ["Conv"] * 3
    assert {scaling.source for scaling in scalings.values()} == {"w"}
    assert len(scalings) == 2
    np.testing.assert_array_equal(numpy_helper.to_array(onnx_graph.initializers(folded)["w"]), constants["w"])


@pytest.mark.parametrize("reader", ["output", "node"])
def test_convolution_read_by_others_as_well_is_left(reader: str) -> None:
    constants = {"w": floats(4, 4, 1, 1), **_statistics(4)}
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"]), _norm("c", "n")]
    nodes.append(helper.make_node("Add", ["n", "c" if reader == "node" else "n"], ["y"]))
    outputs = ["y", "c"] if reader == "output" else ["y"]
    folded, scalings = _assert_same_after_folding(
        model(nodes, {"x": (1, 4, 6, 6)}, constants, outputs), floats(1, 4, 6, 6)
    )
    assert "BatchNormalization" in _types(folded)
    assert not scalings


@pytest.mark.parametrize("biases", [(), ("one",), ("other",), ("one", "other")])
def test_a_sum_of_convolutions(biases: tuple[str, ...]) -> None:
    """As an approximated layer is one; what three are is folded as well."""
    constants = {"w": floats(6, 4, 3, 3), "v": floats(6, 4, 1, 1, seed=8), "u": floats(6, 4, 1, 1, seed=7)}
    constants |= {name: floats(6, seed=10 + len(name)) for name in biases} | _statistics(6)
    own = [[name] if name in biases else [] for name in ("one", "other")]
    nodes = [
        helper.make_node("Conv", ["x", "w", *own[0]], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["x", "v", *own[1]], ["b"]),
        helper.make_node("Conv", ["x", "u"], ["c"]),
        helper.make_node("Add", ["a", "b"], ["d"]),
        helper.make_node("Add", ["d", "c"], ["e"]),
        _norm("e", "f"),
        helper.make_node("Relu", ["f"], ["y"]),
    ]
    folded, scalings = _assert_same_after_folding(model(nodes, {"x": (1, 4, 5, 5)}, constants), floats(1, 4, 5, 5))
    assert _types(folded) == ["Conv", "Conv", "Conv", "Add", "Add", "Relu"]
    assert set(scalings) == {"w", "v", "u"}


@pytest.mark.parametrize("other", ["x", "a"])
def test_a_sum_with_something_else_is_left(other: str) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node("Add", ["a", other], ["s"]),
        _norm("s", "y"),
    ]
    proto = model(nodes, {"x": (1, 4, 5, 5)}, {"w": floats(4, 4, 1, 1), **_statistics(4)})
    folded, scalings = _assert_same_after_folding(proto, floats(1, 4, 5, 5))
    assert _types(folded) == ["Conv", "Add", "BatchNormalization"]
    assert not scalings


def test_two_norms_in_a_row_fold_one() -> None:
    constants = {"w": floats(4, 4, 1, 1), **_statistics(4), **_statistics(4, "m")}
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"]), _norm("c", "n"), _norm("n", "y", "m")]
    folded, _ = _assert_same_after_folding(model(nodes, {"x": (1, 4, 6, 6)}, constants), floats(1, 4, 6, 6))
    assert _types(folded) == ["Conv", "BatchNormalization"]


def test_norm_of_the_input_and_after_an_activation_is_left() -> None:
    constants = {"w": floats(4, 4, 1, 1), **_statistics(4)}
    nodes = [_norm("x", "a"), helper.make_node("Conv", ["a", "w"], ["c"]), helper.make_node("Relu", ["c"], ["r"])]
    folded, scalings = _assert_same_after_folding(
        model([*nodes, _norm("r", "y")], {"x": (1, 4, 6, 6)}, constants), floats(1, 4, 6, 6)
    )
    assert _types(folded).count("BatchNormalization") == 2
    assert not scalings


def test_training_mode_is_left() -> None:
    constants = {"w": floats(4, 4, 1, 1), **_statistics(4)}
    norm = _norm("c", "y", training_mode=1)
    norm.output.extend(["running_mean", "running_var"])
    proto = model([helper.make_node("Conv", ["x", "w"], ["c"]), norm], {"x": (1, 4, 6, 6)}, constants)
    assert not batch_norm.fold(proto)
    assert _types(proto) == ["Conv", "BatchNormalization"]


def test_thresholds_follow_their_filters() -> None:
    constants = {"w": floats(4, 4, 3, 3), **_statistics(4)}
    proto = model([helper.make_node("Conv", ["x", "w"], ["c"]), _norm("c", "y")], {"x": (1, 4, 6, 6)}, constants)
    spec = {"w": WinogradPruning(4, 0.05, True)}
    onnx_graph.set_metadata(proto, winograd_spec.KEY, winograd_spec.dump(spec))
    before = spec["w"].magnitudes(constants["w"]) <= 0.05
    scale = batch_norm.fold(proto)["w"].scale
    folded = numpy_helper.to_array(onnx_graph.initializers(proto)["w"])
    after = winograd_spec.parse(onnx_graph.metadata(proto, winograd_spec.KEY) or "", {"w": (4, 4, 3, 3)}, "test")["w"]
    np.testing.assert_allclose(after.threshold, 0.05 * np.abs(scale))
    pruned = after.magnitudes(folded) <= np.reshape(after.threshold, (-1, 1, 1, 1))
    np.testing.assert_array_equal(pruned, before)
    assert 0 < before.mean() < 1
