"""How much of a layer is computed at a time, chosen from its shape and the facts of the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Protocol

PARALLEL_BLOCKS = 4
"""With this many blocks or more, blocks run in parallel; with fewer, what there is to do in a block."""


PARTS = 8
"""Into how many parts channels or filters are split to run in parallel."""


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
        vectors: vectors of tiles in a block. blocks: of an image. last: vectors of the last block.
        together: rows of weights computed side by side, for every vector of a block: loops end less often, and with few
            vectors one sum would wait for the addition before.
    """

    vectors: int
    blocks: int
    last: int
    together: int

    @classmethod
    def of(cls, all_vectors: int, vectors: int, together: int) -> WinogradBlocking:
        """An image of `all_vectors` in blocks of `vectors`."""
        blocks = -(-all_vectors // vectors)
        return cls(vectors, blocks, all_vectors - (blocks - 1) * vectors, together)


_TILES = 32
"""Of a block. A weight, once loaded, should meet some tiles; but with more, what is transformed at a time, and the
images around it, leave the caches. Measured from 64 to 512 channels with AVX-512 and AVX2."""

_TOGETHER = 4
"""Rows of weights. With more it makes no difference."""


@cache
def winograd_blocking(vectors: int, filters: int, cpu: Cpu) -> WinogradBlocking:
    """Blocks for an image of so many vectors, and bundles of so many rows, both evenly filled; their sums stay in three
    quarters of the registers."""
    sums = cpu.registers * 3 // 4
    blocks = -(-vectors // max(1, min(_TILES // cpu.lanes, sums // 2)))
    length = -(-vectors // blocks)
    bundles = -(-filters // max(1, min(_TOGETHER, sums // length)))
    return WinogradBlocking.of(vectors, length, -(-filters // bundles))
