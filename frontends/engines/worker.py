"""One job in a process of its own: ``python -m jointsparse.frontends.engines.worker JOB.json RESULT.json``.

Threads, instruction sets and memory peaks belong to a process, so that each measurement gets a new one. A job is an
object with ``kind`` and what the function of that name takes; the result is what it returns, or ``{"left_out": why}``.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from . import find_engine
from .base import Prepared

MIN_RUNS = 5
"""Runs at least, however long one takes."""


def build(engine: str, model: str, folder: str, isa: str) -> dict[str, Any]:
    """Ahead of time: where the engine's file is, how long it took, how large it is."""
    start = perf_counter()
    made = find_engine(engine).build(Path(model), Path(folder), isa)
    seconds = perf_counter() - start
    return {**asdict(made), "path": str(made.path), "seconds": seconds, "bytes": made.path.stat().st_size}


def time(
    engine: str, path: str, inputs: str, reference: str | None, tolerance: float | None, threads: int, seconds: float
) -> dict[str, Any]:
    """Compare with the reference, then measure for so many seconds; a wrong engine is not timed."""
    pin(threads)
    chosen = find_engine(engine)
    chosen.load()
    before = memory("VmRSS")
    prepared = chosen.prepare(Path(path), dict(np.load(inputs)), threads)
    prepared.run()
    # Now, as the reference below is no part of the engine.
    peak = memory("VmHWM")
    error = None if reference is None else relative_rms(prepared.outputs(), list(np.load(reference).values()))
    # JSON has no infinity.
    finite = error if error is not None and math.isfinite(error) else None
    if error is not None and tolerance is not None and not error <= tolerance:
        return {"left_out": f"wrong: relative RMS error {error:.2g}, {tolerance:g} allowed", "error": finite}
    times = measure(prepared, seconds)
    return {
        "error": finite,
        "min_ms": 1e3 * min(times),
        "median_ms": 1e3 * statistics.median(times),
        "runs": len(times),
        "peak_bytes": None if before is None or peak is None else peak - before,
    }


def layers(
    path: str, inputs: str, plan: list[dict[str, Any]], isa: str, threads: int, seconds: float
) -> dict[str, Any]:
    """Time, multiply-adds and rate of every fused operator, and the peak rate of the cores used."""
    from . import operators, peak
    from .tvm_build import bind_threads

    pin(threads)
    bind_threads(threads)
    timed = operators.measure(Path(path), dict(np.load(inputs)), plan, seconds)
    return {"operators": [asdict(one) for one in timed], "peak_gmacs": threads * peak.multiply_adds(isa) / 1e9}


def reference(model: str, winograd: list[str], inputs: str, outputs: str) -> dict[str, Any]:
    """Write the outputs that every build is compared with; see ``reference.compute``."""
    from .reference import compute

    values, method = compute(Path(model), winograd, dict(np.load(inputs)))
    np.savez(outputs, *values)
    return {"method": method}


def measure(prepared: Prepared, seconds: float) -> list[float]:
    """Seconds of each run, on the clock, after some runs to warm up."""
    end = perf_counter() + seconds / 5
    prepared.run()
    while perf_counter() < end:
        prepared.run()
    times: list[float] = []
    end = perf_counter() + seconds
    while len(times) < MIN_RUNS or perf_counter() < end:
        start = perf_counter()
        prepared.run()
        times.append(perf_counter() - start)
    return times


def relative_rms(outputs: list[NDArray[Any]], expected: list[NDArray[Any]]) -> float:
    """RMS of the difference over RMS of the expected outputs, the largest of all outputs; infinite for other shapes."""
    if [value.shape for value in outputs] != [value.shape for value in expected]:
        return float("inf")
    errors = []
    for value, right in zip(outputs, expected, strict=True):
        difference, size = value.astype(np.float64) - right, np.sqrt(np.mean(np.square(right, dtype=np.float64)))
        errors.append(float(np.sqrt(np.mean(np.square(difference))) / (size or 1.0)))
    return max(errors)


def pin(threads: int) -> None:
    """Keep this process on so many cores, hyper-threads of one core counted once, where the system can do that."""
    if not hasattr(os, "sched_setaffinity"):
        return
    chosen: dict[str, int] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        chosen.setdefault(siblings.read_text().strip() if siblings.is_file() else str(cpu), cpu)
    if len(chosen) < threads:
        raise InputError(f"{threads} threads asked for and {len(chosen)} cores free to use")
    os.sched_setaffinity(0, list(chosen.values())[:threads])


def memory(kind: str) -> int | None:
    """Bytes that this process holds (``VmRSS``), or has held at most (``VmHWM``); None where the system does not tell.

    Not from getrusage: what that calls the peak is, after a fork, at least the parent's size.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{kind}:")), None)


KINDS: dict[str, Callable[..., dict[str, Any]]] = {
    "build": build,
    "time": time,
    "layers": layers,
    "reference": reference,
}


def main() -> None:
    """Do the job in the first file, write the result to the second."""
    job = json.loads(Path(sys.argv[1]).read_text())
    try:
        result = KINDS[job.pop("kind")](**job)
    except InputError as error:
        result = {"left_out": str(error)}
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
