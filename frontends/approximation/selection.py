"""Which columns of a layer are kept: those that the others and a low rank explain least.

Columns are taken in some rounds. Each round solves the regression with what is kept so far and takes, of the others,
the units that would reduce the misfit most if they alone were free.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .regression import Regression
from .structures import Shape

__all__ = ["regression_of", "select", "selections"]

_ROUNDS = 4


def select(shape: Shape, gram: Tensor, cross: Tensor, kept: int, rank: int) -> Tensor:
    """The units to keep, (G, kept), ascending.

    Args:
        gram: X X^T, (G, p, p), positive definite. cross: Z X^T, (G, n, p).
    """
    counts = sorted({round(kept * (i + 1) / _ROUNDS) for i in range(_ROUNDS)})
    return list(selections(shape, gram, cross, [(count, rank) for count in counts]))[-1][1]


def selections(
    shape: Shape, gram: Tensor, cross: Tensor, stages: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, Tensor]]:
    """Ever more units, those before among them: for every stage of (kept, rank), by ascending kept, (kept, units)."""
    units = torch.empty(shape.groups, 0, dtype=torch.long, device=gram.device)
    for kept, rank in stages:
        if missing := kept - units.shape[1]:
            rest = shape.other_units(units)
            best = _gains(shape, gram, cross, units, rest, rank).topk(missing, dim=1).indices
            units = torch.cat([units, rest.gather(1, best)], 1).sort(1).values
        yield kept, units


def regression_of(shape: Shape, gram: Tensor, units: Tensor) -> Regression:
    """With some units free."""
    return Regression(gram, shape.columns_of(units), shape.columns_of(shape.other_units(units)))


def _gains(shape: Shape, gram: Tensor, cross: Tensor, units: Tensor, rest: Tensor, rank: int) -> Tensor:
    """By how much the misfit falls if a unit alone is free as well, (G, units not kept)."""
    regression = regression_of(shape, gram, units)
    _, directions, solution = regression.spectrum(cross)
    missed = solution - directions[..., :rank] @ (directions[..., :rank].mT @ solution)
    beyond = (missed @ regression.schur).unflatten(2, (-1, shape.unit))
    schur = regression.schur.unflatten(2, (-1, shape.unit)).unflatten(1, (-1, shape.unit))
    own = torch.linalg.cholesky(schur.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2))
    return torch.linalg.solve_triangular(own, beyond.permute(0, 2, 3, 1), upper=False).square().sum((2, 3))
