"""ONNX and torch to Relay, built and run by TVM against ONNX Runtime and torch, for every opset."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper

from jointsparse import frontends
from jointsparse.frontends import exporting, onnx_graph, winograd_spec
from jointsparse.frontends.errors import InputError
from tests.frontends.graphs import floats, model, run
from tests.frontends.torch_models import Mobile, Residual, Shared, randomised

tvm = pytest.importorskip("tvm")

NEWEST = onnx.defs.onnx_opset_version()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _tvm(mod: Any, params: Mapping[str, Any], *inputs: np.ndarray) -> list[np.ndarray]:
    from tvm.contrib import graph_executor

    from jointsparse.schedules import operators  # noqa: F401 - makes TVM's code generator fit for the LLVM at hand

    with tvm.transform.PassContext(opt_level=1):
        library = tvm.relay.build(mod, target="llvm", params=dict(params))
    executor = graph_executor.GraphModule(library["default"](tvm.cpu()))
    names = [v.name_hint for v in mod["main"].params if v.name_hint not in params]
    for name, value in zip(names, inputs, strict=True):
        executor.set_input(name, value)
    executor.run()
    return [executor.get_output(i).numpy() for i in range(executor.get_num_outputs())]


def _assert_same(proto: ModelProto, *inputs: np.ndarray) -> Any:
    mod, params = frontends.from_onnx(proto)
    for ours, expected in zip(_tvm(mod, params, *inputs), run(proto, *inputs), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
    return mod


# --- whole networks, every exporter and opset ------------------------------------------------------------------------

NETWORKS = {
    "residual": (Residual, ((2, 3, 16, 16),)),
    "mobile": (Mobile, ((1, 3, 16, 16),)),
    "shared": (Shared, ((1, 4, 9, 7), (1, 4, 9, 7))),
}


def _case(network: str) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...], np.ndarray]:
    make, shapes = NETWORKS[network]
    module, inputs = randomised(make()), tuple(torch.randn(shape) for shape in shapes)
    with torch.no_grad():
        return module, inputs, module(*inputs).numpy()


def _check(proto: ModelProto, network: str, inputs: tuple[torch.Tensor, ...], expected: np.ndarray) -> None:
    mod, params = frontends.from_onnx(proto)
    result = _tvm(mod, params, *(x.numpy() for x in inputs))[0]
    np.testing.assert_allclose(result, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("opset", [13, 17, 18, 20])
def test_torchscript_exporter(network: str, opset: int, tmp_path: Path) -> None:
    module, inputs, expected = _case(network)
    path = tmp_path / "m.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, inputs, str(path), dynamo=False, opset_version=opset)
    proto = onnx.load(path)
    assert onnx_graph.opset_version(proto) == opset
    _check(proto, network, inputs, expected)


@pytest.fixture(scope="module")
def dynamo() -> Any:
    """Exported once a network: the exporter takes seconds."""
    made: dict[str, tuple[Any, ...]] = {}

    def export(network: str) -> tuple[Any, ...]:
        if network not in made:
            torch.manual_seed(0)
            module, inputs, expected = _case(network)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                proto = torch.onnx.export(module, inputs, dynamo=True, verbose=False, opset_version=18).model_proto
            made[network] = proto, inputs, expected
        return made[network]

    return export


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("opset", [18, 21, 23, NEWEST])
def test_dynamo_exporter(network: str, opset: int, dynamo: Any) -> None:
    proto, inputs, expected = dynamo(network)
    converted = onnx.version_converter.convert_version(proto, opset)
    assert onnx_graph.opset_version(converted) == opset
    _check(converted, network, inputs, expected)


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
@pytest.mark.parametrize("network", NETWORKS)
def test_our_export(network: str, exporter: str) -> None:
    module, inputs, expected = _case(network)
    proto = exporting.export(module, inputs, exporter)
    names = {name for name, _ in module.named_parameters() if name.endswith(".weight")}
    assert names <= {tensor.name for tensor in proto.graph.initializer}
    if network == "residual":
        assert any(node.op_type == "BatchNormalization" for node in proto.graph.node)
    _check(proto, network, inputs, expected)


def test_from_torch_keeps_weight_names_and_folds_batch_norm() -> None:
    module, inputs, expected = _case("residual")
    mod, params = frontends.from_torch(module, inputs[0])
    np.testing.assert_allclose(_tvm(mod, params, inputs[0].numpy())[0], expected, rtol=1e-3, atol=1e-4)
    assert "batch_norm" not in str(mod)
    assert {"stem.weight", "conv1.weight", "conv2.weight", "project.weight", "fc.weight"} <= set(params)
    assert {p.name_hint for p in mod["main"].params} == {"input", *params}


def test_load_gives_thresholds_and_folded_weights(tmp_path: Path) -> None:
    module, inputs, expected = _case("residual")
    frontends.quantize_(module, step=1e-4)
    path = tmp_path / "m.jsm"
    objective = frontends.JointSparsity(module, spatial=0.5, winograd=0.5, tile=4)
    threshold = objective.winograd_spec()["conv1.weight"]["threshold"]
    frontends.save(module, inputs[0], path, objective=objective)
    mod, params = frontends.load(path)
    np.testing.assert_allclose(_tvm(mod, params, inputs[0].numpy())[0], expected, rtol=1e-2, atol=1e-2)
    spec = json.loads(str(mod.attrs[winograd_spec.KEY]))
    scale = params["conv1.weight"].numpy() / np.where(module.conv1.weight == 0, 1, module.conv1.weight.detach())
    assert spec["conv1.weight"]["threshold"] == pytest.approx(threshold * np.abs(scale).max((1, 2, 3)), rel=1e-5)
    assert spec["conv1.weight"]["tile"] == 4


def test_resnet18(tmp_path: Path) -> None:
    from jointsparse.frontends.networks import build

    module = randomised(build("resnet18", width=8))
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = module(x).numpy()
    path = tmp_path / "m.jsm"
    frontends.save(module, x, path)
    mod, params = frontends.load(path)
    np.testing.assert_allclose(_tvm(mod, params, x.numpy())[0], expected, rtol=1e-3, atol=1e-3)
    assert len(frontends.inspect(path).layers) == 21


# --- what TVM's importer gets wrong by itself ------------------------------------------------------------------------

REDUCTIONS = ["Max", "Min", "Sum", "Mean", "Prod", "LogSumExp", "SumSquare", "L1", "L2", "LogSum"]


def _reduction(kind: str, axes: list[int] | None, opset: int, **attributes: Any) -> ModelProto:
    constants = {} if axes is None else {"axes": np.array(axes, np.int64)}
    node = helper.make_node(f"Reduce{kind}", ["x", *constants], ["y"], **attributes)
    return model([node], {"x": (2, 3, 4, 5)}, constants, opset=opset)


@pytest.mark.parametrize("kind", REDUCTIONS)
@pytest.mark.parametrize("axes", [[2, 3], [-1, 1], [0], [], None])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_reduction_over_several_axes(kind: str, axes: list[int] | None, keepdims: int) -> None:
    x = np.abs(floats(2, 3, 4, 5)) + 0.1
    _assert_same(_reduction(kind, axes, 18, keepdims=keepdims), x)


@pytest.mark.parametrize("kind", REDUCTIONS)
def test_reduction_over_no_axes_but_each_element(kind: str) -> None:
    # ONNX Runtime 1.31 returns the input for all of them; the definition is ONNX's reference evaluator.
    from onnx.reference import ReferenceEvaluator

    proto = _reduction(kind, None, 18, noop_with_empty_axes=1)
    x = np.abs(floats(2, 3, 4, 5)) + 0.1
    mod, params = frontends.from_onnx(proto)
    expected = ReferenceEvaluator(proto).run(None, {"x": x})[0]
    np.testing.assert_allclose(_tvm(mod, params, x)[0], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("indices", "axis"), [([3, 0, 2], 1), ([0, 1], -1), ([2], 1), ([-1, 0], 1), ([[0, 3], [1, 1]], 1)]
)
def test_constant_indices_are_not_guarded(indices: list[Any], axis: int) -> None:
    node = helper.make_node("Gather", ["x", "i"], ["y"], axis=axis)
    proto = model([node], {"x": (1, 4, 3, 5)}, {"i": np.array(indices, np.int64)})
    mod = _assert_same(proto, floats(1, 4, 3, 5))
    assert "where" not in str(mod)


def test_indices_computed_at_run_time_are_guarded() -> None:
    nodes = [
        helper.make_node("Cast", ["s"], ["i"], to=TensorProto.INT64),
        helper.make_node("Gather", ["x", "i"], ["y"], axis=1),
    ]
    proto = model(nodes, {"x": (1, 4, 3), "s": (2,)}, {})
    _assert_same(proto, floats(1, 4, 3), np.array([-1.0, 2.0], np.float32))


def test_reduction_of_opset_13() -> None:
    _assert_same(_reduction("Sum", [1, 3], 13), floats(2, 3, 4, 5))


def test_reduction_over_computed_axes_is_refused() -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["i"], to=TensorProto.INT64),
        helper.make_node("ReduceSum", ["x", "i"], ["y"], "total"),
    ]
    with pytest.raises(InputError, match="ReduceSum 'total' is computed"):
        frontends.from_onnx(model(nodes, {"x": (1,)}, {}, ["y"], 18, (1,)))


def test_pad_of_some_axes() -> None:
    node = helper.make_node("Pad", ["x", "pads", "", "axes"], ["y"], mode="reflect")
    constants = {"pads": np.array([1, 2, 0, 1]), "axes": np.array([3, -2])}
    _assert_same(model([node], {"x": (1, 2, 5, 6)}, constants, opset=18), floats(1, 2, 5, 6))


def _resize(values: dict[str, np.ndarray], **attributes: Any) -> ModelProto:
    inputs = ["x", "", "scales"] if "scales" in values else ["x", "", "", "sizes"]
    return model([helper.make_node("Resize", inputs, ["y"], **attributes)], {"x": (1, 2, 6, 8)}, values, opset=19)


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize(
    ("values", "axes"),
    [
        ({"scales": np.array([1, 1, 2, 1.5], np.float32)}, None),
        ({"scales": np.array([2, 0.5], np.float32)}, [2, 3]),
        ({"sizes": np.array([9, 5])}, [-1, -2]),
        ({"sizes": np.array([1, 2, 12, 16])}, None),
    ],
)
def test_resize(mode: str, values: dict[str, np.ndarray], axes: list[int] | None) -> None:
    attributes: dict[str, Any] = {"mode": mode} | ({"axes": axes} if axes else {})
    _assert_same(_resize(values, **attributes), floats(1, 2, 6, 8))


@pytest.mark.parametrize(
    ("attributes", "values", "match"),
    [
        ({"antialias": 1, "mode": "linear"}, {"sizes": np.array([1, 2, 3, 4])}, "antialias"),
        ({"keep_aspect_ratio_policy": "not_larger"}, {"sizes": np.array([1, 2, 3, 4])}, "keep_aspect_ratio_policy"),
        ({}, {"sizes": np.array([1, 4, 6, 8])}, "channels"),
        ({"mode": "linear"}, {"scales": np.array([1, 1, 1.3, 1], np.float32)}, r"no whole size; .* size= instead of"),
    ],
)
def test_resize_that_tvm_would_get_wrong_is_refused(
    attributes: dict[str, Any], values: dict[str, np.ndarray], match: str
) -> None:
    with pytest.raises(InputError, match=match):
        frontends.from_onnx(_resize(values, **attributes))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(approximate: str) -> None:
    proto = model([helper.make_node("Gelu", ["x"], ["y"], approximate=approximate)], {"x": (4, 50)}, {}, opset=20)
    x = 3 * floats(4, 50)
    mod, params = frontends.from_onnx(proto)
    np.testing.assert_allclose(_tvm(mod, params, x)[0], run(proto, x)[0], rtol=1e-5, atol=1e-6)


def test_resize_of_opset_10() -> None:
    proto = model(
        [helper.make_node("Resize", ["x", "scales"], ["y"])],
        {"x": (1, 2, 6, 8)},
        {"scales": np.array([1, 1, 2, 2], np.float32)},
        opset=10,
    )
    _assert_same(proto, floats(1, 2, 6, 8))


DEFINED = {
    "GroupNormalization": (["x", "s", "b"], {"num_groups": 2}, 21),
    "Swish": (["x"], {"alpha": 1.5}, 24),
    "RMSNormalization": (["x", "w"], {"axis": -1}, 23),
    "MeanVarianceNormalization": (["x"], {}, 13),
}


@pytest.mark.parametrize("op", DEFINED)
def test_operator_unknown_to_tvm_is_replaced_by_its_definition(op: str) -> None:
    from onnx.reference import ReferenceEvaluator

    inputs, attributes, opset = DEFINED[op]
    constants = {"s": floats(4, seed=1), "b": floats(4, seed=2), "w": floats(6, seed=3)}
    constants = {name: value for name, value in constants.items() if name in inputs}
    proto = model(
        [helper.make_node(op, inputs, ["y"], **attributes)], {"x": (2, 4, 5, 6)}, constants, ["y"], opset, (2, 4, 5, 6)
    )
    x = floats(2, 4, 5, 6)
    mod, params = frontends.from_onnx(proto)
    expected = ReferenceEvaluator(proto).run(None, {"x": x})[0]
    np.testing.assert_allclose(_tvm(mod, params, x)[0], expected, rtol=1e-4, atol=1e-5)


def test_operator_nobody_knows_is_named() -> None:
    proto = model([helper.make_node("Det", ["x"], ["y"])], {"x": (3, 3)}, {})
    with pytest.raises(InputError, match=r"TVM 0\.19 has no Det"):
        frontends.from_onnx(proto)


def test_model_local_function_is_inlined() -> None:
    function = helper.make_function(
        "own", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 17)]
    )
    node = helper.make_node("Twice", ["x"], ["y"], domain="own")
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])],
    )
    proto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("own", 1)], functions=[function]
    )
    proto.ir_version = 10
    _assert_same(proto, floats(2, 3))


# --- what stays as it is, and what is refused ------------------------------------------------------------------------


def _conv(**attributes: Any) -> NodeProto:
    return helper.make_node("Conv", ["x", "w"], ["y"], **attributes)


def test_weights_are_parameters_and_shapes_constants() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("Reshape", ["c", "shape"], ["r"]),
        helper.make_node("MatMul", ["r", "m"], ["y"]),
    ]
    constants = {"w": floats(4, 3, 3, 3), "shape": np.array([1, -1]), "m": floats(16, 5)}
    proto = model(nodes, {"x": (1, 3, 4, 4)}, constants)
    params = frontends.from_onnx(proto)[1]
    assert set(params) == {"w", "m"}
    np.testing.assert_array_equal(params["w"].numpy(), constants["w"])
    _assert_same(proto, floats(1, 3, 4, 4))


def test_initializers_that_are_inputs_as_well() -> None:
    """As models of IR version 3 have them."""
    proto = model([_conv()], {"x": (1, 3, 4, 4), "w": (4, 3, 3, 3)}, {"w": floats(4, 3, 3, 3)})
    mod, params = frontends.from_onnx(proto)
    assert set(params) == {"w"}
    assert len(mod["main"].params) == 2


def test_shape_of_open_axes() -> None:
    proto = model([_conv()], {"x": ("N", 3, "H", "W")}, {"w": floats(4, 3, 3, 3)})
    mod, _ = frontends.from_onnx(proto, shape={"x": (2, 3, 5, 7)})
    assert tuple(mod["main"].ret_type.shape) == (2, 4, 3, 5)
    with pytest.raises(InputError, match="axis 2"):
        frontends.from_onnx(proto)
    with pytest.raises(InputError, match="no input 'data'"):
        frontends.from_onnx(proto, shape={"data": (2, 3, 5, 7)})


def test_onnx_mapping_is_there_only_during_import() -> None:
    was_there = hasattr(onnx, "mapping")
    frontends.from_onnx(model([_conv()], {"x": (1, 3, 4, 4)}, {"w": floats(4, 3, 3, 3)}))
    assert hasattr(onnx, "mapping") == was_there
    assert ("onnx.mapping" in sys.modules) == was_there


def test_newer_opset_than_the_installed_onnx_is_named() -> None:
    proto = model([_conv()], {"x": (1, 3, 4, 4)}, {"w": floats(4, 3, 3, 3)})
    proto.opset_import[0].version = NEWEST + 1
    with pytest.raises(InputError, match=f"opset {NEWEST + 1}.*at most {NEWEST}"):
        frontends.from_onnx(proto)


def test_failure_inside_tvm_is_one_line() -> None:
    nodes = [helper.make_node("NonZero", ["x"], ["i"]), helper.make_node("ReduceSum", ["x", "i"], ["y"])]
    with pytest.raises(InputError) as caught:
        frontends.from_onnx(model(nodes, {"x": (3,)}, {}, opset=13))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["{", "[]", '{"v": {}}', '{"w": {"tile": 4}}'])
def test_bad_thresholds_in_the_metadata_are_refused(spec: str) -> None:
    proto = model([_conv()], {"x": (1, 3, 4, 4)}, {"w": floats(4, 3, 3, 3)})
    onnx_graph.set_metadata(proto, winograd_spec.KEY, spec)
    with pytest.raises(InputError, match=r"jointsparse\.winograd"):
        frontends.from_onnx(proto)


def test_module_that_cannot_be_exported() -> None:
    class Odd(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("first line\nsecond line")

    with pytest.raises(InputError, match="Odd cannot be exported") as caught:
        frontends.from_torch(Odd(), torch.zeros(1))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"torch\.nn\.Module"):
        frontends.from_torch(lambda x: x, torch.zeros(1))
    with pytest.raises(InputError, match="example input"):
        frontends.from_torch(Odd(), {"x": 1})


def test_failing_export_is_one_line_and_silent(capfd: pytest.CaptureFixture[str]) -> None:
    class Unknown(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.svdvals(x)

    with pytest.raises(InputError, match="svdvals") as caught:
        exporting.export(Unknown(), torch.randn(2, 3))
    assert "\n" not in str(caught.value)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_traced_condition_is_warned_of() -> None:
    class Branching(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.sum() > 0 else x

    with pytest.warns(torch.jit.TracerWarning):
        exporting.export(Branching(), torch.randn(2, 3), "torchscript")


def test_export_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    for exporter in ("torchscript", "dynamo"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            exporting.export(randomised(Residual()), torch.randn(1, 3, 16, 16), exporter)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
