"""One budget for all layers: where a weight saves most.

Each layer has a choice of structures, each with a cost and an estimate of the loss it brings. For a price of a unit of
cost each layer takes what is cheapest in all; the price is found by bisection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from .selection import regression_of, selections
from .structures import Shape, Structure

__all__ = ["BUDGETS", "Choice", "choices_of", "within"]

BUDGETS = ("parameters", "multiplications")

_SHARES = (0, 1 / 32, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4)
"""Of the units that may be kept."""

_HALVINGS = 100


@dataclass(frozen=True)
class Choice:
    """A structure, None for a layer that stays as it is, what it costs and what it brings of loss."""

    structure: Structure | None
    cost: float
    loss: float


def choices_of(
    shape: Shape, weight: Tensor, gram: Tensor, importance: Tensor, ratio: float, unit: float
) -> list[Choice]:
    """What a layer may become, by its linear response.

    Args:
        weight: (G, n, p). gram: covariance of the inputs, (G, p, p), positive definite. importance: of errors of
            outputs, (G, n): half of it, times the mean square error, is loss. ratio: about how much smaller layers are
            to become, for the choice of columns. unit: cost of a weight.
    """
    scaled = weight * importance.sqrt()[..., None]
    cross = scaled @ gram
    choices = [Choice(None, shape.weights * unit, 0.0)]
    stages = [(kept, _rank_for(shape, kept, ratio)) for kept in sorted({int(shape.units * s) for s in _SHARES})]
    for kept, units in selections(shape, gram, cross, stages):
        energies = regression_of(shape, gram, units).spectrum(cross)[0].double().sum(0)
        lost = energies.sum() - torch.cat([energies.new_zeros(1), energies.cumsum(0)])
        most = min(shape.outputs, shape.columns - kept * shape.unit)
        for rank in range(0 if kept else 1, most + 1):
            structure = Structure(kept, rank)
            cost = shape.cost(structure)
            if cost < shape.weights:
                choices.append(Choice(structure, cost * unit, max(0.0, 0.5 * float(lost[rank]))))
    return choices


def _rank_for(shape: Shape, kept: int, ratio: float) -> int:
    """The rank at which a layer is ``ratio`` times smaller; 0 where the kept columns are too many for any."""
    own = shape.cost(Structure(kept, 0))
    left = shape.weights / ratio - own
    each = shape.cost(Structure(kept, 1)) - own
    return min(shape.outputs, max(0, int(left / each)))


def within(choices: Mapping[str, Sequence[Choice]], budget: float) -> dict[str, Choice]:
    """Of each layer the choice that, within the budget for all, makes the sum of losses least, to a choice at the edge.

    Raises:
        InputError: the cheapest choices cost more than the budget.
    """
    least = {name: min(own, key=lambda c: (c.cost, c.loss)) for name, own in choices.items()}
    if sum(choice.cost for choice in least.values()) > budget:
        raise InputError("the layers cannot become that small; ask for a lower ratio, or exclude fewer layers")

    def at(price: float) -> dict[str, Choice]:
        return {name: min(own, key=lambda c: (c.loss + price * c.cost, c.cost)) for name, own in choices.items()}

    low, high, found = 0.0, 1e-30, least
    for _ in range(_HALVINGS):
        chosen = at(high)
        if sum(choice.cost for choice in chosen.values()) <= budget:
            found = chosen
            break
        low, high = high, high * 8
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5 if low else high / 8
        if not low < middle < high:
            break
        chosen = at(middle)
        if sum(choice.cost for choice in chosen.values()) <= budget:
            high, found = middle, chosen
        else:
            low = middle
    return _filled(choices, found, budget)


def _filled(choices: Mapping[str, Sequence[Choice]], found: dict[str, Choice], budget: float) -> dict[str, Choice]:
    """What is left of the budget goes where it saves most, choice by choice."""
    found = dict(found)
    while True:
        left = budget - sum(choice.cost for choice in found.values())
        better = [
            ((found[name].loss - c.loss) / (c.cost - found[name].cost), name, c)
            for name, own in choices.items()
            for c in own
            if 0 < c.cost - found[name].cost <= left and c.loss < found[name].loss
        ]
        if not better:
            return found
        _, name, choice = max(better, key=lambda entry: entry[:2])
        found[name] = choice
