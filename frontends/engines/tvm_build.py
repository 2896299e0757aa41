"""Packages compiled here: the sparse builds, and TVM's own dense one."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

from ...passes.plan import TILE
from ..compiling import compile_model
from ..target_strings import host_target
from .base import AVX2, Build, Engine, Inputs, LeftOut, Prepared
from .sources import digest

# TVM's ThreadGroup::kSpecifyOneCorePerThread.
_ONE_CORE_PER_THREAD = -2

AVX2_TARGET = "llvm -mcpu=haswell"
"""The first CPU with AVX2 and FMA."""


@dataclass(frozen=True)
class TvmBuild(Engine):
    """``sparsify`` for a domain and ``relay.build``, by default for the domain that is its name."""

    domain: str = field(default="", kw_only=True)

    distribution: ClassVar[str] = "xtc-tvm-python-bindings"
    modules: ClassVar[tuple[str, ...]] = ("tvm", "tvm.contrib.graph_executor", "tvm.driver.tvmc.model")
    ahead_of_time: ClassVar[bool] = True

    def version(self) -> str:
        """Of TVM, and of jointsparse with its sources, so that results of other kernels are told apart."""
        try:
            import tvm
        except ImportError:
            raise LeftOut("Apache TVM 0.19 is not installed; install jointsparse anew") from None
        try:
            own = version("jointsparse")
        except PackageNotFoundError:  # run from the sources
            own = "0"
        # The passes may put layers together for dense kernels, too.
        return f"{own}+{digest()}, TVM {tvm.__version__}"

    def target(self, isa: str) -> str:
        """The TVM target of an instruction set."""
        return AVX2_TARGET if isa == AVX2 else host_target()

    def build(self, model: Path, folder: Path, isa: str) -> Build:
        package = folder / f"{self.name}-{isa}.tar"
        plan = compile_model(model, self.target(isa), package, domain=self.domain or self.name)
        layers = json.loads(plan.to_json())["layers"]
        # The plan drops the ending that torch gives the names of weights.
        kernels = [layer.name for layer in plan if layer.kernel in TILE]
        winograd = (*kernels, *(f"{name}.weight" for name in kernels))
        return Build(package, winograd, tuple(layers))

    def prepare(self, path: Path, inputs: Inputs, threads: int) -> Prepared:
        import tvm
        from tvm.contrib import graph_executor

        bind_threads(threads)
        graph, library, parameters = open_package(path)
        executor = graph_executor.create(graph, library, tvm.cpu())
        executor.load_params(parameters)
        for name, value in inputs.items():
            executor.set_input(name, value)

        def outputs() -> list[Any]:
            return [executor.get_output(i).numpy() for i in range(executor.get_num_outputs())]

        return Prepared(executor.module["run"], outputs)


def bind_threads(threads: int) -> None:
    """Give each of TVM's threads a core of its own among those that this process may use.

    By itself TVM takes the first cores of the machine, whatever the process is pinned to.
    """
    import tvm

    if hasattr(os, "sched_getaffinity"):
        cores = [str(cpu) for cpu in sorted(os.sched_getaffinity(0))][:threads]
        tvm.get_global_func("runtime.config_threadpool")(_ONE_CORE_PER_THREAD, threads, cores)


def open_package(path: Path) -> tuple[str, Any, bytes]:
    """Graph (JSON), loaded library and parameters of a package."""
    import tvm
    from tvm.driver.tvmc.model import TVMCPackage

    package = TVMCPackage(str(path))
    return package.graph, tvm.runtime.load_module(package.lib_path), package.params
