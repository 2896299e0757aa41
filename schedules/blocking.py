"""How much of a layer is computed at a time, chosen from its shape and the facts of the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Protocol


class Cpu(Protocol):
    """The part of targets.CpuFacts used here."""

    def __hash__(self) -> int: ...
    @property
    def lanes(self) -> int: ...
    @property
    def l1(self) -> int: ...
    @property
    def accumulators(self) -> int: ...


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
