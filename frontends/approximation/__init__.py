"""Structured sparsity plus low rank: layers as sums of two cheaper ones, by ADMM.

``approximate`` is what others use. In the order of its work: ``original`` with ``tracing`` (what stands behind each
layer), ``sampling`` (what it is given) and ``budgets`` (how much of it stays); ``fitting`` with ``selection`` (which
columns), ``regression`` and ``admm`` (their weights); ``layers`` and ``modules`` (back into the model).
"""

from .approximate import approximate
from .modules import HeldConv2d, SparseLowRank
from .structures import Structure

__all__ = ["HeldConv2d", "SparseLowRank", "Structure", "approximate"]
