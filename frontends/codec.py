"""Lossless coders for the streams of a file. A stream names its coder by number, so that coders can be added.

CODES and SCALED_CODES are for quantised weights only, and know that they are; see ``coding``.

A coder turns bytes into bytes. Decoding is bounded: the caller says how many bytes must come out, and no more are ever
held. ``most`` bounds what a stream can expand to, so that a declared size can be refused before anything is allocated.
"""

from __future__ import annotations

import bz2
from typing import Protocol

import numpy as np

from .coding import floats
from .errors import InputError


class Coder(Protocol):
    """A lossless coder.

    Attributes:
        number: its name in the file; never used again for another coder. name: for people.
    """

    number: int
    name: str

    def encode(self, data: bytes) -> bytes:
        """The coded stream; the same bytes for the same data."""

    def decode(self, stream: bytes, size: int) -> bytes:
        """The ``size`` bytes that were coded. ValueError for a stream that is damaged or of another size."""

    def most(self, length: int) -> int:
        """The most bytes a stream of ``length`` bytes can stand for."""


class Stored:
    """The bytes as they are."""

    number = 0
    name = "stored"

    def encode(self, data: bytes) -> bytes:
        """The data."""
        return data

    def decode(self, stream: bytes, size: int) -> bytes:
        """The stream, which must have ``size`` bytes."""
        if len(stream) != size:
            raise ValueError(f"{len(stream)} bytes stored, {size} declared")
        return stream

    def most(self, length: int) -> int:
        """``length``."""
        return length


class Bzip2:
    """Burrows-Wheeler coding: the universal coder of arXiv 1805.08303, one stream of at most 900 kB blocks."""

    number = 1
    name = "bzip2"

    # A block holds 900,000 bytes after a first run-length code in which 5 bytes stand for at most 259; it costs more
    # than 32 bytes by its header, tables and selectors (48 + 32 + 1 + 24 + 16 + ... bits). Streams have 4 + 10 more.
    _BLOCK = 900_000 * 259 // 5
    _BLOCK_COST = 32

    def encode(self, data: bytes) -> bytes:
        """bzip2 -9."""
        return bz2.compress(data, 9)

    def decode(self, stream: bytes, size: int) -> bytes:
        """Exactly one bzip2 stream of ``size`` bytes, nothing behind it."""
        decoder = bz2.BZ2Decompressor()
        try:
            data = decoder.decompress(stream, max_length=size + 1)
        except (OSError, EOFError):
            raise ValueError("the bzip2 stream is damaged") from None
        if len(data) != size or not decoder.eof or decoder.unused_data:
            raise ValueError(f"the bzip2 stream does not hold the {size} bytes declared")
        return data

    def most(self, length: int) -> int:
        """Every ``_BLOCK_COST`` bytes a block of the longest runs."""
        return (length // self._BLOCK_COST + 1) * self._BLOCK


class Floats:
    """Few float32 numbers; see ``coding.floats``."""

    number = 3
    name = "floats"

    def encode(self, data: bytes) -> bytes:
        """The stream of ``coding.floats``."""
        return floats.encode(np.frombuffer(data, "<f4").astype(np.float32))

    def decode(self, stream: bytes, size: int) -> bytes:
        """The numbers, little-endian."""
        if size % 4:
            raise ValueError(f"{size} bytes are no float32 numbers")
        return floats.decode(stream, size // 4).astype("<f4").tobytes()

    def most(self, length: int) -> int:
        """The same for all."""
        return 4 * floats.MOST


CODES = 2
"""Number of the coder of ``coding.tensors``, a scale as it is behind the stream."""

SCALED_CODES = 4
"""Number of the coder of ``coding.tensors`` with the scale within the stream."""

CODERS: dict[int, Coder] = {coder.number: coder for coder in (Stored(), Bzip2(), Floats())}


def encode(data: bytes, of_floats: bool = False) -> tuple[int, bytes]:
    """The number of the coder that makes the shortest stream, and the stream. Ties go to the lower number."""
    fitting = of_floats and len(data) <= 4 * floats.MOST
    coders = [coder for number, coder in CODERS.items() if fitting or number != Floats.number]
    streams = {coder.number: coder.encode(data) for coder in coders}
    best = min(streams, key=lambda number: (len(streams[number]), number))
    return best, streams[best]


def decode(number: int, stream: bytes, size: int) -> bytes:
    """The ``size`` bytes of a stream.

    Raises:
        InputError: unknown coder, a size the stream cannot expand to, or a damaged stream.
    """
    coder = CODERS.get(number)
    if coder is None:
        raise InputError(f"coder {number} is unknown; install a newer jointsparse")
    if not 0 <= size <= coder.most(len(stream)):
        raise InputError(f"{len(stream)} bytes of {coder.name} cannot hold the {size} bytes declared")
    try:
        return coder.decode(stream, size)
    except ValueError as error:
        raise InputError(str(error)) from None
