"""Measurements from outside: every engine in a process of its own, all of them in turn."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from . import NATIVE, Engine, LeftOut
from .inputs import random_inputs
from .processes import Process, run_job

TOLERANCE = 1e-4
"""Relative RMS error that an fp32 engine may have."""

MIN_TURNS = 10
"""Of each engine, however long one takes."""

TURN_SECONDS = 0.1
"""Of one turn: many short runs, and yet all engines meet the same spell of a machine that others use as well."""

REST_SECONDS = 0.1
"""After a turn of several threads: so long may those that were helping wait for more work before they sleep."""


@dataclass(frozen=True)
class Setting:
    """How to measure.

    Attributes:
        threads: cores to use. isa: one of ``ISAS``. seconds: for each engine, all its turns together.
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
        turns_ms: the median of each turn, in their order; the turns of all engines measured together go with each
            other.
        peak_bytes: most memory held to load and run the model once, the engine's own libraries not counted.
        build_seconds, build_bytes: of the package.
        plan: the package's convolutions, as in ``Plan.to_json``.
        operators: of the package, with ``name``, ``layer``, ``ms``, ``multiply_adds``.
        peak_gmacs: 1e9 multiply-adds a second that the cores used could do.
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
    turns_ms: list[float] | None = None
    peak_bytes: int | None = None
    build_seconds: float | None = None
    build_bytes: int | None = None
    plan: list[dict[str, Any]] | None = None
    operators: list[dict[str, Any]] | None = None
    peak_gmacs: float | None = None


@dataclass
class Contestant:
    """An engine with a model loaded, in a process that waits for its turn.

    Attributes:
        measurement: what is known of it so far. process: None once it is out. turns: seconds of every run.
    """

    measurement: Measurement
    process: Process | None
    turns: list[list[float]] = field(default_factory=list)

    def take_turn(self, seconds: float) -> None:
        """Run for so long; one that dies is out."""
        assert self.process is not None
        self.process.tell(seconds)
        try:
            answer = self.process.answer()
            if isinstance(answer, dict):
                raise LeftOut(answer["left_out"])
            self.turns.append(answer)
        except LeftOut as error:
            self.process = None
            self.measurement = replace(self.measurement, left_out=str(error))

    def wants_turns(self) -> bool:
        """Whether it has not been measured for long enough."""
        measured = sum(map(sum, self.turns))
        return self.process is not None and (len(self.turns) < MIN_TURNS or measured < self.measurement.seconds)

    def result(self) -> Measurement:
        """The measurement, with times unless it is out."""
        if self.measurement.left_out is not None:
            return self.measurement
        runs = list(chain.from_iterable(self.turns))
        return replace(
            self.measurement,
            min_ms=1e3 * min(runs),
            median_ms=1e3 * statistics.median(runs),
            runs=len(runs),
            turns_ms=[1e3 * statistics.median(turn) for turn in self.turns],
        )


@dataclass(frozen=True)
class Entry:
    """What is to be measured: an engine, in a setting, with the model of a workbench."""

    workbench: Workbench
    engine: Engine
    setting: Setting


def compare(entries: Sequence[Entry], progress: Callable[[str], None] = lambda stage: None) -> list[Measurement]:
    """Load all, then measure them turn by turn, one at a time, until each has been measured for long enough.

    A machine that others use as well is faster now than a moment later: engines measured one after the other would be
    compared by their luck.

    Args:
        progress: told the name of each engine as it is built, loaded and checked.

    Returns:
        One measurement an entry, in their order.
    """
    with ExitStack() as stack:
        contestants = []
        for entry in entries:
            progress(entry.engine.title)
            entry.workbench.build(entry.engine, entry.setting.isa)
        # Not before all are built: compilers need memory as well.
        for entry in entries:
            contestants.append(entry.workbench.enter(entry.engine, entry.setting, stack))
        take_turns(contestants)
        measurements = [contestant.result() for contestant in contestants]
    return [entry.workbench.with_operators(one, entry) for one, entry in zip(measurements, entries, strict=True)]


def take_turns(contestants: Sequence[Contestant]) -> None:
    """Turns of all, in their order, as long as any of them wants one."""
    while any(one.wants_turns() for one in contestants):
        for one in contestants:
            if one.process is None:
                continue
            one.take_turn(min(TURN_SECONDS, one.measurement.seconds / MIN_TURNS))
            if one.measurement.threads > 1:
                time.sleep(REST_SECONDS)


@dataclass
class Workbench:
    """One model, its reference outputs and the engines' builds of it, all kept in a folder.

    Attributes:
        model: an ONNX file of fixed shapes. folder: for the files, exists.
    """

    model: Path
    folder: Path
    _builds: dict[tuple[str, str], dict[str, Any] | LeftOut] = field(default_factory=dict)
    _references: dict[tuple[str, ...], Path | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.inputs = self.folder / "inputs.npz"
        np.savez(self.inputs, **random_inputs(self.model))  # type: ignore[arg-type]  # its stub takes all for options

    def build(self, engine: Engine, isa: str) -> None:
        """Do ahead of time what an engine does then; what stands against it is told by ``enter``."""
        with suppress(LeftOut):
            if engine.why_not(isa) is None:
                self._build(engine, isa)

    def enter(self, engine: Engine, setting: Setting, stack: ExitStack) -> Contestant:
        """Build, load and compare with the reference; what cannot be is in ``left_out``. The process ends with the
        stack."""
        known = Measurement(engine.name, setting.threads, setting.isa, setting.seconds)
        process = None
        try:
            known = replace(known, version=engine.version())
            if reason := engine.why_not(setting.isa):
                raise LeftOut(reason)
            made = self._build(engine, setting.isa)
            if engine.ahead_of_time:
                known = replace(known, build_seconds=made["seconds"], build_bytes=made["bytes"])
            known = replace(known, plan=made["layers"] or None)
            process = stack.enter_context(self._load(engine, made, setting))
            # The answer: the error and the memory, or why the engine is out.
            known = replace(known, **process.answer())
        except LeftOut as error:
            known = replace(known, left_out=str(error))
        return Contestant(known, None if known.left_out else process)

    def with_operators(self, measurement: Measurement, entry: Entry) -> Measurement:
        """The measurement with the times of all operators, where they are asked for and there is a package."""
        if not entry.setting.layers or not measurement.plan or measurement.left_out:
            return measurement
        try:
            return replace(measurement, **self._operators(entry.engine, entry.setting))
        except LeftOut as error:
            return replace(measurement, left_out=str(error))

    def _build(self, engine: Engine, isa: str) -> dict[str, Any]:
        if not engine.ahead_of_time:
            return {"path": str(self.model), "winograd": [], "layers": []}
        if (engine.name, isa) not in self._builds:
            arguments = {"engine": engine.name, "model": str(self.model), "folder": str(self.folder), "isa": isa}
            try:
                self._builds[engine.name, isa] = run_job("build", {}, **arguments)
            except LeftOut as error:
                self._builds[engine.name, isa] = error
        found = self._builds[engine.name, isa]
        if isinstance(found, LeftOut):
            raise found
        return found

    def _load(self, engine: Engine, made: dict[str, Any], setting: Setting) -> Process:
        reference = self._reference(tuple(sorted(made["winograd"])))
        return Process(
            "load",
            environment(engine, setting),
            engine=engine.name,
            path=made["path"],
            inputs=str(self.inputs),
            reference=None if reference is None else str(reference),
            tolerance=TOLERANCE if engine.precision == "fp32" else None,
            threads=setting.threads,
        )

    def _operators(self, engine: Engine, setting: Setting) -> dict[str, Any]:
        made = self._build(engine, setting.isa)
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


def check_setting(setting: Setting) -> None:
    """Raises InputError for more threads than there are cores, or a time that is none."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not 1 <= setting.threads <= cores:
        raise InputError(f"{setting.threads} threads asked for; this process may use 1 to {cores}")
    if not setting.seconds > 0:
        raise InputError(f"{setting.seconds:g} seconds a measurement; give more than 0")
