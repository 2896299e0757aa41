"""Sparse weight formats, Relay operators, TE computes and schedules.

Names are loaded when first used: geometry, formats and Winograd matrices need numpy alone, the operators need TVM.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .constructors import (
        conv2d_sparse_direct,
        conv2d_sparse_winograd,
        dense_sparse,
        why_not_dense_sparse,
        why_not_direct,
        why_not_winograd,
    )
    from .formats import BundledRows, SparseRows, pack_dense, pack_direct, pack_winograd
    from .geometry import ConvGeometry
    from .targets import cpu_facts, why_not_target
    from .winograd import transform

_HOME = {
    "BundledRows": "formats",
    "ConvGeometry": "geometry",
    "SparseRows": "formats",
    "pack_dense": "formats",
    "pack_direct": "formats",
    "pack_winograd": "formats",
    "transform": "winograd",
    "conv2d_sparse_direct": "constructors",
    "conv2d_sparse_winograd": "constructors",
    "dense_sparse": "constructors",
    "why_not_dense_sparse": "constructors",
    "why_not_direct": "constructors",
    "why_not_winograd": "constructors",
    "why_not_target": "targets",
    "cpu_facts": "targets",
}

__all__ = [
    "BundledRows",
    "ConvGeometry",
    "SparseRows",
    "conv2d_sparse_direct",
    "conv2d_sparse_winograd",
    "cpu_facts",
    "dense_sparse",
    "pack_dense",
    "pack_direct",
    "pack_winograd",
    "transform",
    "why_not_dense_sparse",
    "why_not_direct",
    "why_not_target",
    "why_not_winograd",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
