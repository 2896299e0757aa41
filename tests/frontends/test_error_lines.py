"""Errors of TVM, ONNX and Python cut to the one line that says what is wrong."""

from __future__ import annotations

import traceback
from collections.abc import Callable

import numpy as np
import pytest
from onnx import helper

from jointsparse.frontends import onnx_graph, onnx_import
from tests.frontends.graphs import model

tvm = pytest.importorskip("tvm")


def _line(action: Callable[[], object]) -> str:
    with pytest.raises(Exception) as raised:  # noqa: PT011 - whatever it is
        action()
    return onnx_graph.first_line(raised.value)


def test_the_message_stands_behind_tvms_stack() -> None:
    node = helper.make_node("Split", ["x"], ["y", "z"], axis=1, num_outputs=2)
    proto = model([node], {"x": [1, 5, 4, 4]}, {}, ("y", "z"), 18)

    def convert() -> None:
        with onnx_import._onnx_mapping():
            mod, _ = tvm.relay.frontend.from_onnx(proto)
        tvm.relay.transform.InferType()(mod)

    line = _line(convert)
    assert line.startswith("InternalError: Check failed:")
    assert "indices_or_sections need to be able to divide input.shape" in line


def test_the_message_of_a_type_error_of_relay() -> None:
    total = tvm.relay.var("x", shape=(2, 3)) + tvm.relay.var("w", shape=(4, 5))
    line = _line(lambda: tvm.relay.transform.InferType()(tvm.IRModule.from_expr(total)))
    assert line.startswith("DiagnosticError: one or more error diagnostics were emitted")


def test_the_message_of_a_python_function_that_tvm_calls() -> None:
    def fails() -> None:
        raise ValueError("no such layout\nmore about it")

    line = _line(tvm.runtime.convert(fails))
    assert line in ("no such layout", "ValueError: no such layout")


def test_no_memory_reads_so() -> None:
    assert _line(lambda: tvm.nd.empty((10**17,))) == "out of memory"
    assert _line(lambda: np.empty(10**15)).startswith("Unable to allocate")


def test_a_python_traceback_as_text() -> None:
    try:
        raise ValueError("the cause")
    except ValueError:
        assert onnx_graph.first_line(RuntimeError(traceback.format_exc())) == "ValueError: the cause"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("plain\nsecond", "plain"),
        ("", "RuntimeError"),
        ("Traceback (most recent call last):\n  3: tvm::f()\n", "RuntimeError"),
        ("Traceback (most recent call last):\n  0: tvm::f()\nTVMError: \n---\n  the message", "TVMError: the message"),
        ("x" * 400, "x" * 297 + "..."),
    ],
)
def test_shapes_of_texts(text: str, line: str) -> None:
    assert onnx_graph.first_line(RuntimeError(text)) == line
