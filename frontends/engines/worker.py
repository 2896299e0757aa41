"""One job in a process of its own: ``python -m jointsparse.frontends.engines.worker``.

Threads, instruction sets and memory peaks belong to a process, so that each measurement gets a new one. Messages are
lines of JSON. The first on the standard input is the job: an object with ``kind`` and what the function of that name
takes. What the function returns is the answer on the standard output, or ``{"left_out": why}``. The job ``load`` goes
on: each further line asks for a turn of so many seconds, the answer being the seconds of each run.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from . import find_engine
from .base import Prepared


def build(engine: str, model: str, folder: str, isa: str) -> dict[str, Any]:
    """Ahead of time: where the engine's file is, how long it took, how large it is."""
    start = perf_counter()
    made = find_engine(engine).build(Path(model), Path(folder), isa)
    seconds = perf_counter() - start
    return {**asdict(made), "path": str(made.path), "seconds": seconds, "bytes": made.path.stat().st_size}


def load(
    engine: str, path: str, inputs: str, reference: str | None, tolerance: float | None, threads: int
) -> Iterator[Any]:
    """Load a model and compare its outputs with the reference, then run it whenever that is asked for; a wrong engine
    is not timed."""
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
        yield {"left_out": f"wrong: relative RMS error {error:.2g}, {tolerance:g} allowed", "error": finite}
        return
    yield {"error": finite, "peak_bytes": None if before is None or peak is None else peak - before}
    for line in sys.stdin:
        yield turn(prepared, json.loads(line))


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


def turn(prepared: Prepared, seconds: float) -> list[float]:
    """Seconds of each run of a turn that lasts so many, on the clock.

    Another engine has used the caches since the last turn: the first run is to fill them again and does not count, but
    where one run takes the whole turn, and so little of it for that.
    """
    start = perf_counter()
    first = _seconds(prepared)
    if first >= seconds:
        return [first]
    times: list[float] = []
    while not times or perf_counter() - start < seconds:
        times.append(_seconds(prepared))
    return times


def _seconds(prepared: Prepared) -> float:
    start = perf_counter()
    prepared.run()
    return perf_counter() - start


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


KINDS: dict[str, Callable[..., dict[str, Any] | Iterator[Any]]] = {
    "build": build,
    "load": load,
    "layers": layers,
    "reference": reference,
}


def main() -> None:
    """Do the job on the standard input."""
    # What engines print goes elsewhere than the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    job = json.loads(sys.stdin.readline())
    try:
        result = KINDS[job.pop("kind")](**job)
        for answer in result if isinstance(result, Iterator) else [result]:
            print(json.dumps(answer), file=answers)
    except InputError as error:
        print(json.dumps({"left_out": str(error)}), file=answers)


if __name__ == "__main__":
    main()
