"""The shape of a convolution, apart from any framework."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ConvGeometry:
    """A 2-D convolution, NCHW data and OIHW weights.

    Attributes:
        batch, in_channels, in_height, in_width: shape of the data.
        out_channels: number of filters, over all groups.
        kernel: (height, width) of a filter, undilated.
        strides: (vertical, horizontal).
        padding: zeros added (top, left, bottom, right).
        dilation: (vertical, horizontal).
        groups: channel groups.

    Raises:
        ValueError: when the sizes do not make a convolution with at least one output.
    """

    batch: int
    in_channels: int
    in_height: int
    in_width: int
    out_channels: int
    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def __post_init__(self) -> None:
        for name, length in (("kernel", 2), ("strides", 2), ("padding", 4), ("dilation", 2)):
            values = tuple(int(v) for v in getattr(self, name))
            if len(values) != length:
                raise ValueError(f"{name} needs {length} numbers, got {values}")
            object.__setattr__(self, name, values)
        positive = ("batch", "in_channels", "in_height", "in_width", "out_channels", "groups")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("kernel", "strides", "dilation"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if min(self.padding) < 0:
            raise ValueError(f"padding must not be negative, got {self.padding}")
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise ValueError(
                f"{self.groups} groups do not divide {self.in_channels} input and {self.out_channels} output channels"
            )
        if self.out_height < 1 or self.out_width < 1:
            raise ValueError(f"a filter of {self.kernel} does not fit into {self.padded_height} x {self.padded_width}")

    @property
    def padded_height(self) -> int:
        return self.in_height + self.padding[0] + self.padding[2]

    @property
    def padded_width(self) -> int:
        return self.in_width + self.padding[1] + self.padding[3]

    @property
    def out_height(self) -> int:
        return (self.padded_height - self.dilation[0] * (self.kernel[0] - 1) - 1) // self.strides[0] + 1

    @property
    def out_width(self) -> int:
        return (self.padded_width - self.dilation[1] * (self.kernel[1] - 1) - 1) // self.strides[1] + 1

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """(out_channels, in_channels / groups, kernel height, kernel width)."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel)

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """(batch, out_channels, out_height, out_width)."""
        return (self.batch, self.out_channels, self.out_height, self.out_width)

    @property
    def fully_connected(self) -> bool:
        """Whether this is a matrix times the channels of one pixel."""
        shape = (self.in_height, self.in_width, *self.kernel)
        return shape == (1, 1, 1, 1) and not any(self.padding) and self.groups == 1

    @property
    def macs(self) -> int:
        """Multiplications of the dense direct convolution."""
        _, channels, height, width = self.weight_shape
        return self.batch * self.out_height * self.out_width * self.out_channels * channels * height * width


def round_up(value: int, multiple: int) -> int:
    """To the next multiple."""
    return -(-value // multiple) * multiple
