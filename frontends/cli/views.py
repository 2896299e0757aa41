"""How results look: tables on a terminal, plain lines elsewhere, JSON where asked for."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tvm.driver.tvmc.model import TVMCResult

    from ...passes.plan import Plan


def show_plan(plan: Plan, package: Path, *, explain: bool, json: bool) -> None:
    """The plan in full, or one line about the package."""
    if json:
        print(plan.to_json())
        return
    if explain:
        print(plan)
    sparse = sum(layer.sparse for layer in plan)
    print(f"{package}: {package.stat().st_size / 1e6:.2f} MB, {sparse} of {len(plan)} convolutions sparse")


def show_run(result: TVMCResult, written: Path | None, json: bool) -> None:
    """Names, types and shapes of the outputs, and the times if they were measured."""
    outputs = {name: {"dtype": str(array.dtype), "shape": list(array.shape)} for name, array in result.outputs.items()}
    times = result.times
    if json:
        document: dict[str, Any] = {"format": "jointsparse.run", "version": 1, "outputs": outputs, "time_ms": None}
        if times:
            names = ("mean", "median", "max", "min", "std")
            document["time_ms"] = {name: 1e3 * getattr(times, name) for name in names}
            document["time_ms"]["results"] = [1e3 * seconds for seconds in times.results]
        print(jsonlib.dumps(document, indent=2))
        return
    if times:
        print(result.format_times().rstrip())
    for name, output in outputs.items():
        print(f"{name}: {output['dtype']} {output['shape']}" + (f", in {written}" if written else ""))
