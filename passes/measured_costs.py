"""What kernels took on a CPU like the target's, where such a layer was measured; for all others, a model.

Measurements are in ``tuning_logs/costs-FAMILY.json``, one file for each family of CPUs, written by
``benchmarks/calibrate_costs.py``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import tvm

from ..schedules.geometry import ConvGeometry
from ..schedules.targets import cpu_facts
from .costs import Borrowing, CostModel, LinearCostModel, family

FORMAT = "jointsparse.costs"
VERSION = 1

_LOGS = Path(__file__).resolve().parent.parent / "tuning_logs"


@dataclass(frozen=True)
class Times:
    """Of a kernel for a layer. nonzeros: ascending. seconds: of one run on one thread; never falling."""

    nonzeros: tuple[int, ...]
    seconds: tuple[float, ...]

    @classmethod
    def of(cls, measured: Mapping[int, float]) -> Times:
        """Of seconds by non-zeros. What took longer than with more of them was disturbed."""
        nonzeros = sorted(measured)
        seconds = np.minimum.accumulate([measured[count] for count in reversed(nonzeros)])[::-1]
        return cls(tuple(nonzeros), tuple(float(f"{time:.4g}") for time in seconds))

    def least(self, other: Times) -> Times:
        """Of two measurements: what else a machine does only ever adds to them."""
        one, two = (dict(zip(times.nonzeros, times.seconds, strict=True)) for times in (self, other))
        return Times.of({count: min(times[count] for times in (one, two) if count in times) for count in one | two})


Log = Mapping[ConvGeometry, Mapping[str, Times]]
"""By layer, the times of all its kernels."""


class MeasuredCostModel:
    """Costs as measured, in between as the line between two measurements; else as another model predicts.

    Args:
        logs: by family of CPUs; those shipped when None.
        other: for layers not measured, and for the way beyond the fewest and the most non-zeros measured.
    """

    def __init__(self, logs: Mapping[str, Log] | None = None, other: CostModel | None = None) -> None:
        self._logs = logs
        self.other = other or LinearCostModel()

    def cost(self, kernel: str, geometry: ConvGeometry, nonzeros: int, target: tvm.target.Target) -> float:
        times = self._times(kernel, geometry, target)
        if times is None:
            return self.other.cost(kernel, geometry, nonzeros, target)
        nearest = min(max(nonzeros, times.nonzeros[0]), times.nonzeros[-1])
        seconds = float(np.interp(nearest, times.nonzeros, times.seconds))
        if nearest == nonzeros:
            return seconds
        here, there = (self.other.cost(kernel, geometry, count, target) for count in (nonzeros, nearest))
        return seconds * here / there if there > 0 else seconds

    def borrowed_from(self, kernel: str, geometry: ConvGeometry, target: tvm.target.Target) -> str | None:
        if self._times(kernel, geometry, target) is not None or not isinstance(self.other, Borrowing):
            return None
        return self.other.borrowed_from(kernel, geometry, target)

    def _times(self, kernel: str, geometry: ConvGeometry, target: tvm.target.Target) -> Times | None:
        name = family(cpu_facts(target))
        log = shipped(name) if self._logs is None else self._logs.get(name, {})
        return log.get(geometry, {}).get(kernel)


@cache
def shipped(name: str) -> Log:
    """Measurements on a family of CPUs that come with the package; none if there are none."""
    path = _LOGS / f"costs-{name}.json"
    return load(path.read_text(), name) if path.exists() else {}


def dump(log: Log, name: str, cpu: str) -> str:
    """As JSON, a line for each layer.

    Args:
        name: the family of CPUs. cpu: the CPU, for people.
    """
    head = json.dumps({"format": FORMAT, "version": VERSION, "family": name, "cpu": cpu})
    lines = (
        json.dumps(
            {"layer": asdict(geometry), "kernels": {kernel: asdict(times) for kernel, times in kernels.items()}},
            separators=(",", ":"),
        )
        for geometry, kernels in log.items()
    )
    return head[:-1] + ', "layers": [\n' + ",\n".join(lines) + "\n]}\n"


def load(text: str, name: str) -> Log:
    """What `dump` wrote for a family of CPUs.

    Raises:
        ValueError: for anything else.
    """
    document = json.loads(text)
    found = [document.get(key) for key in ("format", "version", "family")] if isinstance(document, dict) else document
    if found != [FORMAT, VERSION, name]:
        raise ValueError(f"not a log of costs on {name}, version {VERSION}")
    return {
        ConvGeometry(**entry["layer"]): {
            kernel: Times(tuple(times["nonzeros"]), tuple(times["seconds"]))
            for kernel, times in entry["kernels"].items()
        }
        for entry in document["layers"]
    }
