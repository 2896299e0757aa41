"""The importer in a fresh process, and what a small graph can make it compute."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper

from jointsparse import frontends
from jointsparse.frontends import constant_limits, onnx_import, onnx_rewrites
from jointsparse.frontends.errors import InputError
from tests.frontends.graphs import floats, model

pytest.importorskip("tvm")

X = {"x": (1, 3, 4, 4)}
node = helper.make_node


def _reflecting() -> ModelProto:
    """Reflect padding as the TorchScript exporter writes it: TVM evaluates the pads."""
    ends = {"first": np.array([-1]), "last": np.array([-(2**62)]), "axis": np.array([0]), "back": np.array([-1])}
    constants = {
        "some": np.array([1, 1, 1, 1]),
        "four": np.array([4]),
        "pairs": np.array([-1, 2]),
        "flat": np.array([-1]),
    }
    nodes = [
        node("ConstantOfShape", ["four"], ["none"], value=helper.make_tensor("", TensorProto.INT64, [1], [0])),
        node("Concat", ["some", "none"], ["all"], axis=0),
        node("Reshape", ["all", "pairs"], ["by_axis"]),
        node("Slice", ["by_axis", "first", "last", "axis", "back"], ["turned"]),
        node("Transpose", ["turned"], ["by_end"], perm=[1, 0]),
        node("Reshape", ["by_end", "flat"], ["pads"]),
        node("Pad", ["x", "pads"], ["y"], mode="reflect"),
    ]
    return model(nodes, X, constants | ends)


def test_a_fresh_process_imports_what_tvm_has_to_compile(tmp_path: Path) -> None:
    onnx.save(_reflecting(), tmp_path / "m.onnx")
    program = (
        "import sys; from jointsparse import frontends; mod, _ = frontends.from_onnx(sys.argv[1]);"
        "print([int(a) for a in mod['main'].ret_type.shape])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "m.onnx")], capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.strip() == "[1, 3, 6, 6]"


# --- large values of constants ---------------------------------------------------------------------------------------


def _plus(*nodes: NodeProto, **constants: object) -> ModelProto:
    """x + the sum of all of ``c``, which the nodes compute."""
    ends = [node("ReduceSum", ["c"], ["total"], keepdims=0), node("Add", ["x", "total"], ["y"])]
    arrays = {name: np.asarray(value) for name, value in constants.items()}
    return model([*nodes, *ends], X, arrays, output_shape=(1, 3, 4, 4))


MANY = 2**29
ONE = np.ones((1, 1), np.float32)
LARGE = {
    "ConstantOfShape": _plus(node("ConstantOfShape", ["s"], ["c"]), s=[3 * 10**8, 1, 1, 1]),
    "more than memory": _plus(node("ConstantOfShape", ["s"], ["c"]), s=[2 * 10**10, 1, 1, 1]),
    "Expand": _plus(node("Expand", ["v", "s"], ["c"]), v=ONE, s=[MANY, 1]),
    "Tile": _plus(node("Tile", ["v", "s"], ["c"]), v=ONE, s=[MANY, 1]),
    "Range": _plus(node("Range", ["a", "b", "d"], ["c"]), a=0.0, b=float(MANY), d=1.0),
    "Pad": _plus(node("Pad", ["v", "s"], ["c"]), v=ONE, s=[0, 0, MANY, 0]),
    "Resize": _plus(
        node("Resize", ["v", "", "", "s"], ["c"], mode="nearest"),
        v=np.ones((1, 1, 1, 1), np.float32),
        s=[1, 1, MANY, 1],
    ),
    "OneHot": _plus(node("OneHot", ["i", "d", "v"], ["c"]), i=[0], d=[MANY], v=np.float32([0, 1])),
    "RandomNormal": _plus(node("RandomNormal", [], ["c"], shape=[MANY])),
    "broadcasting": _plus(node("Add", ["u", "v"], ["c"]), u=np.ones((2**15, 1), "f4"), v=np.ones((1, 2**15), "f4")),
    "in steps": _plus(
        *(node("ConstantOfShape", ["s"], [f"c{i}"]) for i in range(40)),
        node("Sum", [f"c{i}" for i in range(40)], ["c"]),
        s=[2**21],
    ),
    "the size computed": _plus(
        node("ReduceProd", ["s"], ["n"], keepdims=1, axes=[0]), node("ConstantOfShape", ["n"], ["c"]), s=[2**10] * 3
    ),
}


@pytest.mark.parametrize("kind", LARGE)
def test_large_values_are_refused_before_they_are_computed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_import, "_import", _unreachable)
    with pytest.raises(InputError, match="computed from constants alone"):
        frontends.from_onnx(LARGE[kind])


def _unreachable(*_: object) -> None:
    raise AssertionError("TVM was asked to import the model")


def test_eye_of_a_large_input() -> None:
    wide = model([node("EyeLike", ["x"], ["y"])], {"x": (2**15, 2**15)}, {})
    with pytest.raises(InputError, match="EyeLike 'y'"):
        frontends.from_onnx(wide)


def test_shapes_that_the_file_claims_count_for_nothing() -> None:
    lying = _plus(node("ConstantOfShape", ["s"], ["c"]), s=[MANY, 1])
    lying.graph.output.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, [1, 1]))
    with pytest.raises(InputError, match="ConstantOfShape 'c'"):
        constant_limits.check(lying, "m")


def test_values_in_branches_count_each_by_itself() -> None:
    def branch(size: int) -> onnx.GraphProto:
        tensor = helper.make_tensor("s", TensorProto.INT64, [1], [size])
        return helper.make_graph(
            [node("ConstantOfShape", ["s"], ["r"])],
            "b",
            [],
            [helper.make_tensor_value_info("r", TensorProto.FLOAT, [None])],
            [tensor],
        )

    for sizes in ((MANY, 1), (1, MANY)):
        nodes = [
            node("ReduceMax", ["x"], ["top"], keepdims=0),
            node("Cast", ["top"], ["is"], to=TensorProto.BOOL),
            node("If", ["is"], ["c"], then_branch=branch(sizes[0]), else_branch=branch(sizes[1])),
        ]
        with pytest.raises(InputError, match="computed from constants alone"):
            constant_limits.check(_plus(*nodes), "m")


def test_a_size_that_cannot_be_told_is_refused() -> None:
    nodes = [
        node("NonZero", ["v"], ["at"]),
        node("ReduceMax", ["at"], ["n"], keepdims=0),
        node("Reshape", ["n", "one"], ["s"]),
        node("ConstantOfShape", ["s"], ["c"]),
    ]
    with pytest.raises(InputError, match="ConstantOfShape 'c' is computed from constants alone and its size cannot"):
        frontends.from_onnx(_plus(*nodes, v=np.ones(9, "f4"), one=[1]))


def test_what_ordinary_models_compute_is_let_through() -> None:
    nonzero = [
        node("ConstantOfShape", ["s"], ["ones"], value=helper.make_tensor("", TensorProto.FLOAT, [1], [1])),
        node("NonZero", ["ones"], ["at"]),
        node("Transpose", ["at"], ["rows"], perm=[1, 0]),
        node("Cast", ["rows"], ["c"], to=TensorProto.FLOAT),
    ]
    for proto in (
        _reflecting(),
        _plus(*nonzero, s=[100]),
        _plus(node("Expand", ["v", "s"], ["c"]), v=ONE, s=[1000, 9]),
    ):
        constant_limits.check(onnx_rewrites.prepare(proto, "m"), "m")


def test_large_tensors_may_be_moved_about() -> None:
    """Four times their bytes, here 8 MB each, besides what any model may compute."""
    nodes = [node("Transpose", ["w"], ["t"], perm=[1, 0]), node("Neg", ["t"], ["c"])]
    constant_limits.check(_plus(*nodes, w=floats(1024, 2048)), "m")
