"""A model whose layers are sums of a structured-sparse and a low-rank part: layer by layer, by one budget.

After Ma et al., arXiv 1807.10119: the inputs of a layer are those that the layers already approximated leave it, its
targets what the original network puts out behind the layer's activation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..losses import LOSSES
from .budgets import BUDGETS
from .checkpoint import Checkpoint, fingerprint
from .fitting import fit
from .layers import put
from .original import PARTS, Budget, Original
from .structures import Structure

__all__ = ["UNITS", "approximate"]

UNITS = ("channels", "columns")


def approximate(
    model: nn.Module,
    data: Iterable[Any],
    ratio: float = 4.0,
    *,
    budget: str = "parameters",
    units: str = "channels",
    parts: str = "both",
    loss: str | None = None,
    structures: Mapping[str, Structure] | None = None,
    exclude: Collection[str] = (),
    positions: int = 10_000,
    iterations: int = 60,
    tolerance: float = 1e-4,
    seed: int = 0,
    checkpoint: Path | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> nn.Module:
    """Approximate convolutions and linear layers so that the model becomes ``ratio`` times smaller.

    Each becomes a ``SparseLowRank``; the result is an ordinary module, to be fine-tuned, exported, pruned, quantised.

    Args:
        model: is left as it is.
        data: batches of inputs, or of inputs and targets, of which only inputs are looked at; a few hundred images.
        ratio: of all weights of convolutions and linear layers, or with ``budget="multiplications"`` of the
            multiplications by them, before and after.
        units: what is kept or not: whole input "channels" or single "columns" of the im2col matrix, which pay only in
            sparse kernels.
        parts: "both", or one of them alone: "sparse", "low-rank".
        loss: "cross-entropy" or "mse", by which the budget is then shared out; None: errors of the layers, each
            relative to its outputs, count alike.
        structures: of some layers, by name. What is left of the budget goes to all others, unless ``ratio`` is 1.
        exclude: names of layers to leave as they are.
        positions: outputs of a layer that are looked at, in all.
        iterations, tolerance: at most, and for both residuals, of ``admm.minimise``.
        checkpoint: a file that keeps the layers done; where it is there, of the same model and options, they are taken
            from it.
        device: "cuda" where there is one, by default.
        progress: told of each layer.

    Raises:
        InputError: for a bad option, no data, a layer unknown or a structure that it cannot have, a checkpoint of
            another run, or a ratio that cannot be reached.
    """
    _check(ratio, budget, units, parts, loss, positions, iterations)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    images = [batch.to(place) for batch in _images(data)]
    result = copy.deepcopy(model).to(place)
    original = Original(
        copy.deepcopy(result).eval().requires_grad_(False),
        images,
        by_column=units == "columns",
        loss=loss,
        positions=positions,
        progress=progress,
    )
    chosen = original.structures(Budget(ratio, budget, parts), structures or {}, exclude)
    kept = Checkpoint(checkpoint, fingerprint(model, chosen, loss, units, positions, iterations, tolerance, seed))
    for name, structure in chosen.items():
        found = kept.get(name, place)
        if found is None:
            found = fit(
                original,
                result,
                name,
                structure,
                iterations=iterations,
                tolerance=tolerance,
                seed=seed,
                progress=progress,
            )
            kept.add(name, found)
        put(result, name, original.around(name).norm, original.shapes[name], found)
    parameter = next(model.parameters(), None)
    return result.to(parameter.device) if parameter is not None else result


def _check(
    ratio: float, budget: str, units: str, parts: str, loss: str | None, positions: int, iterations: int
) -> None:
    if not 1 <= ratio < float("inf"):
        raise InputError(f"ratio {ratio}: it must be at least 1")
    for name, value, allowed in (("budget", budget, BUDGETS), ("units", units, UNITS), ("parts", parts, PARTS)):
        if value not in allowed:
            raise InputError(f'{name} "{value}": choose {" or ".join(allowed)}')
    if loss is not None and loss not in LOSSES:
        raise InputError(f'loss "{loss}": choose {" or ".join(LOSSES)}')
    if positions < 1 or iterations < 0:
        raise InputError(f"{positions} positions and {iterations} iterations: at least 1 and 0")


def _images(data: Iterable[Any]) -> list[Tensor]:
    found = [batch if isinstance(batch, Tensor) else batch[0] for batch in data]
    if not found or not all(isinstance(batch, Tensor) and len(batch) for batch in found):
        raise InputError("no calibration data; give some batches of inputs")
    return found
