"""How much of a layer is computed at a time, chosen from its shape and the facts of the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Protocol

PARALLEL_BLOCKS = 4
"""With so many blocks or more, of all images, they run in parallel; with fewer, parts of them, about as many, of which
each may read all channels again. No more threads than that get any."""


class Cpu(Protocol):
    """The part of targets.CpuFacts used here."""

    def __hash__(self) -> int: ...
    @property
    def lanes(self) -> int: ...
    @property
    def registers(self) -> int: ...
    @property
    def l1(self) -> int: ...
    @property
    def accumulators(self) -> int: ...


@dataclass(frozen=True)
class WinogradBlocking:
    """How many tiles are computed at a time.

    Attributes:
        image: vectors of tiles of an image. blocks: of an image, of vectors as equally many as can be.
        together: rows of weights computed side by side, for every vector of a block: loops end less often, and with few
            vectors one sum would wait for the addition before.
    """

    image: int
    blocks: int
    together: int

    @property
    def vectors(self) -> int:
        """Of a block; some have one less, if the blocks do not share them out evenly."""
        return -(-self.image // self.blocks)

    @property
    def even(self) -> bool:
        """Whether all blocks have equally many vectors."""
        return self.image % self.blocks == 0


_TILES = 32
"""Of a block. A weight, once loaded, should meet some tiles; but with more, what is transformed at a time, and the
images around it, leave the caches. Measured from 64 to 512 channels with AVX-512 and AVX2."""

_FEW = 16
"""Blocks of an image below which, with few channels, there is no odd number: of seven, one thread of two would have
four. Then they are longer, up to twice: with 13 vectors of 64 channels 2 % slower on one thread, 10 % faster on two."""

_FEW_CHANNELS = 128
"""With more, the transformed channels of longer blocks would not stay in L2: with 256, 10 % slower on one thread, and
nothing gained on two."""

_TOGETHER = 4
"""Rows of weights. With more it makes no difference."""


@cache
def winograd_blocking(vectors: int, channels: int, filters: int, cpu: Cpu) -> WinogradBlocking:
    """Blocks for an image of so many vectors and channels, and bundles of rows, both evenly filled; their sums stay in
    three quarters of the registers."""
    sums = cpu.registers * 3 // 4
    most = max(1, min(_TILES // cpu.lanes, sums // 2))
    blocks = -(-vectors // most)
    if PARALLEL_BLOCKS <= blocks < _FEW and blocks % 2 and 2 * most <= sums and channels <= _FEW_CHANNELS:
        blocks = 2 * -(-vectors // (2 * 2 * most))
    length = -(-vectors // blocks)
    bundles = -(-filters // max(1, min(_TOGETHER, sums // length)))
    return WinogradBlocking(vectors, blocks, -(-filters // bundles))
