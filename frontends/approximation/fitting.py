"""One layer of a given structure, behind the layers that have been approximated before."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import admm
from .layers import Fitted, Target, fitted, target_of
from .original import DAMPING, Original
from .regression import Factors
from .sampling import inputs_of
from .selection import regression_of, select
from .structures import Shape, Structure

__all__ = ["fit"]

_PENALTY = 10.0
"""t of the iterations. Smaller ones are sooner at the optimum of a layer where they converge, but not all do."""

_LEAST = 1e-2
"""Of the importance of an output, relative to the mean of its layer's."""


def fit(
    original: Original,
    result: nn.Module,
    name: str,
    structure: Structure,
    *,
    iterations: int,
    tolerance: float,
    seed: int,
    progress: Callable[[str], None],
) -> Fitted:
    """The layer that puts out, behind its activation, what the original does.

    Args:
        result: the model so far, which still has the layer as it was.
    """
    layer, shape, rectified = original.layers[name], original.shapes[name], original.around(name).rectified
    sampling = shape, original.images, original.positions, seed
    before = inputs_of(original.model, layer, *sampling)
    now = inputs_of(result, result.get_submodule(name), *sampling)
    target = target_of(layer, original.norm(name), shape)
    rows = _rows(original, name, target)
    linear = rows * target.outputs(before)
    problem = admm.Problem(
        inputs=now,
        targets=linear.clamp_min(0) if rectified else linear,
        rectified=rectified,
        damping=DAMPING * now.shape[2] * max(float(now.var(2).mean()), torch.finfo(now.dtype).tiny),
        weight=rows * target.factor * target.weight,
    )
    kept = select(shape, problem.gram, problem.cross(linear), structure.kept, structure.rank)
    step = admm.Structured(regression_of(shape, problem.gram, kept), structure.rank)
    # Without an activation the first step is the optimum.
    count = iterations if rectified else 0
    solution = admm.minimise(problem, step, linear, t=_PENALTY, tolerance=tolerance, iterations=count)
    progress(_line(name, shape, structure, problem, solution))
    found = solution.part
    assert isinstance(found, Factors)
    factors = Factors(found.kept, found.rest, found.sparse / rows, found.expand / rows, found.reduce)
    return fitted(target, original.norm(name), factors, solution.bias / rows, now)


def _rows(original: Original, name: str, target: Target) -> Tensor:
    """What outputs are multiplied with, (G, n, 1), so that their errors count as the loss minds them. ReLU lets
    positive factors through."""
    if not original.importance:
        return torch.ones_like(target.factor)
    importance = original.importance[name].to(target.factor.device)[..., None]
    least = max(_LEAST * float(importance.mean()), torch.finfo(importance.dtype).tiny)
    rows = importance.clamp_min(least).sqrt() / target.divisor.abs()
    return rows / rows.mean()


def _line(name: str, shape: Shape, structure: Structure, problem: admm.Problem, solution: admm.Solution) -> str:
    energy = max(float(problem.targets.double().square().sum()), torch.finfo(torch.float32).tiny)
    before, after = (100 * (value / energy) ** 0.5 for value in (solution.start, solution.objective))
    line = (
        f"{name}: keeps {structure.kept} of {shape.units}, rank {structure.rank} of {shape.outputs}; "
        f"{shape.weights} -> {shape.cost(structure)} weights; error {after:.1f} %"
    )
    if not solution.history:
        return line
    last = solution.history[-1]
    return (
        f"{line}, {before:.1f} % without regard to the activation; {len(solution.history)} iterations, residuals "
        f"{last.primal:.1e} and {last.dual:.1e}"
    )
