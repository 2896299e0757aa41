"""Inputs for measurements: of no meaning, but the same for every engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from ..errors import InputError


def random_inputs(model: Path, seed: int = 0) -> dict[str, NDArray[Any]]:
    """An array in [0, 1) for each floating-point input of an ONNX file, by name; zeros for other types.

    Raises:
        InputError: an input has an open axis.
    """
    graph = onnx.load(model, load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    rng = np.random.default_rng(seed)
    found: dict[str, NDArray[Any]] = {}
    for value in graph.input:
        if value.name in constants:
            continue
        tensor = value.type.tensor_type
        shape = [axis.dim_value for axis in tensor.shape.dim]
        if not all(shape):
            raise InputError(f"{model}: input {value.name!r} has an open axis; fix its shape")
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        found[value.name] = rng.random(shape).astype(dtype) if dtype.kind == "f" else np.zeros(shape, dtype)
    return found
