"""Engines that run the same model on this machine, builds made here and their peers, and one way to measure them."""

from __future__ import annotations

from ..errors import InputError
from .base import AVX2, ISAS, NATIVE, Engine, LeftOut
from .onnx_runtime import OnnxRuntime
from .openvino_runtime import OpenVino
from .torch_script import TorchScript
from .tvm_build import TvmBuild

__all__ = ["AVX2", "ENGINES", "ISAS", "NATIVE", "OURS", "PEERS", "Engine", "LeftOut", "find_engine"]

ENGINES: dict[str, Engine] = {
    engine.name: engine
    for engine in (
        TvmBuild("spatial", "spatial"),
        TvmBuild("winograd", "Winograd"),
        TvmBuild("auto", "auto"),
        TvmBuild("tvm", "TVM dense", domain="dense"),
        OnnxRuntime("onnxruntime", "ONNX Runtime"),
        OpenVino("openvino", "OpenVINO"),
        TorchScript("torch", "PyTorch"),
        OpenVino("openvino-bf16", "OpenVINO bf16", precision="bf16"),
        OpenVino("openvino-int8", "OpenVINO int8", precision="int8"),
    )
}
"""By name. Other precisions than fp32 are a class of their own: shown beside the rest, never the reference."""

OURS = ("spatial", "winograd", "auto")
"""The sparse builds."""

PEERS = tuple(name for name, engine in ENGINES.items() if name not in OURS and engine.precision == "fp32")
"""Dense fp32 engines, the fastest of which is the reference."""


def find_engine(name: str) -> Engine:
    """The engine of this name.

    Raises:
        InputError: there is none.
    """
    if name not in ENGINES:
        raise InputError(f"unknown engine {name!r}; choose from {', '.join(ENGINES)}")
    return ENGINES[name]
