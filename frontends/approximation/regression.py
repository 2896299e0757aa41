"""Least squares by matrices of a structure: some columns free, the others of low rank.

min over A, B of || Z - (A + B) X ||_F^2, A zero outside the kept columns, B zero on them and of rank r, has a closed
form. With the kept columns projected out, the others have the Gram matrix C, a Schur complement, and the least-squares
solution D; B = U U^T D, U the r leading eigenvectors of D C D^T (reduced-rank regression: Izenman, J. Multivariate
Analysis 5, 1975), and A is what is left to the kept columns. That B needs none of the kept columns saves weights: in
A + B they are free anyway.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Factors", "Regression"]


@dataclass(frozen=True)
class Factors:
    """An approximation of the matrices of a layer, G groups, n outputs, p columns.

    Attributes:
        kept: their columns that are free, (G, s). rest: all others, (G, p - s), both ascending. sparse: weights of
            the kept, (G, n, s). expand, reduce: the others' are ``expand @ reduce``, (G, n, r) and (G, r, p - s).
    """

    kept: Tensor
    rest: Tensor
    sparse: Tensor
    expand: Tensor
    reduce: Tensor

    def matrices(self) -> Tensor:
        """A + B, (G, n, p)."""
        groups, outputs, own = self.sparse.shape
        whole = self.sparse.new_empty(groups, outputs, own + self.rest.shape[1])
        whole.scatter_(2, _along(self.kept, outputs), self.sparse)
        return whole.scatter_(2, _along(self.rest, outputs), self.expand @ self.reduce)


class Regression:
    """On inputs of a given Gram matrix; in float64, since features of a network nearly depend on each other.

    Args:
        gram: X X^T, (G, p, p), positive definite. kept: columns that are free, (G, s). rest: all others.
    """

    def __init__(self, gram: Tensor, kept: Tensor, rest: Tensor) -> None:
        self.kept, self.rest = kept, rest
        gram = gram.double()
        own, between = _block(gram, kept, kept), _block(gram, kept, rest)
        self.own = torch.linalg.cholesky(own)
        self.between = between
        # Of the others by the kept: what these tell of those.
        self.told = torch.cholesky_solve(between, self.own)
        self.schur = _block(gram, rest, rest) - between.mT @ self.told
        self.others = torch.linalg.cholesky(self.schur)

    def spectrum(self, cross: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the others' part of the solution: energies, descending, directions in the outputs, and D.

        Args:
            cross: Z X^T, (G, n, p).

        Returns:
            (G, n), (G, n, n) and (G, n, p - s), float64. Energies beyond the first r are what rank r loses.
        """
        cross = cross.double()
        beyond = _columns(cross, self.rest) - _columns(cross, self.kept) @ self.told
        solution = torch.cholesky_solve(beyond.mT, self.others).mT
        energies, directions = torch.linalg.eigh(beyond @ solution.mT)
        return energies.flip(-1).clamp_min(0), directions.flip(-1), solution

    def solve(self, cross: Tensor, rank: int) -> Factors:
        """The best factors of a rank.

        Args:
            cross: Z X^T, (G, n, p).
        """
        wanted, cross = cross.dtype, cross.double()
        if rank and self.rest.shape[1]:
            _, directions, solution = self.spectrum(cross)
            expand = directions[..., :rank]
            reduce = expand.mT @ solution
        else:
            expand = cross.new_zeros(*cross.shape[:2], 0)
            reduce = cross.new_zeros(len(cross), 0, self.rest.shape[1])
        left = _columns(cross, self.kept) - expand @ (reduce @ self.between.mT)
        sparse = torch.cholesky_solve(left.mT, self.own).mT
        return Factors(self.kept, self.rest, sparse.to(wanted), expand.to(wanted), reduce.to(wanted))


def _along(index: Tensor, rows: int) -> Tensor:
    """A group's column numbers for each of its rows."""
    return index[:, None, :].expand(-1, rows, -1)


def _columns(matrices: Tensor, index: Tensor) -> Tensor:
    return matrices.gather(2, _along(index, matrices.shape[1]))


def _block(gram: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return torch.stack([one[r][:, c] for one, r, c in zip(gram, rows, columns, strict=True)])
