"""Measurements from outside: each job in a new process, one at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from . import NATIVE, Engine, LeftOut
from .inputs import random_inputs

TOLERANCE = 1e-4
"""Relative RMS error that an fp32 engine may have."""


@dataclass(frozen=True)
class Setting:
    """How to measure.

    Attributes:
        threads: cores to use. isa: one of ``ISAS``. seconds: for one measurement.
        layers: time every operator of packages as well.
    """

    threads: int = 1
    isa: str = NATIVE
    seconds: float = 5.0
    layers: bool = False


@dataclass(frozen=True)
class Measurement:
    """What one engine did with one model; None where it does not apply.

    Attributes:
        engine, threads, isa: what was measured. seconds: for how long. version: of the engine.
        left_out: why there are no times; None if there are.
        error: relative RMS error against the reference; None if infinite, too. min_ms, median_ms: of ``runs`` runs.
        peak_bytes: most memory held to load and run the model once, the engine's own libraries not counted.
        build_seconds, build_bytes: of the package.
        plan: the package's convolutions, as in ``Plan.to_json``.
        operators: of the package, with ``name``, ``layer``, ``ms``, ``multiply_adds``.
        peak_gmacs: 1e9 multiply-adds a second that the cores used could do.
        rounds: how often it was measured; this is the time with the least ``min_ms``.
    """

    engine: str
    threads: int
    isa: str
    seconds: float
    version: str | None = None
    left_out: str | None = None
    error: float | None = None
    min_ms: float | None = None
    median_ms: float | None = None
    runs: int | None = None
    peak_bytes: int | None = None
    build_seconds: float | None = None
    build_bytes: int | None = None
    plan: list[dict[str, Any]] | None = None
    operators: list[dict[str, Any]] | None = None
    peak_gmacs: float | None = None
    rounds: int = 1


@dataclass
class Workbench:
    """One model, its reference outputs and the engines' builds of it, all kept in a folder.

    Attributes:
        model: an ONNX file of fixed shapes. folder: for the files, exists.
    """

    model: Path
    folder: Path
    _builds: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    _references: dict[tuple[str, ...], Path | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.inputs = self.folder / "inputs.npz"
        np.savez(self.inputs, **random_inputs(self.model))  # type: ignore[arg-type]  # its stub takes all for options

    def measure(self, engine: Engine, setting: Setting) -> Measurement:
        """Build, compare with the reference and time; what cannot be is in ``left_out``."""
        known: dict[str, Any] = {
            "engine": engine.name,
            "threads": setting.threads,
            "isa": setting.isa,
            "seconds": setting.seconds,
        }
        try:
            known["version"] = engine.version()
            if reason := engine.why_not(setting.isa):
                raise LeftOut(reason)
            made = self._build(engine, setting.isa)
            if engine.ahead_of_time:
                known |= {"build_seconds": made["seconds"], "build_bytes": made["bytes"]}
            known["plan"] = made["layers"] or None
            known |= self._time(engine, made, setting)
            if setting.layers and made["layers"] and "left_out" not in known:
                known |= self._layers(engine, made, setting)
        except LeftOut as error:
            known["left_out"] = str(error)
        return Measurement(**known)

    def _build(self, engine: Engine, isa: str) -> dict[str, Any]:
        if not engine.ahead_of_time:
            return {"path": str(self.model), "winograd": [], "layers": []}
        if (engine.name, isa) not in self._builds:
            self._builds[engine.name, isa] = run_job(
                "build", {}, engine=engine.name, model=str(self.model), folder=str(self.folder), isa=isa
            )
        return self._builds[engine.name, isa]

    def _time(self, engine: Engine, made: dict[str, Any], setting: Setting) -> dict[str, Any]:
        reference = self._reference(tuple(sorted(made["winograd"])))
        return run_job(
            "time",
            environment(engine, setting),
            allowed=("error",),
            engine=engine.name,
            path=made["path"],
            inputs=str(self.inputs),
            reference=None if reference is None else str(reference),
            tolerance=TOLERANCE if engine.precision == "fp32" else None,
            threads=setting.threads,
            seconds=setting.seconds,
        )

    def _layers(self, engine: Engine, made: dict[str, Any], setting: Setting) -> dict[str, Any]:
        return run_job(
            "layers",
            environment(engine, setting),
            path=made["path"],
            inputs=str(self.inputs),
            plan=made["layers"],
            isa=setting.isa,
            threads=setting.threads,
            seconds=setting.seconds,
        )

    def _reference(self, winograd: tuple[str, ...]) -> Path | None:
        """The outputs that builds with these Winograd layers should have; None where they cannot be had."""
        if winograd not in self._references:
            path = self.folder / f"reference{len(self._references)}.npz"
            try:
                run_job(
                    "reference",
                    {},
                    model=str(self.model),
                    winograd=list(winograd),
                    inputs=str(self.inputs),
                    outputs=str(path),
                )
            except LeftOut:
                self._references[winograd] = None
            else:
                self._references[winograd] = path
        return self._references[winograd]


def environment(engine: Engine, setting: Setting) -> dict[str, str]:
    """Variables that hold a process to the threads and the instruction set."""
    count = str(setting.threads)
    return {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
        "TVM_NUM_THREADS": count,
        **engine.environment(setting.isa),
    }


def run_job(kind: str, variables: dict[str, str], allowed: tuple[str, ...] = (), **arguments: Any) -> dict[str, Any]:
    """Do a job of ``worker`` in a new process, its output kept off the terminal, and give its result.

    Args:
        allowed: keys that may stand beside ``left_out`` in a result; such a result is given back like another.

    Raises:
        LeftOut: the engine cannot take part, or the process died; what it said last.
    """
    with tempfile.TemporaryDirectory() as folder:
        job, result = Path(folder, "job.json"), Path(folder, "result.json")
        job.write_text(json.dumps({"kind": kind, **arguments}))
        done = subprocess.run(
            [sys.executable, "-m", f"{__package__}.worker", str(job), str(result)],
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
            raise LeftOut(f"failed ({kind}, exit code {done.returncode}): {lines[-1]}")
        answer = json.loads(result.read_text())
    if "left_out" in answer and not set(answer) & set(allowed):
        raise LeftOut(answer["left_out"])
    return answer


def check_setting(setting: Setting) -> None:
    """Raises InputError for more threads than there are cores, or a time that is none."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not 1 <= setting.threads <= cores:
        raise InputError(f"{setting.threads} threads asked for; this process may use 1 to {cores}")
    if not setting.seconds > 0:
        raise InputError(f"{setting.seconds:g} seconds a measurement; give more than 0")
