"""What a person meets: training, quantisation, the compressed file, import from ONNX and torch.

Names are imported when first used: training needs torch and no TVM, reading a file or ONNX needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .approximation import approximate
    from .errors import InputError
    from .inspection import ModelInfo, inspect
    from .joint_sparsity import JointSparsity
    from .model_file import decompress, load, save
    from .one_shot import compress
    from .onnx_import import from_onnx, from_torch
    from .quantization import CodebookTuner, quantize_, step_for_bits
    from .rate_aware import quantize_within_

_HOMES = {
    "CodebookTuner": "quantization",
    "InputError": "errors",
    "JointSparsity": "joint_sparsity",
    "ModelInfo": "inspection",
    "approximate": "approximation",
    "compress": "one_shot",
    "decompress": "model_file",
    "from_onnx": "onnx_import",
    "from_torch": "onnx_import",
    "inspect": "inspection",
    "load": "model_file",
    "quantize_": "quantization",
    "quantize_within_": "rate_aware",
    "save": "model_file",
    "step_for_bits": "quantization",
}

__all__ = [
    "CodebookTuner",
    "InputError",
    "JointSparsity",
    "ModelInfo",
    "approximate",
    "compress",
    "decompress",
    "from_onnx",
    "from_torch",
    "inspect",
    "load",
    "quantize_",
    "quantize_within_",
    "save",
    "step_for_bits",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
