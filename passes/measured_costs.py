"""What kernels took on CPUs like the target's, where such layers were measured; for all others, a model.

Measurements are in ``tuning_logs/costs-FAMILY.json``, one file for each family of CPUs, written by
``benchmarks/calibrate_costs.py``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from ..schedules.geometry import ConvGeometry
from ..schedules.targets import cpu_facts
from .costs import Borrowing, CostModel, LinearCostModel, family

FORMAT = "jointsparse.costs"
VERSION = 1

_LOGS = Path(__file__).resolve().parent.parent / "tuning_logs"


@dataclass(frozen=True)
class Measured:
    """A layer and kernel on one CPU: seconds of one run on one thread by non-zeros, both ascending."""

    kernel: str
    geometry: ConvGeometry
    nonzeros: tuple[int, ...]
    seconds: tuple[float, ...]

    @classmethod
    def of(cls, kernel: str, geometry: ConvGeometry, times: Mapping[int, float]) -> Measured:
        """Times by non-zeros. More non-zeros do not take less: what says otherwise is noise."""
        nonzeros = sorted(times)
        seconds = np.maximum.accumulate([times[count] for count in nonzeros])
        return cls(kernel, geometry, tuple(nonzeros), tuple(float(f"{time:.4g}") for time in seconds))


Log = Mapping[tuple[str, ConvGeometry], Measured]
"""Measurements by kernel and geometry."""


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
        predicted = self.other.cost(kernel, geometry, nonzeros, target)
        measured = self._measured(kernel, geometry, target)
        if measured is None:
            return predicted
        nearest = min(max(nonzeros, measured.nonzeros[0]), measured.nonzeros[-1])
        seconds = float(np.interp(nearest, measured.nonzeros, measured.seconds))
        if nearest == nonzeros:
            return seconds
        return seconds * predicted / self.other.cost(kernel, geometry, nearest, target)

    def borrowed_from(self, kernel: str, geometry: ConvGeometry, target: tvm.target.Target) -> str | None:
        if self._measured(kernel, geometry, target) is not None or not isinstance(self.other, Borrowing):
            return None
        return self.other.borrowed_from(kernel, geometry, target)

    def _measured(self, kernel: str, geometry: ConvGeometry, target: tvm.target.Target) -> Measured | None:
        name = family(cpu_facts(target))
        log = shipped(name) if self._logs is None else self._logs.get(name, {})
        return log.get((kernel, geometry))


@cache
def shipped(name: str) -> Log:
    """Measurements on a family of CPUs that come with the package; none if there are none."""
    path = _LOGS / f"costs-{name}.json"
    return load(path.read_text()) if path.exists() else {}


def dump(measurements: Iterable[Measured], cpu: str, target: str) -> str:
    """As JSON, a line for each. cpu: its name, for people. target: what was built for."""
    head = json.dumps({"format": FORMAT, "version": VERSION, "cpu": cpu, "target": target})
    lines = ",\n".join(json.dumps(asdict(one), separators=(",", ":")) for one in measurements)
    return f'{head[:-1]}, "measurements": [\n{lines}\n]}}\n'


def load(text: str) -> Log:
    """What `dump` wrote."""
    document = json.loads(text)
    if document.get("format") != FORMAT or document.get("version") != VERSION:
        raise ValueError(f"not a log of costs of version {VERSION}")
    measurements = map(_measured, document["measurements"])
    return {(one.kernel, one.geometry): one for one in measurements}


def _measured(entry: Mapping[str, Any]) -> Measured:
    geometry = ConvGeometry(**entry["geometry"])
    return Measured(entry["kernel"], geometry, tuple(entry["nonzeros"]), tuple(entry["seconds"]))
