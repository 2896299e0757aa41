"""What passes the import and fails in TVM's build."""

from __future__ import annotations

from pathlib import Path

import pytest
from onnx import helper

from jointsparse.frontends.compiling import compile_model
from jointsparse.frontends.errors import InputError
from tests.frontends.graphs import floats, model
from tests.frontends.onnx_models import write

pytest.importorskip("tvm")


def test_an_option_that_the_build_does_not_support(tmp_path: Path) -> None:
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], dilations=[2, 2])
    path = write(model([node], {"x": (1, 3, 8, 8)}, {"w": floats(3, 4, 3, 3)}), tmp_path / "model.onnx")
    with pytest.raises(
        InputError, match=r"model\.onnx: TVM cannot build it for llvm: not support dilate now"
    ) as raised:
        compile_model(path, "llvm", tmp_path / "m.tar")
    assert isinstance(raised.value.__cause__, AssertionError)
    assert list(tmp_path.iterdir()) == [path]
