"""The alternating direction method of multipliers for one layer, its activation taken into account.

The problem is that of Ma et al., "A unified approximation framework for compressing and accelerating deep neural
networks", arXiv 1807.10119: with inputs X (p x N) and the layer's original outputs Y (n x N) behind the activation r,

    min over A, B, b of  || Y - r((A + B) X + b 1^T) ||_F^2  +  l1 ||A||_{2,1}  +  l2 ||B||_*

where ||A||_{2,1} is the sum of the norms of groups of columns and ||B||_* that of singular values. With M for the
argument of r, a multiplier L and a penalty t, an iteration minimises the augmented Lagrangian over M, exactly though it
is not convex; then over b, and over A and B, by one of two steps; then L += t ((A + B) X + b 1^T - M).

``Relaxed`` is the linearised step of the problem as it stands. ``Structured`` has a fixed number of columns and a fixed
rank in place of the penalties, and the step is exact (``regression``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .regression import Factors, Regression

__all__ = ["Iteration", "Problem", "Relaxed", "RelaxedPair", "Solution", "Step", "Structured", "minimise"]


@dataclass(frozen=True)
class Problem:
    """A layer's inputs and what it should put out.

    Attributes:
        inputs: X, (G, p, N). targets: Y, (G, n, N), not negative where ``rectified``. rectified: whether r is ReLU;
            else it is the identity. damping: d of a term d || A + B - W ||_F^2, for what the inputs say little of.
            weight: W, (G, n, p).
    """

    inputs: Tensor
    targets: Tensor
    rectified: bool
    damping: float = 0.0
    weight: Tensor | None = None

    mean: Tensor = field(init=False)
    """Of X, (G, p, 1)."""
    centred: Tensor = field(init=False)
    """X less its mean: the best b is then the mean of what is left."""
    gram: Tensor = field(init=False)
    """Of the centred X, with the damping, (G, p, p)."""

    def __post_init__(self) -> None:
        mean = self.inputs.mean(2, keepdim=True)
        centred = self.inputs - mean
        gram = centred @ centred.mT
        if self.damping:
            gram += self.damping * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
        for name, value in (("mean", mean), ("centred", centred), ("gram", gram)):
            object.__setattr__(self, name, value)

    def cross(self, outputs: Tensor) -> Tensor:
        """Z X^T, with the damping, (G, n, p)."""
        product = outputs @ self.centred.mT
        return product + self.damping * self.weight if self.weight is not None else product

    def misfit(self, outputs: Tensor) -> float:
        """|| Y - r(Z) ||_F^2."""
        reached = outputs.clamp_min(0) if self.rectified else outputs
        return float((self.targets - reached).double().square().sum())


class Part(Protocol):
    """What a step finds."""

    def matrices(self) -> Tensor:
        """A + B, (G, n, p)."""


class Step(Protocol):
    """How an iteration renews A and B."""

    def __call__(self, problem: Problem, current: Part | None, cross: Tensor, t: float) -> Part:
        """The next, given (M - L / t) X^T."""

    def penalty(self, current: Part) -> float:
        """Of the objective."""


@dataclass(frozen=True)
class Structured:
    """A fixed structure: the exact minimum over all matrices that have it.

    Attributes:
        regression: with the problem's Gram matrix. rank: of the columns that are not kept.
    """

    regression: Regression
    rank: int

    def __call__(self, problem: Problem, current: Part | None, cross: Tensor, t: float) -> Factors:
        return self.regression.solve(cross, self.rank)

    def penalty(self, current: Part) -> float:
        return 0.0


@dataclass(frozen=True)
class RelaxedPair:
    """A and B of the relaxed problem, each (G, n, p)."""

    sparse: Tensor
    low_rank: Tensor

    def matrices(self) -> Tensor:
        """A + B."""
        return self.sparse + self.low_rank


@dataclass(frozen=True)
class Relaxed:
    """The penalties of the paper: proximal gradient steps on A and B in turn.

    Attributes:
        l1: of the norms of groups of ``unit`` columns. l2: of singular values. bound: at least the largest eigenvalue
            of the Gram matrix. turns: how many; the paper has one, but they cost little beside the rest.
    """

    l1: float
    l2: float
    unit: int
    bound: float
    turns: int = 8

    def __call__(self, problem: Problem, current: Part | None, cross: Tensor, t: float) -> RelaxedPair:
        if current is None:
            current = RelaxedPair(torch.zeros_like(cross), torch.zeros_like(cross))
        assert isinstance(current, RelaxedPair)
        a, b = current.sparse, current.low_rank
        for _ in range(self.turns):
            slope = (a + b) @ problem.gram - cross
            a = self._shrunk_groups(a - slope / self.bound, self.l1 / (t * self.bound))
            slope = (a + b) @ problem.gram - cross
            b = _shrunk_values(b - slope / self.bound, self.l2 / (t * self.bound))
        return RelaxedPair(a, b)

    def penalty(self, current: Part) -> float:
        assert isinstance(current, RelaxedPair)
        norms = self._norms(current.sparse).double().sum()
        values = torch.linalg.svdvals(current.low_rank.double()).sum()
        return float(self.l1 * norms + self.l2 * values)

    def _norms(self, a: Tensor) -> Tensor:
        """(G, units)."""
        return a.unflatten(2, (-1, self.unit)).square().sum((1, 3)).sqrt()

    def _shrunk_groups(self, a: Tensor, threshold: float) -> Tensor:
        norms = self._norms(a)
        factors = (1 - threshold / norms.clamp_min(torch.finfo(a.dtype).tiny)).clamp_min(0)
        return a * factors.repeat_interleave(self.unit, 1)[:, None]


def _shrunk_values(b: Tensor, threshold: float) -> Tensor:
    left, values, right = torch.linalg.svd(b, full_matrices=False)
    return (left * (values - threshold).clamp_min(0)[..., None, :]) @ right


@dataclass(frozen=True)
class Iteration:
    """How far an iteration has come.

    Attributes:
        primal: ||(A + B) X + b - M|| over the larger of both norms. dual: the change of M over the norm of L / t.
            objective: of A, B and b.
    """

    primal: float
    dual: float
    objective: float


@dataclass(frozen=True)
class Solution:
    """The best that was met.

    Attributes:
        part: A and B. bias: b, (G, n, 1), for inputs as they are. objective: its value. start: that of the step
            without regard to the activation. history: of all iterations.
    """

    part: Part
    bias: Tensor
    objective: float
    start: float
    history: tuple[Iteration, ...]


def minimise(
    problem: Problem,
    step: Step,
    linear: Tensor,
    *,
    start: Part | None = None,
    t: float = 1.0,
    tolerance: float = 1e-4,
    iterations: int = 50,
    watch: Callable[[Iteration], None] = lambda iteration: None,
) -> Solution:
    """Iterate until both residuals are below ``tolerance``, or for so many iterations.

    Args:
        linear: what the layer should put out before its activation, (G, n, N). start: A and B to start from; else a
            step towards ``linear``. t: the penalty. watch: told of every iteration.

    Returns:
        the iterate of the least objective, the start among them: never worse than the linear response.
    """
    part = start if start is not None else step(problem, None, problem.cross(linear), t)
    offset = linear.mean(2, keepdim=True)
    outputs = part.matrices() @ problem.centred + offset
    objective = problem.misfit(outputs) + step.penalty(part)
    best, first = (objective, part, offset), objective
    before, multiplier = outputs, torch.zeros_like(outputs)
    history: list[Iteration] = []
    while len(history) < iterations:
        middle = _argument(problem, outputs + multiplier / t, t)
        wanted = middle - multiplier / t
        offset = wanted.mean(2, keepdim=True)
        part = step(problem, part, problem.cross(wanted), t)
        outputs = part.matrices() @ problem.centred + offset
        gap = outputs - middle
        multiplier = multiplier + t * gap
        objective = problem.misfit(outputs) + step.penalty(part)
        if objective < best[0]:
            best = objective, part, offset
        history.append(Iteration(_share(gap, outputs, middle), _share(middle - before, multiplier / t), objective))
        watch(history[-1])
        before = middle
        if max(history[-1].primal, history[-1].dual) < tolerance:
            break
    objective, part, offset = best
    return Solution(part, offset - part.matrices() @ problem.mean, objective, first, tuple(history))


def _argument(problem: Problem, z: Tensor, t: float) -> Tensor:
    """The M that minimises || Y - r(M) ||^2 + t / 2 || M - Z ||^2, element by element."""
    y = problem.targets
    above = (2 * y + t * z) / (2 + t)
    if not problem.rectified:
        return above
    above, below = above.clamp_min(0), z.clamp_max(0)
    cost_above = (y - above).square() + t / 2 * (above - z).square()
    cost_below = y.square() + t / 2 * (below - z).square()
    return torch.where(cost_above <= cost_below, above, below)


def _share(difference: Tensor, *sizes: Tensor) -> float:
    largest = max(float(size.norm()) for size in sizes)
    return float(difference.norm()) / max(largest, torch.finfo(difference.dtype).tiny)
