"""Symbols to bytes and back.

A model walks over its symbols once to write and once to read, by the same code: it hands each group of symbols to a
stream together with their distribution, and goes on from what the stream hands back.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from . import ans

Symbols = NDArray[np.int32]

_END = np.array([2**16 - 1], np.int32)
"""Lies below all symbols. Without it many equal ones could cost nothing: symbol 0 leaves a state of 0 as it is."""


class Stream(Protocol):
    """Where symbols go to, or come from."""

    def code(self, model: Any, part: slice, symbols: Symbols | None) -> Symbols:
        """Symbols of one distribution.

        Args:
            model: made by ``ans``. part: of the symbols, which of them come next. symbols: when writing.
        """
        ...


def code_bits(stream: Stream, bits: int, count: int, values: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """Write or read numbers of so many bits, all equally likely: the lower 16 bits of all, then the others."""
    result = np.zeros(count, np.int64)
    for shift, length in ((0, min(bits, 16)), (16, bits - 16)):
        if length > 0:
            part = None if values is None else (values >> shift & (1 << length) - 1).astype(np.int32)
            result |= stream.code(ans.uniform(1 << length), slice(0, count), part).astype(np.int64) << shift
    return result


class Writer:
    """Keeps the symbols until ``finish``: what was written first has to be coded last."""

    def __init__(self) -> None:
        self._groups: list[tuple[Symbols, Any]] = []

    def code(self, model: Any, part: slice, symbols: Symbols | None) -> Symbols:
        """Take symbols."""
        assert symbols is not None
        taken = symbols[part]
        if len(taken):
            self._groups.append((taken, model))
        return taken

    def finish(self) -> bytes:
        """The stream: words of 32 bits, the zeros behind the last byte that is none left out."""
        coder = ans.Coder()
        coder.encode_reverse(_END, ans.uniform(2**16))
        for symbols, model in reversed(self._groups):
            coder.encode_reverse(symbols, model)
        return coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0")


class Reader:
    """Raises ValueError for bytes that are no stream."""

    def __init__(self, data: bytes) -> None:
        if data.endswith(b"\0"):
            raise ValueError("not a stream of symbols")
        words = np.frombuffer(data + bytes(-len(data) % 4), "<u4")
        self._coder = ans.Coder(words.astype(np.uint32))

    def code(self, model: Any, part: slice, symbols: Symbols | None) -> Symbols:
        """Give symbols."""
        count = part.stop - part.start
        return self._coder.decode(model, count) if count else np.empty(0, np.int32)

    def finish(self) -> None:
        """Raises ValueError unless this is the end."""
        if self._coder.decode(ans.uniform(2**16), 1)[0] != _END[0] or not self._coder.is_empty():
            raise ValueError("the stream of symbols does not end where it should")
