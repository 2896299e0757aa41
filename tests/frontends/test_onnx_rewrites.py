"""Operators that TVM's importer reads wrongly, rewritten: built and run by TVM against ONNX Runtime or ONNX itself."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper
from onnx.reference import ReferenceEvaluator

from jointsparse import frontends
from jointsparse.frontends.errors import InputError
from tests.frontends.graphs import floats, model, run

tvm = pytest.importorskip("tvm")


def _tvm(proto: ModelProto, x: NDArray[Any]) -> list[NDArray[Any]]:
    from tvm.contrib import graph_executor

    from jointsparse.schedules import operators  # noqa: F401 - makes TVM's code generator fit for the LLVM at hand

    mod, params = frontends.from_onnx(proto)
    with tvm.transform.PassContext(opt_level=1):
        library = tvm.relay.build(mod, target="llvm", params=params)
    executor = graph_executor.GraphModule(library["default"](tvm.cpu()))
    executor.set_input("x", x)
    executor.run()
    return [executor.get_output(i).numpy() for i in range(executor.get_num_outputs())]


def _assert_same(proto: ModelProto, x: NDArray[Any], *, by_definition: bool = False) -> None:
    """``by_definition``: against ONNX's reference evaluator, where ONNX Runtime lacks the operator or errs."""
    expected = ReferenceEvaluator(proto).run(None, {"x": x}) if by_definition else run(proto, x)
    for output, ours, theirs in zip(proto.graph.output, _tvm(proto, x), expected, strict=True):
        assert ours.shape == theirs.shape, output.name
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5, err_msg=output.name)


def _one(
    op: str,
    shape: tuple[int, ...],
    constants: dict[str, NDArray[Any]] | None = None,
    inputs: tuple[str, ...] | None = None,
    outputs: tuple[str, ...] = ("y",),
    opset: int = 17,
    **attributes: Any,
) -> ModelProto:
    names = inputs if inputs is not None else tuple(constants or ())
    node = helper.make_node(op, ["x", *names], list(outputs), "n", **attributes)
    return model([node], {"x": shape}, constants or {}, outputs[:1], opset)


def _all(nodes: list[NodeProto], x: NDArray[Any], constants: dict[str, NDArray[Any]], opset: int = 17) -> ModelProto:
    """All nodes on one input, each an output: one build for many cases."""
    for index, node in enumerate(nodes):
        node.output[0] = f"y{index}"
    return model(nodes, {"x": x.shape}, constants, [node.output[0] for node in nodes], opset)


# --- Clip ------------------------------------------------------------------------------------------------------------

LOW, HIGH = np.array(-0.2, np.float32), np.array(0.1, np.float32)


@pytest.mark.parametrize("opset", [11, 13, 20])
def test_clip(opset: int) -> None:
    bounds = [(), ("low",), ("low", ""), ("", "high"), ("low", "high"), ("high", "low")]
    nodes = [helper.make_node("Clip", ["x", *names], [""]) for names in bounds]
    x = floats(5, 20)
    # By ONNX: ONNX Runtime takes the lower of two bounds that cross in opset 11 and 12.
    _assert_same(_all(nodes, x, {"low": LOW, "high": HIGH}, opset), x, by_definition=True)


@pytest.mark.parametrize("attributes", [{"min": -0.2}, {"max": 0.1}, {"min": -0.2, "max": 0.1}, {"min": 1, "max": 0.1}])
def test_clip_of_opset_6(attributes: dict[str, float]) -> None:
    x = floats(5, 20)
    proto = _one("Clip", (5, 20), opset=6, **{k: float(v) for k, v in attributes.items()})
    expected = np.minimum(np.maximum(x, attributes.get("min", -np.inf)), attributes.get("max", np.inf))
    np.testing.assert_allclose(_tvm(proto, x)[0], expected)


@pytest.mark.parametrize("order", [("m", "b"), ("a", "m"), ("m", "")])
def test_clip_by_a_computed_bound(order: tuple[str, str]) -> None:
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["m"], keepdims=0),
        helper.make_node("Clip", ["x", *order], ["y"]),
    ]
    constants = {k: v for k, v in {"a": LOW, "b": HIGH}.items() if k in order}
    _assert_same(model(nodes, {"x": (5, 20)}, constants), floats(5, 20))


@pytest.mark.parametrize("bounds", [(-1,), (-1, 2), (2, -1)])
def test_clip_of_integers(bounds: tuple[int, ...]) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["i"], to=TensorProto.INT32),
        helper.make_node("Clip", ["i", *"ab"[: len(bounds)]], ["c"]),
        helper.make_node("Cast", ["c"], ["y"], to=TensorProto.FLOAT),
    ]
    constants = {name: np.array(value, np.int32) for name, value in zip("ab", bounds, strict=False)}
    _assert_same(model(nodes, {"x": (5, 20)}, constants), 3 * floats(5, 20), by_definition=True)


@pytest.mark.parametrize("dynamo", [False, True])
def test_clamp_of_torch(dynamo: bool, tmp_path: Path) -> None:
    class Clamps(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x.clamp(min=0), x.clamp(max=0.1), x.clamp(-0.2, 0.1)])

    x = torch.randn(3, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(Clamps(), (x,), str(tmp_path / "m.onnx"), dynamo=dynamo, input_names=["x"], verbose=False)
    np.testing.assert_allclose(_tvm(onnx.load(tmp_path / "m.onnx"), x.numpy())[0], Clamps()(x).numpy(), atol=1e-6)


# --- training --------------------------------------------------------------------------------------------------------

NORM = {name: np.abs(floats(3, seed=i)) for i, name in enumerate("sbmv")}


@pytest.mark.parametrize(
    ("opset", "outputs", "attributes"),
    [(9, ("y", "m1", "v1"), {}), (15, ("y", "m1", "v1"), {"training_mode": 1})],
)
def test_batch_norm_in_training_is_refused(opset: int, outputs: tuple[str, ...], attributes: dict[str, int]) -> None:
    proto = _one("BatchNormalization", (2, 3, 4, 4), NORM, outputs=outputs, opset=opset, **attributes)
    if opset == 9:
        proto.graph.node[0].output.extend(["m2", "v2"])
    with pytest.raises(InputError, match=r"BatchNormalization 'n' is in training mode; .*evaluation mode"):
        frontends.from_onnx(proto)


@pytest.mark.parametrize("opset", [7, 12, 13, 22])
def test_dropout_drops_nothing(opset: int) -> None:
    constants = {"r": np.array(0.4, np.float32), "t": np.array(False)} if opset >= 12 else {}
    attributes: dict[str, Any] = {"seed": 3} if opset >= 12 else {"ratio": 0.4}
    _assert_same(_one("Dropout", (3, 4), constants, opset=opset, **attributes), floats(3, 4))


def test_mask_of_dropout() -> None:
    nodes = [
        helper.make_node("Dropout", ["x"], ["d", "mask"], seed=1),
        helper.make_node("Where", ["mask", "d", "zero"], ["y"]),
    ]
    _assert_same(model(nodes, {"x": (3, 4)}, {"zero": np.zeros(1, np.float32)}), floats(3, 4))


def test_dropout_in_training_is_refused() -> None:
    constants = {"r": np.array(0.4, np.float32), "t": np.array(True)}
    with pytest.raises(InputError, match="Dropout 'n' is in training mode"):
        frontends.from_onnx(_one("Dropout", (3, 4), constants))


# --- pooling ---------------------------------------------------------------------------------------------------------

WINDOWS: list[dict[str, Any]] = [
    {"kernel_shape": [2, 2], "strides": [2, 2], "pads": [1, 1, 1, 1], "ceil_mode": 1},  # the last window would be pad
    {"kernel_shape": [3, 2], "strides": [2, 3], "pads": [0, 1, 1, 0], "ceil_mode": 1},
    {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1},
    {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
    {"kernel_shape": [1, 1], "strides": [4, 4], "ceil_mode": 1},  # ends before the data do
    {"kernel_shape": [3, 2], "strides": [2, 2], "auto_pad": "SAME_UPPER"},
    {"kernel_shape": [2, 3], "strides": [2, 3], "auto_pad": "SAME_LOWER"},
    {"kernel_shape": [2, 3], "auto_pad": "VALID"},
]


@pytest.mark.parametrize(
    ("op", "options"),
    [
        ("MaxPool", {"storage_order": 1}),
        ("AveragePool", {}),
        ("AveragePool", {"count_include_pad": 1}),
        ("LpPool", {"p": 2}),
        ("LpPool", {"p": 3}),
    ],
)
def test_pool(op: str, options: dict[str, int]) -> None:
    x = floats(1, 2, 7, 6)
    _assert_same(_all([helper.make_node(op, ["x"], [""], **options, **w) for w in WINDOWS], x, {}, 22), x)


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool", "LpPool"])
def test_dilated_pool(op: str) -> None:
    x = floats(1, 2, 9, 8)
    windows = {"kernel_shape": [3, 3], "dilations": [2, 1], "strides": [2, 1]}
    explicit = _one(op, x.shape, opset=22, **windows, pads=[2, 1, 2, 1])
    _assert_same(explicit, x)
    # ONNX Runtime forgets the dilation here; ONNX wants ceil(size / stride) outputs.
    same = _one(op, x.shape, opset=22, **windows, auto_pad="SAME_UPPER")
    np.testing.assert_allclose(_tvm(same, x)[0], run(explicit, x)[0], rtol=1e-4)


@pytest.mark.parametrize("shape", [(1, 2, 9), (1, 2, 5, 6, 7)])
@pytest.mark.parametrize("op", ["MaxPool", "AveragePool", "LpPool", "GlobalLpPool"])
def test_pool_of_one_and_three_axes(op: str, shape: tuple[int, ...]) -> None:
    rank = len(shape) - 2
    windows = {"kernel_shape": [3] * rank, "strides": [2] * rank, "pads": [1] * 2 * rank}
    _assert_same(_one(op, shape, opset=18, **({} if op == "GlobalLpPool" else windows)), floats(*shape))


@pytest.mark.parametrize("p", [1, 2, 3])
def test_global_lp_pool(p: int) -> None:
    _assert_same(_one("GlobalLpPool", (1, 2, 7, 6), p=p), floats(1, 2, 7, 6))


@pytest.mark.parametrize(
    "pool",
    [
        torch.nn.MaxPool2d(2, 2, 1, ceil_mode=True),
        torch.nn.AvgPool2d(2, 2, 1, ceil_mode=True),
        torch.nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
        torch.nn.AvgPool2d((3, 4), 3, (1, 0), ceil_mode=True),
    ],
    ids=str,
)
def test_ceil_mode_of_torch(pool: torch.nn.Module) -> None:
    x = torch.randn(1, 2, 7, 8)
    mod, params = frontends.from_torch(pool, x)
    expected = pool(x)
    assert tuple(mod["main"].ret_type.shape) == tuple(expected.shape)
    from tvm import relay

    result = relay.create_executor("graph", mod, tvm.cpu(), "llvm", params).evaluate()(x.numpy())
    np.testing.assert_allclose(result.numpy(), expected.numpy(), rtol=1e-5, atol=1e-6)


# --- resizing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["floor", "ceil", "round_prefer_floor", "round_prefer_ceil"])
def test_nearest_neighbours(rounding: str) -> None:
    constants = {
        "whole": np.array([1, 1, 3, 2], np.float32),
        "broken": np.array([1, 1, 1.3, 0.7], np.float32),
        "sizes": np.array([1, 2, 4, 13]),
    }
    inputs = [["x", "", "whole"], ["x", "", "broken"], ["x", "", "", "sizes"]]
    nodes = [
        helper.make_node("Resize", i, [""], nearest_mode=rounding, coordinate_transformation_mode=mapping)
        for mapping in ("asymmetric", "half_pixel", "align_corners", "pytorch_half_pixel")
        for i in inputs
    ]
    x = floats(1, 2, 6, 8)
    _assert_same(_all(nodes, x, constants, 13), x)


@pytest.mark.parametrize("shape", [(1, 2, 5), (1, 2, 3, 4, 5)])
def test_nearest_neighbours_of_one_and_three_axes(shape: tuple[int, ...]) -> None:
    values = {"scales": np.array([1, 1] + [2] * (len(shape) - 2), np.float32)}
    attributes = {"nearest_mode": "ceil", "coordinate_transformation_mode": "asymmetric"}
    _assert_same(_one("Resize", shape, values, ("", "scales"), opset=18, **attributes), floats(*shape))


def test_nearest_neighbours_by_crop_are_refused() -> None:
    values = {"roi": np.array([0, 0, 0, 0, 1, 1, 1, 1], np.float32), "scales": np.array([1, 1, 2, 2], np.float32)}
    attributes = {"nearest_mode": "ceil", "coordinate_transformation_mode": "tf_crop_and_resize"}
    with pytest.raises(InputError, match="Resize 'n' has nearest neighbours by tf_crop_and_resize and ceil"):
        frontends.from_onnx(_one("Resize", (1, 2, 6, 8), values, opset=13, **attributes))


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_upsample(mode: str) -> None:
    values = {"scales": np.array([1, 1, 2, 1.5], np.float32)}
    _assert_same(_one("Upsample", (1, 2, 6, 8), values, opset=9, mode=mode), floats(1, 2, 6, 8))


def test_upsample_to_a_broken_size_says_what_to_do() -> None:
    values = {"scales": np.array([1, 1, 1.3, 1.3], np.float32)}
    with pytest.raises(
        InputError, match=r"Upsample 'n' scales .* \[1.0, 1.0, 1.3, 1.3\].*size= instead of scale_factor="
    ):
        frontends.from_onnx(_one("Upsample", (1, 2, 6, 8), values, opset=9))


# --- the rest --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_space_to_depth(mode: str) -> None:
    if "mode" not in onnx.defs.get_schema("SpaceToDepth").attributes:
        pytest.skip("the installed onnx knows no mode of SpaceToDepth")
    opset = onnx.defs.onnx_opset_version()
    x = floats(2, 3, 4, 6)
    _assert_same(_one("SpaceToDepth", (2, 3, 4, 6), blocksize=2, mode=mode, opset=opset), x, by_definition=True)


@pytest.mark.parametrize(("fmod", "definition"), [(0, np.mod), (1, np.fmod)])
def test_remainder_of_floats(fmod: int, definition: np.ufunc) -> None:
    if not fmod and onnx.defs.onnx_opset_version() < 28:
        pytest.skip("the installed onnx knows no remainder of floats by floor")
    inf = np.inf
    x = np.array([0.3, -0.3, 6, -6, 5.5, -5.5, 5, -5, 5, 1e30, 3e38, -1e-30, inf, 1], np.float32)
    divisor = np.array([0.1, 0.1, -3, 3, -2, 2, inf, inf, -inf, 3, 1e-38, 1e-25, 3, np.nan], np.float32)
    proto = _one("Mod", x.shape, {"d": divisor}, opset=13 if fmod else 28, fmod=fmod)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(_tvm(proto, x)[0], definition(x, divisor))


@pytest.mark.parametrize("fmod", [0, 1])
def test_remainder_of_integers(fmod: int) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["i"], to=TensorProto.INT32),
        helper.make_node("Mod", ["i", "d"], ["m"], fmod=fmod),
        helper.make_node("Cast", ["m"], ["y"], to=TensorProto.FLOAT),
    ]
    _assert_same(model(nodes, {"x": (4, 9)}, {"d": np.array(-3, np.int32)}), 20 * floats(4, 9))


@pytest.mark.parametrize(("axis", "count"), [(1, 3), (-1, 2), (0, 1), (1, 7)])
def test_split_into_parts_of_unequal_size(axis: int, count: int) -> None:
    outputs = [f"y{i}" for i in range(count)]
    node = helper.make_node("Split", ["x"], outputs, axis=axis, num_outputs=count)
    _assert_same(model([node], {"x": (2, 7, 5)}, {}, outputs, 18), floats(2, 7, 5))


def test_split_into_empty_parts_is_refused() -> None:
    outputs = [f"y{i}" for i in range(5)]
    node = helper.make_node("Split", ["x"], outputs, "n", axis=0, num_outputs=5)
    with pytest.raises(InputError, match="Split 'n' splits 6 entries into 5 parts"):
        frontends.from_onnx(model([node], {"x": (6, 2)}, {}, outputs, 18, (2, 2)))


@pytest.mark.parametrize("attributes", [{}, {"alpha": 1.5}])
def test_swish(attributes: dict[str, float]) -> None:
    _assert_same(_one("Swish", (4, 9), opset=24, **attributes), floats(4, 9), by_definition=True)


@pytest.mark.parametrize(
    ("pads", "axes"), [([0, 1, 2, 0, 3, 1], None), ([4, 6], [2]), ([-1, 2, 1, 0], [1, 2]), ([0, 1], [0])]
)
def test_wrapping_pad(pads: list[int], axes: list[int] | None) -> None:
    constants = {"pads": np.array(pads)} | ({"axes": np.array(axes)} if axes else {})
    inputs = ("pads", "", "axes") if axes else ("pads",)
    x = floats(2, 4, 3)
    full = np.zeros((2, 3), int)
    full[:, axes or [0, 1, 2]] = np.array(pads).reshape(2, -1)
    expected = np.pad(x[:, max(-full[0, 1], 0) :], full.clip(0).T.tolist(), mode="wrap")
    np.testing.assert_array_equal(_tvm(_one("Pad", x.shape, constants, inputs, opset=19, mode="wrap"), x)[0], expected)
