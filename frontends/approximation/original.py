"""The model to be approximated: its layers, what stands behind them, and what each of them is to become."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .budgets import Choice, choices_of, within
from .sampling import importances, moments, output_sizes
from .structures import Structure, shape_of
from .tracing import Surroundings, surroundings_of

__all__ = ["DAMPING", "PARTS", "Budget", "Original"]

PARTS = ("both", "sparse", "low-rank")

DAMPING = 1e-3
"""Of a Gram matrix, relative to the mean of its diagonal."""

_UNKNOWN = Surroundings(1, None, False)


@dataclass(frozen=True)
class Budget:
    """See ``approximate``.

    Attributes:
        ratio: of the whole before and after. of: "parameters" or "multiplications". parts: that layers may have.
    """

    ratio: float
    of: str
    parts: str

    def allows(self, choice: Choice) -> bool:
        """Whether a layer may become that."""
        structure = choice.structure
        if structure is None or self.parts == "both":
            return True
        return structure.kept == 0 if self.parts == "low-rank" else structure.rank == 0


class Original:
    """A model in evaluation mode, and calibration images.

    Attributes:
        layers: convolutions and linear layers by name, in the order in which they are computed. shapes: theirs.
            importance: how much the loss minds errors of their outputs, (G, n) each; empty without a loss.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Sequence[Tensor],
        *,
        by_column: bool,
        loss: str | None,
        positions: int,
        progress: Callable[[str], None],
    ) -> None:
        self.model, self.images, self.positions, self.progress = model, images, positions, progress
        modules = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
        sizes = output_sizes(model, modules, images[0])
        self.layers: dict[str, Any] = {name: modules[name] for name in sizes}
        self.shapes = {name: shape_of(module, by_column, sizes[name]) for name, module in self.layers.items()}
        traced = surroundings_of(model)
        if traced is None:
            progress("the model's control flow depends on data: activations and BatchNorm are not reckoned with")
        self._surroundings = traced or {}
        self.importance = {} if loss is None else importances(model, self.layers, self.shapes, images, loss)

    def around(self, name: str) -> Surroundings:
        """What stands behind a layer."""
        return self._surroundings.get(name, _UNKNOWN)

    def norm(self, name: str) -> Any:
        """The BatchNorm behind a layer, or None."""
        norm = self.around(name).norm
        return None if norm is None else self.model.get_submodule(norm)

    def structures(
        self, budget: Budget, given: Mapping[str, Structure], exclude: Collection[str]
    ) -> dict[str, Structure]:
        """What becomes of the layers, as given or by the budget, in the order in which they are computed."""
        if unknown := sorted((set(given) | set(exclude)) - set(self.layers)):
            raise InputError(f'the model has no convolution or linear layer "{unknown[0]}"')
        free = [name for name in self.layers if name not in given and self._is_free(name, exclude)]
        for name, structure in given.items():
            if reason := self._why_not(name, exclude):
                raise InputError(f'layer "{name}" cannot have a structure: {reason}')
            self.shapes[name].check(structure, name)
        found = dict(given)
        if budget.ratio > 1:
            if not free:
                raise InputError("no layer is left for the budget; exclude fewer, or give ratio 1 with structures")
            found |= self._by_budget(budget, free, given)
        return {name: found[name] for name in self.layers if name in found}

    def _is_free(self, name: str, exclude: Collection[str]) -> bool:
        reason = self._why_not(name, exclude)
        if reason is not None:
            self.progress(f"{name}: stays as it is: {reason}")
        return reason is None

    def _why_not(self, name: str, exclude: Collection[str]) -> str | None:
        module, shape = self.layers[name], self.shapes[name]
        users = sum(getattr(m, "weight", None) is module.weight for m in self.model.modules())
        if name in exclude:
            return "excluded"
        if users > 1 or self.around(name).uses > 1:
            return "the model uses its weights more than once"
        if shape.outputs == 1 or shape.units == 1:
            return "one output or one input a group"
        return None

    def _by_budget(self, budget: Budget, free: Sequence[str], given: Mapping[str, Structure]) -> dict[str, Structure]:
        self.progress(f"looking at {len(free)} layers on {sum(map(len, self.images))} images")
        layers = {name: self.layers[name] for name in free}
        grams = moments(self.model, layers, self.shapes, self.images, self.positions)
        unit = {n: float(s.positions) if budget.of == "multiplications" else 1.0 for n, s in self.shapes.items()}
        choices = {name: self._choices(budget, name, gram, unit[name]) for name, gram in grams.items()}
        fixed = sum(
            unit[name] * (shape.cost(given[name]) if name in given else shape.weights)
            for name, shape in self.shapes.items()
            if name not in layers
        )
        whole = sum(unit[name] * shape.weights for name, shape in self.shapes.items())
        found = within(choices, whole / budget.ratio - fixed)
        for name in free:
            if found[name].structure is None:
                self.progress(f"{name}: stays as it is: smaller, it would cost more than it saves elsewhere")
        return {name: choice.structure for name, choice in found.items() if choice.structure is not None}

    def _choices(self, budget: Budget, name: str, gram: Tensor, unit: float) -> list[Choice]:
        shape = self.shapes[name]
        weight = shape.matrices(self.layers[name].weight.detach().float())
        gram = _damped(gram)
        if self.importance:
            importance = self.importance[name].to(weight.device)
        else:
            # Errors relative to a layer's outputs count alike.
            energy = ((weight @ gram) * weight).sum().clamp_min(torch.finfo(gram.dtype).tiny)
            importance = torch.ones_like(weight[..., 0]) / energy
        every = choices_of(shape, weight, gram, importance, budget.ratio, unit)
        return [choice for choice in every if budget.allows(choice)]


def _damped(gram: Tensor) -> Tensor:
    mean = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(gram.dtype).tiny)
    return gram + DAMPING * mean[:, None, None] * torch.eye(gram.shape[1], device=gram.device)
