"""ONNX Runtime on its CPU provider."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from .base import AVX2, Engine, Inputs, Prepared


@dataclass(frozen=True)
class OnnxRuntime(Engine):
    """All graph optimisations, one inference at a time."""

    distribution: ClassVar[str] = "onnxruntime"
    modules: ClassVar[tuple[str, ...]] = ("onnxruntime",)

    def why_not(self, isa: str) -> str | None:
        if isa == AVX2:
            return "ONNX Runtime has no switch for the instruction set"
        return super().why_not(isa)

    def prepare(self, path: Path, inputs: Inputs, threads: int) -> Prepared:
        session = open_session(path, threads)
        feed = dict(inputs)
        last: list[Any] = []

        def run() -> None:
            last[:] = session.run(None, feed)

        return Prepared(run, lambda: list(last))


def open_session(path: Path, threads: int) -> Any:
    """An ``onnxruntime.InferenceSession`` of so many threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
