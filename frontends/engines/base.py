"""What an engine is to the measurement."""

from __future__ import annotations

import platform
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

from numpy.typing import NDArray

from ..errors import InputError

NATIVE, AVX2 = "native", "avx2"
ISAS = (NATIVE, AVX2)
"""Instruction sets: all that this CPU has, or no more than AVX2 with FMA."""

Inputs = Mapping[str, NDArray[Any]]


class LeftOut(InputError):
    """An engine cannot take part; the message says why, in one line."""


@dataclass(frozen=True)
class Build:
    """What an engine made of a model ahead of time.

    Attributes:
        path: of the file that ``prepare`` reads.
        winograd: names that include the weights computed by Winograd kernels, for which the model's thresholds count.
        layers: one object a convolution, as in ``Plan.to_json``; empty for peers.
    """

    path: Path
    winograd: tuple[str, ...] = ()
    layers: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Prepared:
    """A model ready to run.

    Attributes:
        run: computes once, on inputs set before. outputs: of the last run, in the model's order.
    """

    run: Callable[[], object]
    outputs: Callable[[], list[NDArray[Any]]]


@dataclass(frozen=True)
class Engine(ABC):
    """One way to run an ONNX model on this CPU.

    Attributes:
        name: on the command line and in JSON. title: for people.
        precision: fp32, bf16 or int8.
    """

    name: str
    title: str
    precision: str = field(default="fp32", kw_only=True)

    distribution: ClassVar[str]
    """What pip calls it."""
    modules: ClassVar[tuple[str, ...]]
    """What ``prepare`` imports."""
    ahead_of_time: ClassVar[bool] = False
    """Whether ``build`` does anything."""

    def version(self) -> str:
        """Raises LeftOut where the engine is not installed."""
        try:
            return version(self.distribution)
        except PackageNotFoundError:
            raise LeftOut(
                f"{self.distribution} is not installed; pip install {self.distribution}, or 'jointsparse[bench]'"
            ) from None

    def load(self) -> None:
        """Import the engine's modules, so that memory can be told apart: theirs and the model's."""
        for module in self.modules:
            import_module(module)

    def why_not(self, isa: str) -> str | None:
        """Why this engine cannot be held to an instruction set, None if it can."""
        if isa == AVX2 and platform.machine().lower() not in ("x86_64", "amd64"):
            return f"this machine is {platform.machine()}"
        return None

    def environment(self, isa: str) -> dict[str, str]:
        """Environment variables that hold the engine to an instruction set, and its threads to cores.

        Libraries read them when they are loaded.
        """
        return {}

    def build(self, model: Path, folder: Path, isa: str) -> Build:
        """Translate the model into a file in ``folder``, where that is done ahead of time.

        Raises:
            LeftOut, InputError: the engine cannot take the model.
        """
        return Build(model)

    @abstractmethod
    def prepare(self, path: Path, inputs: Inputs, threads: int) -> Prepared:
        """Load what ``build`` left and set the inputs, by name. In a process that runs nothing else.

        Raises:
            LeftOut: the engine cannot take the model.
        """


ONEDNN_AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "DNNL_MAX_CPU_ISA": "AVX2"}
"""Holds oneDNN, the library under OpenVINO and PyTorch, to AVX2."""
