"""OpenVINO's CPU plugin in fp32, bf16 and int8."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..outputs import replacing
from .base import AVX2, ONEDNN_AVX2, Build, Engine, Inputs, LeftOut, Prepared
from .inputs import random_inputs

CALIBRATION_SAMPLES = 4
"""Random inputs that set the activations' ranges: enough for timing, not for accuracy."""


@dataclass(frozen=True)
class OpenVino(Engine):
    """One stream, tuned for latency.

    int8: weights (by channel) and activations, quantised by ONNX Runtime's static quantiser on random inputs into the
    form (QDQ) that OpenVINO turns into integer kernels; what stays floating point is as OpenVINO chooses.
    """

    distribution: ClassVar[str] = "openvino"
    modules: ClassVar[tuple[str, ...]] = ("openvino",)

    @property
    def ahead_of_time(self) -> bool:  # type: ignore[override]  # depends on the precision here
        return self.precision == "int8"

    def why_not(self, isa: str) -> str | None:
        if isa == AVX2 and self.precision == "bf16":
            return "bfloat16 needs more than AVX2"
        return super().why_not(isa)

    def environment(self, isa: str) -> dict[str, str]:
        return dict(ONEDNN_AVX2) if isa == AVX2 else {}

    def build(self, model: Path, folder: Path, isa: str) -> Build:
        if self.precision != "int8":
            return Build(model)
        quantised = folder / "int8.onnx"
        if not quantised.exists():
            _quantise(model, quantised)
        return Build(quantised)

    def prepare(self, path: Path, inputs: Inputs, threads: int) -> Prepared:
        import openvino

        core = openvino.Core()
        if self.precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise LeftOut("this CPU does not multiply bfloat16")
        options: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            # Without it two threads were found to share one of the two cores that the process is pinned to.
            "ENABLE_CPU_PINNING": True,
        }
        hint = {"fp32": "f32", "bf16": "bf16"}.get(self.precision)
        if hint:
            options["INFERENCE_PRECISION_HINT"] = hint
        request = core.compile_model(core.read_model(path), "CPU", options).create_infer_request()
        for name, value in inputs.items():
            request.set_tensor(name, openvino.Tensor(np.ascontiguousarray(value)))
        count = len(request.model_outputs)

        def outputs() -> list[Any]:
            return [np.array(request.get_output_tensor(i).data) for i in range(count)]

        return Prepared(request.infer, outputs)


def _quantise(model: Path, destination: Path) -> None:
    """Write ``model`` with int8 weights and activations."""
    try:
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    except ImportError:
        raise LeftOut("int8 needs onnxruntime to quantise with; pip install onnxruntime") from None
    samples = [random_inputs(model, seed) for seed in range(1, 1 + CALIBRATION_SAMPLES)]
    # It advises on pre-processing at every call.
    logging.getLogger().setLevel(logging.ERROR)
    with replacing(destination) as temporary:
        quantize_static(
            model,
            temporary,
            _Samples(samples),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )


class _Samples:
    """What the quantiser wants to read calibration data from."""

    def __init__(self, samples: list[Any]) -> None:
        self.remaining = iter(samples)

    def get_next(self) -> Any:
        return next(self.remaining, None)

    def rewind(self) -> None:
        raise RuntimeError("calibration reads its samples once")
