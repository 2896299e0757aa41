"""ONNX and torch models to Relay, through TVM 0.19's importer.

TVM's classes are not patched: ``onnx_rewrites`` makes the graph fit for its importer first.
"""

from __future__ import annotations

import os
import sys
import threading
import types
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper

from . import batch_norm, constant_limits, onnx_graph, onnx_rewrites, winograd_spec
from .errors import InputError

if TYPE_CHECKING:
    import torch
    import tvm

_lock = threading.RLock()


def from_onnx(
    source: onnx_graph.Source, shape: Mapping[str, tuple[int, ...]] | None = None
) -> tuple[tvm.IRModule, dict[str, tvm.nd.NDArray]]:
    """Relay module and parameters of an ONNX file or ModelProto, BatchNorm folded.

    Args:
        source: a file (weights in other files beside it included) or a model. It is not changed.
        shape: shapes of inputs by name. An open first axis without one becomes 1; another open axis is an error.

    Returns:
        (mod, params): weights of convolutions and dense layers, and their biases, are ``params`` under the names of
        the initializers, float32; ``mod`` has the attribute ``jointsparse.winograd`` if the model carries thresholds.

    Raises:
        InputError: the file is missing or no valid model, or has what TVM 0.19 cannot import.
    """
    model, name = onnx_graph.read(source)
    onnx_graph.fix_input_shapes(model, dict(shape) if shape else None, name)
    return to_relay(model, name)


def to_relay(model: ModelProto, name: str) -> tuple[tvm.IRModule, dict[str, tvm.nd.NDArray]]:
    """``from_onnx`` for a checked model of fixed shapes, which is changed; ``name`` is for messages."""
    onnx_graph.tidy(model, name)
    batch_norm.fold(model)
    spec = _spec(model, name)
    model = onnx_rewrites.prepare(model, name)
    constant_limits.check(model, name)
    mod, params = _import(model, name)
    return (mod.with_attr(winograd_spec.KEY, spec) if spec else mod), params


def from_torch(module: torch.nn.Module, example_input: Any) -> tuple[tvm.IRModule, dict[str, tvm.nd.NDArray]]:
    """Relay module and parameters of a torch module in evaluation mode, as ``from_onnx``.

    Args:
        example_input: a tensor, or a tuple of tensors for several inputs; it fixes all shapes.

    Raises:
        InputError: the module cannot be exported or imported.
    """
    from . import exporting

    return from_onnx(exporting.export(module, example_input))


def _spec(model: ModelProto, name: str) -> str | None:
    """The model's thresholds, checked, as canonical JSON."""
    text = onnx_graph.metadata(model, winograd_spec.KEY)
    if text is None:
        return None
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    return winograd_spec.dump(winograd_spec.parse(text, shapes, name))


# --- the import ------------------------------------------------------------------------------------------------------


def _import(model: ModelProto, name: str) -> tuple[Any, dict[str, Any]]:
    os.environ.setdefault("TOPHUB_LOCATION", "NONE")
    from tvm import relay

    from ..schedules import llvm_workaround
    from . import gather_indices

    llvm_workaround.apply()  # the importer compiles what it evaluates
    with _onnx_mapping(), warnings.catch_warnings():
        # TVM warns that axes are no attribute of this opset, which they are on purpose.
        warnings.simplefilter("ignore")
        try:
            mod, params = relay.frontend.from_onnx(model, freeze_params=False)
            mod = relay.transform.DynamicToStatic()(gather_indices.plain(mod))
            return relay.transform.InferType()(mod), params
        # The importer lets everything through: its own errors, assertions, AttributeError, C++ errors of TVM.
        except Exception as error:
            raise InputError(f"{name}: TVM's importer fails: {onnx_graph.first_line(error)}") from error


@contextmanager
def _onnx_mapping() -> Iterator[None]:
    """onnx 1.19 dropped ``onnx.mapping``, which the importer reads: put the one table it wants there, for this long."""
    with _lock:
        if hasattr(onnx, "mapping") or "onnx.mapping" in sys.modules:
            yield
            return
        mapping = types.ModuleType("onnx.mapping")
        mapping.TENSOR_TYPE_TO_NP_TYPE = _numpy_types()  # type: ignore[attr-defined]
        sys.modules["onnx.mapping"] = mapping
        onnx.mapping = mapping  # type: ignore[attr-defined]
        try:
            yield
        finally:
            del sys.modules["onnx.mapping"]
            del onnx.mapping  # type: ignore[attr-defined]


def _numpy_types() -> dict[int, np.dtype[Any]]:
    found = {}
    for number in TensorProto.DataType.values():
        try:
            found[number] = np.dtype(helper.tensor_dtype_to_np_dtype(number))
        except (KeyError, TypeError, ValueError):
            continue
    return found
