"""What a layer is approximated by: which columns of its matrix are kept, and the rank of the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import InputError

__all__ = ["Shape", "Structure", "shape_of"]


@dataclass(frozen=True)
class Structure:
    """How many units a group of a layer keeps, and the rank of what approximates all others.

    A unit is an input channel with all its taps, or one column of the im2col matrix. A layer with groups has as many
    kept units, and the same rank, in each.
    """

    kept: int
    rank: int


@dataclass(frozen=True)
class Shape:
    """A convolution or fully-connected layer as matrices, one a group.

    Attributes:
        groups: matrices. outputs: rows of each. channels: inputs of each. taps: columns a channel has. by_column:
            whether columns, not channels, are kept or not. positions: outputs an image has, height times width.
    """

    groups: int
    outputs: int
    channels: int
    taps: int
    by_column: bool = False
    positions: int = 1

    @property
    def columns(self) -> int:
        """Of a matrix."""
        return self.channels * self.taps

    @property
    def unit(self) -> int:
        """Columns of what is kept or not."""
        return 1 if self.by_column else self.taps

    @property
    def units(self) -> int:
        """Of a matrix."""
        return self.columns // self.unit

    @property
    def weights(self) -> int:
        """Of the layer as it is."""
        return self.groups * self.outputs * self.columns

    def cost(self, structure: Structure) -> int:
        """Weights of a structure: n x kept columns, and a pair of rank x other columns and n x rank."""
        own = structure.kept * self.unit
        return self.groups * (self.outputs * own + structure.rank * (self.columns - own + self.outputs))

    def check(self, structure: Structure, name: str) -> None:
        """Raise InputError unless the layer can have the structure."""
        if not (0 <= structure.kept <= self.units and 0 <= structure.rank <= min(self.outputs, self.columns)):
            raise InputError(
                f'layer "{name}": {structure}; it has {self.units} units to keep and {self.outputs} outputs a group'
            )
        if not (structure.kept or structure.rank):
            raise InputError(f'layer "{name}": {structure}; nothing would be left of it')

    def matrices(self, weight: Tensor) -> Tensor:
        """The layer's weight, groups x outputs x columns."""
        return weight.reshape(self.groups, self.outputs, self.columns)

    def columns_of(self, units: Tensor) -> Tensor:
        """The columns of some units, (groups, count) to (groups, count * unit)."""
        return (units[..., None] * self.unit + torch.arange(self.unit, device=units.device)).flatten(-2)

    def other_units(self, units: Tensor) -> Tensor:
        """Those not among ``units``, ascending."""
        rest = torch.ones(self.groups, self.units, dtype=torch.bool, device=units.device).scatter_(1, units, False)
        return rest.nonzero()[:, 1].reshape(self.groups, -1)


def shape_of(module: nn.Module, by_column: bool = False, positions: int = 1) -> Shape:
    """Of an ``nn.Conv2d`` or ``nn.Linear``. A channel of one tap is a column, and is treated as a channel."""
    if isinstance(module, nn.Linear):
        return Shape(1, module.out_features, module.in_features, 1, positions=positions)
    assert isinstance(module, nn.Conv2d)
    groups, (height, width) = module.groups, module.kernel_size
    outputs, channels = module.out_channels // groups, module.in_channels // groups
    taps = height * width
    return Shape(groups, outputs, channels, taps, by_column and taps > 1, positions)
