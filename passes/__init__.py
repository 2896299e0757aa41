"""Relay to Relay: which layers become sparse, with which kernel, and why.

``sparsify`` is the whole way (``pipeline.py`` reads as its table of contents); every pass in it is usable alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .costs import CostModel, LinearCostModel
    from .measured_costs import MeasuredCostModel
    from .pipeline import sparsify
    from .plan import LayerPlan, Plan

__all__ = ["CostModel", "LayerPlan", "LinearCostModel", "MeasuredCostModel", "Plan", "sparsify"]

_HOME = {
    "CostModel": "costs",
    "LayerPlan": "plan",
    "LinearCostModel": "costs",
    "MeasuredCostModel": "measured_costs",
    "Plan": "plan",
    "sparsify": "pipeline",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that a plan is readable where there is no TVM."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
