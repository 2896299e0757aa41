"""How much of a layer is computed at a time, chosen from its shape and the facts of the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Protocol

from .geometry import ConvGeometry
from .layouts import PhaseLayout, direct_layout

_FLOAT = 4  # bytes


class Cpu(Protocol):
    """The part of targets.CpuFacts used here."""

    def __hash__(self) -> int: ...
    @property
    def lanes(self) -> int: ...
    @property
    def l2(self) -> int: ...
    @property
    def accumulators(self) -> int: ...


@cache
def direct_blocking(geometry: ConvGeometry, cpu: Cpu) -> PhaseLayout:
    """The fewest blocks whose packed input takes at most half of L2; at least 4 rows where rows can be split."""

    def fits(layout: PhaseLayout) -> bool:
        return geometry.in_channels * layout.channel_size * _FLOAT <= cpu.l2 // 2

    least_rows = min(4, geometry.out_height)
    rows, cols = geometry.out_height, geometry.out_width
    while rows > least_rows and not fits(direct_layout(geometry, rows, cols)):
        rows = max(least_rows, -(-rows // 2))
    while cols > 4 * cpu.lanes and not fits(direct_layout(geometry, rows, cols)):
        cols = max(4 * cpu.lanes, -(-cols // 2))
    return direct_layout(geometry, rows, cols)


def direct_panel(layout: PhaseLayout, cpu: Cpu) -> int:
    """Output pixels to accumulate at once: the fewest panels, evenly filled."""
    vectors = -(-layout.flat_positions // cpu.lanes)
    panels = -(-vectors // cpu.accumulators)
    return -(-vectors // panels) * cpu.lanes


def extra_channels(layout: PhaseLayout, panel: int) -> int:
    """Channels of zeros to pack for what the last panel of the last channel reads beyond its planes."""
    panels = -(-layout.flat_positions // panel)
    return -(-(panels * panel - layout.flat_positions) // layout.channel_size)


@dataclass(frozen=True)
class WinogradBlocking:
    """How many tiles are computed at a time.

    Attributes:
        vectors: vectors of tiles in a block. blocks: of an image. last: vectors of the last block.
        split: sums kept for each filter, of every split-th non-zero: with few vectors in a block, one sum would wait
            for the addition before.
    """

    vectors: int
    blocks: int
    last: int
    split: int

    @classmethod
    def of(cls, all_vectors: int, vectors: int, split: int) -> WinogradBlocking:
        """An image of `all_vectors` in blocks of `vectors`."""
        blocks = -(-all_vectors // vectors)
        return cls(vectors, blocks, all_vectors - (blocks - 1) * vectors, split)


_VECTORS = 6
"""Measured from 64 to 512 channels with AVX-512 and AVX2: between four and seven it hardly matters."""


@cache
def winograd_blocking(vectors: int, cpu: Cpu) -> WinogradBlocking:
    """Blocks for an image of so many vectors, evenly filled.

    A weight, once loaded, should meet a few vectors; with many, what is transformed at a time leaves the caches.
    """
    blocks = -(-vectors // max(1, min(_VECTORS, cpu.accumulators // 2)))
    length = -(-vectors // blocks)
    return WinogradBlocking.of(vectors, length, _split(length))


def _split(vectors: int) -> int:
    """Two multiply-adds a cycle, each of four cycles, need about eight sums at once; the next filter's overlap too."""
    return {1: 4, 2: 4}.get(vectors, 1)
