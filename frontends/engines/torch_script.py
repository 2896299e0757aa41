"""PyTorch: the model as TorchScript, traced and frozen."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

from .base import AVX2, ONEDNN_AVX2, Engine, Inputs, Prepared

TRIALS = 5
"""Runs that decide between two forms of the frozen graph."""


@dataclass(frozen=True)
class TorchScript(Engine):
    """The ONNX graph as a torch module (``onnx_module``), traced and frozen; with or without the rewriting for
    inference, whichever is faster here."""

    distribution: ClassVar[str] = "torch"
    modules: ClassVar[tuple[str, ...]] = ("torch",)

    def environment(self, isa: str) -> dict[str, str]:
        # Each thread to a core of its own among those that the process is pinned to.
        bound = {"OMP_PROC_BIND": "true"}
        if isa != AVX2:
            return bound
        return {**bound, **ONEDNN_AVX2, "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}

    def prepare(self, path: Path, inputs: Inputs, threads: int) -> Prepared:
        import onnx
        import torch

        from .onnx_module import OnnxModule

        torch.set_num_threads(threads)
        module = OnnxModule(onnx.load(path))
        tensors = tuple(torch.from_numpy(inputs[name].copy()) for name in module.inputs)
        with torch.no_grad(), warnings.catch_warnings():
            # TorchScript is deprecated, and still the form in which frozen graphs run without a compiler.
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(module.eval(), tensors, check_trace=False)
            # Rewriting changes the graph in place: it gets one of its own.
            frozen, rewritten = torch.jit.freeze(traced), torch.jit.optimize_for_inference(torch.jit.freeze(traced))
        chosen = min((frozen, rewritten), key=lambda form: _seconds(form, tensors))
        last: list[Any] = []

        def run() -> None:
            with torch.inference_mode():
                last[:] = chosen(*tensors)

        return Prepared(run, lambda: [value.numpy() for value in last])


def _seconds(form: Any, tensors: tuple[Any, ...]) -> float:
    import torch

    least = math.inf
    with torch.inference_mode():
        # The first runs specialise the graph.
        for _ in range(2 + TRIALS):
            start = perf_counter()
            form(*tensors)
            least = min(least, perf_counter() - start)
    return least
