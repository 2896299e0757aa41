"""Sparse weight formats, Relay operators, TE computes and schedules.

Names are loaded when first used: geometry, formats and Winograd matrices need numpy alone, the operators need TVM.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "ConvGeometry": "geometry",
    "SparseRows": "formats",
    "pack_direct": "formats",
    "pack_winograd": "formats",
    "transform": "winograd",
    "conv2d_sparse_direct": "operators",
    "conv2d_sparse_winograd": "operators",
    "why_not_direct": "operators",
    "why_not_winograd": "operators",
    "why_not_target": "targets",
    "cpu_facts": "targets",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
