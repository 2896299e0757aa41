"""The alternating direction method of multipliers for one layer, against solvers that share nothing with it."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from jointsparse.frontends.approximation import admm
from jointsparse.frontends.approximation.regression import Factors, Regression
from jointsparse.frontends.approximation.selection import regression_of, select
from jointsparse.frontends.approximation.structures import Shape

Array = NDArray[np.float64]

pytestmark = pytest.mark.usefixtures("one_thread")


def problem(
    seed: int, rectified: bool, *, outputs: int = 6, columns: int = 9, count: int = 80
) -> tuple[admm.Problem, Tensor]:
    """With inputs that depend on each other; and what the layer puts out before its activation."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    mix = torch.eye(columns, dtype=torch.float64) + 0.5 * normal(columns, columns)
    inputs = mix @ normal(1, columns, count) + 0.5
    linear = normal(1, outputs, columns) @ inputs + 0.3 * normal(1, outputs, 1)
    return admm.Problem(inputs, linear.clamp_min(0) if rectified else linear, rectified), linear


def bound(given: admm.Problem) -> float:
    return float(torch.linalg.eigvalsh(given.gram)[0, -1])


def proximal_gradient(x: Array, y: Array, l1: float, l2: float, unit: int, steps: int) -> float:
    """The relaxed problem without an activation by accelerated proximal gradients on A, B and b together; its value."""
    n, p = len(y), len(x)
    step = 0.5 / (2 * np.linalg.norm(x @ x.T, 2) + x.shape[1])
    a, b, c = np.zeros((n, p)), np.zeros((n, p)), np.zeros((n, 1))
    ahead, momentum = (a, b, c), 1.0
    best = np.inf
    for _ in range(steps):
        residual = (ahead[0] + ahead[1]) @ x + ahead[2] - y
        slope = 2 * residual @ x.T
        groups = (ahead[0] - step * slope).reshape(n, -1, unit)
        norms = np.sqrt((groups**2).sum((0, 2), keepdims=True))
        a_new = (groups * np.maximum(0, 1 - step * l1 / np.maximum(norms, 1e-300))).reshape(n, p)
        left, values, right = np.linalg.svd(ahead[1] - step * slope, full_matrices=False)
        b_new = left * np.maximum(values - step * l2, 0) @ right
        c_new = ahead[2] - step * 2 * residual.sum(1, keepdims=True)
        grown = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        pairs = zip((a_new, b_new, c_new), (a, b, c), strict=True)
        ahead = tuple(new + (momentum - 1) / grown * (new - old) for new, old in pairs)
        a, b, c, momentum = a_new, b_new, c_new, grown
        norms = np.sqrt((a.reshape(n, -1, unit) ** 2).sum((0, 2)))
        misfit = ((y - (a + b) @ x - c) ** 2).sum()
        best = min(best, misfit + l1 * norms.sum() + l2 * np.linalg.svd(b, compute_uv=False).sum())
    return float(best)


@pytest.mark.parametrize(("l1", "l2", "unit"), [(40.0, 20.0, 3), (80.0, 80.0, 3), (40.0, 60.0, 1), (20.0, 30.0, 1)])
def test_the_relaxed_problem_without_activation_reaches_the_optimum(l1: float, l2: float, unit: int) -> None:
    """It is convex: any other solver ends at the same value."""
    given, linear = problem(0, rectified=False)
    step = admm.Relaxed(l1, l2, unit, bound(given))
    found = admm.minimise(given, step, linear, t=0.5, tolerance=1e-8, iterations=2000)
    wanted = proximal_gradient(given.inputs[0].numpy(), given.targets[0].numpy(), l1, l2, unit, 5000)
    assert found.objective == pytest.approx(wanted, rel=1e-4)
    assert isinstance(found.part, admm.RelaxedPair)
    norms = found.part.sparse.unflatten(2, (-1, unit)).square().sum((1, 3)).sqrt()
    values = torch.linalg.svdvals(found.part.low_rank)
    # The penalties do empty groups or lower the rank.
    assert bool((norms < 1e-6).any()) or bool((values < 1e-6).any())


def test_what_is_reported_is_the_objective_of_what_is_returned() -> None:
    given, linear = problem(1, rectified=True)
    step = admm.Relaxed(5.0, 5.0, 3, bound(given))
    found = admm.minimise(given, step, linear, t=1.0, iterations=40)
    outputs = found.part.matrices() @ given.inputs + found.bias
    assert given.misfit(outputs) + step.penalty(found.part) == pytest.approx(found.objective)
    assert found.objective == pytest.approx(min(found.start, *(i.objective for i in found.history)))


def test_residuals_fall_to_the_tolerance_and_no_further_iteration_is_made() -> None:
    given, linear = problem(2, rectified=False)
    found = admm.minimise(given, admm.Relaxed(5.0, 5.0, 3, bound(given)), linear, tolerance=1e-3, iterations=5000)
    last = found.history[-1]
    assert max(last.primal, last.dual) < 1e-3
    assert all(max(i.primal, i.dual) >= 1e-3 for i in found.history[:-1])


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    kept=st.integers(0, 3),
    rank=st.integers(0, 6),
    t=st.sampled_from([0.3, 1.0, 10.0]),
)
def test_with_the_activation_it_never_ends_above_the_linear_response(seed: int, kept: int, rank: int, t: float) -> None:
    posed, linear = problem(seed, rectified=True)
    shape = Shape(1, 6, 3, 3)
    regression = regression_of(shape, posed.gram, select(shape, posed.gram, posed.cross(linear), kept, rank))
    found = admm.minimise(posed, admm.Structured(regression, rank), linear, t=t, iterations=20)
    response = regression.solve(posed.cross(linear), rank)
    outputs = response.matrices() @ posed.centred + linear.mean(2, keepdim=True)
    assert found.start == pytest.approx(posed.misfit(outputs))
    assert found.objective <= found.start


def test_reckoning_with_the_activation_pays() -> None:
    gains = []
    for seed in range(5):
        posed, linear = problem(seed, rectified=True, outputs=12, columns=18, count=300)
        shape = Shape(1, 12, 6, 3)
        regression = regression_of(shape, posed.gram, select(shape, posed.gram, posed.cross(linear), 1, 4))
        found = admm.minimise(posed, admm.Structured(regression, 4), linear, t=10.0, iterations=100)
        gains.append(found.objective / found.start)
    assert np.mean(gains) < 0.97


def test_the_argument_of_relu_is_the_least_of_all() -> None:
    """M, element by element, against a fine grid."""
    y, z = (
        part.reshape(1, 1, -1)
        for part in torch.meshgrid(torch.linspace(0, 2, 9), torch.linspace(-3, 3, 25), indexing="ij")
    )
    y, z = y.double(), z.double()
    grid = torch.linspace(-4, 4, 8001, dtype=torch.float64)[:, None, None, None]
    for t in (0.3, 1.0, 7.0):
        posed = admm.Problem(z, y, rectified=True)
        found = admm._argument(posed, z, t)

        def cost(m: Tensor, t: float = t) -> Tensor:
            return (y - m.clamp_min(0)).square() + t / 2 * (m - z).square()

        assert (cost(found) <= cost(grid).amin(0) + 1e-9).all()


# --- regression ------------------------------------------------------------------------------------------------------


def factors_of(gram: Tensor, cross: Tensor, kept: list[int], rank: int) -> Factors:
    rest = [i for i in range(gram.shape[1]) if i not in kept]
    return Regression(gram, torch.tensor([kept], dtype=torch.long), torch.tensor([rest], dtype=torch.long)).solve(
        cross, rank
    )


def misfit(posed: admm.Problem, linear: Tensor, factors: Factors) -> float:
    return float((factors.matrices() @ posed.centred - (linear - linear.mean(2, keepdim=True))).square().sum())


@pytest.mark.parametrize("kept", [[], [0, 4], [1, 2, 3, 5, 8]])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_regression_is_the_optimum(kept: list[int], rank: int) -> None:
    """Against alternating least squares over A, U and V from several starts."""
    posed, linear = problem(3, rectified=False)
    found = factors_of(posed.gram, posed.cross(linear), kept, rank)
    assert found.expand.shape[2] == found.reduce.shape[1] == rank
    x, z = posed.centred[0].numpy(), (linear - linear.mean(2, keepdim=True))[0].numpy()
    rest = [i for i in range(9) if i not in kept]
    rng, best = np.random.default_rng(0), np.inf
    for _ in range(3):
        v = rng.standard_normal((rank, len(rest)))
        for _ in range(300):
            left = np.concatenate([x[kept], v @ x[rest]])
            solution = np.linalg.lstsq(left.T, z.T, rcond=None)[0].T if len(left) else np.zeros((6, 0))
            a, u = solution[:, : len(kept)], solution[:, len(kept) :]
            if rank:
                v = np.linalg.lstsq(u, (z - a @ x[kept]) @ np.linalg.pinv(x[rest]), rcond=None)[0]
        best = min(best, float(((z - a @ x[kept] - u @ v @ x[rest]) ** 2).sum()))
    assert misfit(posed, linear, found) <= best * (1 + 1e-6) + 1e-9


def test_without_data_it_is_the_svd() -> None:
    weight = torch.randn(1, 6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = factors_of(torch.eye(9, dtype=torch.float64)[None], weight, [], 2)
    left, values, right = torch.linalg.svd(weight[0])
    torch.testing.assert_close(found.matrices()[0], left[:, :2] * values[:2] @ right[:2])


def test_columns_chosen_are_nearly_the_best() -> None:
    """Against all choices."""
    shape, shares = Shape(1, 6, 9, 1, by_column=True), []
    for seed in range(6):
        posed, linear = problem(seed, rectified=False)
        cross = posed.cross(linear)
        own = select(shape, posed.gram, cross, 3, 1)[0].tolist()
        every = [misfit(posed, linear, factors_of(posed.gram, cross, list(c), 1)) for c in combinations(range(9), 3)]
        found = misfit(posed, linear, factors_of(posed.gram, cross, own, 1))
        shares.append(np.mean([found > one + 1e-9 for one in every]))
    assert np.mean(shares) < 0.1
