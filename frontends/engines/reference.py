"""What a model's outputs should be."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from .. import batch_norm, onnx_graph, winograd_spec
from .base import LeftOut
from .onnx_runtime import open_session


def compute(
    path: Path, winograd: Collection[str], inputs: Mapping[str, NDArray[Any]]
) -> tuple[list[NDArray[Any]], str]:
    """Outputs of an ONNX model, and how they were computed.

    In double precision by PyTorch, with the thresholds of the weights in ``winograd`` applied. Where torch is missing
    or an operator is not known there, by ONNX Runtime, but only if no thresholds count.

    Raises:
        LeftOut: neither can.
    """
    try:
        return _double(path, winograd, inputs), "PyTorch, double precision"
    except (LeftOut, ImportError) as error:
        if winograd:
            raise LeftOut(f"nothing to compare with: {error}") from None
    try:
        return open_session(path, 1).run(None, dict(inputs)), "ONNX Runtime"
    except ImportError:
        raise LeftOut("nothing to compare with: neither torch nor onnxruntime is installed") from None


def _double(path: Path, winograd: Collection[str], inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    import torch

    from .onnx_module import OnnxModule

    model = onnx.load(path)
    onnx_graph.tidy(model, str(path))
    # Thresholds are for the folded weights then, as the kernels have them.
    batch_norm.fold(model)
    text = onnx_graph.metadata(model, winograd_spec.KEY)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    spec = winograd_spec.parse(text, shapes, str(path)) if text else {}
    module = OnnxModule(model, {name: spec[name] for name in winograd if name in spec}).double()
    tensors = (torch.from_numpy(np.asarray(inputs[name])) for name in module.inputs)
    with torch.no_grad():
        return [value.numpy() for value in module(*(t.double() if t.is_floating_point() else t for t in tensors))]
