"""The machine that measurements are from."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any


def describe() -> dict[str, Any]:
    """``cpu`` (its name), ``llvm_cpu`` (what LLVM takes it for), ``cores`` that this process may use, ``system``,
    ``python``."""
    from tvm.target import codegen

    return {
        "cpu": _cpu(),
        "llvm_cpu": str(codegen.llvm_get_system_cpu()),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _cpu() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
