"""Vector code: the part of TIR that straight-line kernels are written in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction

import tvm
from tvm import tir

from .aligned_stack import align_stack
from .registers import hold_address, hold_vector, import_functions, load_behind
from .targets import PLAIN_CODE, STACK_BYTES, CodeFeatures
from .winograd import Matrix

LINE = 16
"""Floats of a line of the caches, by which they are fetched."""

_FAR = 1 << 20
"""Floats of an image that is to be fetched ahead: of one that L2 holds it hardly gains anything. Measured with 1.6 to
236 MB by Winograd convolutions."""

Behind = Callable[[int], tir.PrimExpr]
"""(floats) -> what is so many floats behind a place, along the last axis."""


def is_far(floats: int) -> bool:
    """Whether an image is too large to be in L2 when it is read or written."""
    return floats > _FAR


def part_of(size: int, of: int, first: tir.PrimExpr) -> tir.PrimExpr:
    """How many of `of` are in the part from `first` on, of `size` but for the last."""
    return tir.const(size, "int32") if of % size == 0 else tir.min(size, of - first)


def share_of(number: tir.PrimExpr, of: int, parts: int) -> tir.PrimExpr:
    """Where the part of this number begins, of parts as equal as can be. The product may need 64 bits."""
    return tir.Cast("int32", tir.Cast("int64", number) * of // parts)


class VectorCode:
    """Emits loads, stores and arithmetic on float32 vectors of one length.

    Attributes:
        features: of the target's code.
    """

    def __init__(self, ib: tvm.tir.ir_builder.IRBuilder, lanes: int, *, features: CodeFeatures = PLAIN_CODE) -> None:
        self.ib = ib
        self.lanes = lanes
        self.features = features
        self._scalars = 0
        self._slots: list[tir.PrimExpr] = []
        self._holds = features.hold_address and lanes > 1
        if self._holds:
            import_functions(ib, lanes, vectors=features.embed_broadcast)

    def align_stack(self) -> None:
        """For code that will not find room for all its vectors in registers."""
        if self.features.align_frame:
            align_stack(self.ib, 4 * self.lanes)

    def let(self, value: tir.PrimExpr) -> tir.Var:
        """A name for an integer: computed once, here."""
        self._scalars += 1
        return self.ib.let(f"i{self._scalars}", value)

    @contextmanager
    def loop(self, extent: int | tir.PrimExpr, name: str, kind: str = "serial") -> Iterator[tir.PrimExpr]:
        """A loop; vectors kept inside are gone behind it."""
        outer, self._slots = self._slots, []
        with self.ib.for_range(0, extent, name=name, kind=kind) as i:
            yield i
        self._slots = outer

    def keep(self, value: tir.PrimExpr) -> tir.PrimExpr:
        """A vector computed once, here.

        It goes into an array on the stack, of which LLVM makes registers. As a variable it would cost TVM's search for
        common subexpressions a time that grows with the square of the variables.
        """
        if not self._slots:
            self._slots = list(reversed(self.array((STACK_BYTES - 1) // (4 * self.lanes), "kept")))
        slot = self._slots.pop()
        self.set(slot, value)
        return slot

    def array(self, vectors: int, name: str) -> list[tir.BufferLoad]:
        """Room for so many vectors, on the stack if they are less than STACK_BYTES."""
        # Not of a vector type, nor in another scope than "global": TVM would put it elsewhere.
        buffer = self.ib.allocate("float32", vectors * self.lanes, name=name, scope="global")._buffer
        return [self.load(buffer, i * self.lanes) for i in range(vectors)]

    def set(self, slot: tir.BufferLoad, value: tir.PrimExpr) -> None:
        """Assign to an element of an array."""
        self.ib.emit(tir.BufferStore(slot.buffer, value, slot.indices))

    def splat(self, value: float | tir.PrimExpr, dtype: str = "float32") -> tir.PrimExpr:
        """The same number in every lane."""
        scalar = value if isinstance(value, tir.PrimExpr) else tir.const(value, dtype)
        return tir.Broadcast(scalar, self.lanes) if self.lanes > 1 else scalar

    def load(self, buffer: tir.Buffer, *index: tir.PrimExpr) -> tir.PrimExpr:
        """A vector from an index on, along the last axis."""
        return tir.BufferLoad(buffer, self.places(*index))

    def behind(self, buffer: tir.Buffer, *index: tir.PrimExpr) -> Behind:
        """Vectors behind an index, for several that are operands of multiply-adds."""
        *outer, last = index
        if not self._holds:
            return lambda floats: self.load(buffer, *outer, last + floats)
        address = hold_address(self.ib, tir.BufferLoad(buffer, list(index)))
        return lambda floats: load_behind(address, floats, self.lanes)

    def splats_behind(self, buffer: tir.Buffer, index: tir.PrimExpr) -> Behind:
        """Numbers behind an index, each in every lane."""
        if not self._holds:
            return lambda floats: self.splat(buffer[index + floats])
        address = hold_address(self.ib, tir.BufferLoad(buffer, [index]))
        return lambda floats: self.splat(load_behind(address, floats, 1))

    def hold(self, vector: tir.PrimExpr) -> tir.PrimExpr:
        """A vector for a multiply-add that is to broadcast its other operand: in a register, not read by it."""
        return hold_vector(vector, self.lanes) if self._holds and self.features.embed_broadcast else vector

    def store(self, buffer: tir.Buffer, value: tir.PrimExpr, *index: tir.PrimExpr) -> None:
        """A vector to an index, along the last axis."""
        self.ib.emit(tir.BufferStore(buffer, value, self.places(*index)))

    def split_columns(self, buffer: tir.Buffer, count: int, *index: tir.PrimExpr) -> list[tir.PrimExpr]:
        """Vectors of every `count`-th element from an index on, one for each remainder; a power of two."""
        *outer, last = index
        return self.columns([self.load(buffer, *outer, last + i * self.lanes) for i in range(count)])

    def columns(self, pieces: Sequence[tir.PrimExpr]) -> list[tir.PrimExpr]:
        """Of c vectors that follow each other, the c vectors of every c-th element; c is a power of two."""
        if self.lanes == 1 or len(pieces) == 1:
            return list(pieces)
        pairs = [self.keep(piece) for piece in pieces]
        halves = [self._every_second(pairs[i : i + 2]) for i in range(0, len(pairs), 2)]
        even, odd = (self.columns(half) for half in zip(*halves, strict=True))
        return [column for pair in zip(even, odd, strict=True) for column in pair]

    def _every_second(self, pair: Sequence[tir.PrimExpr]) -> list[tir.PrimExpr]:
        """Elements of even places, and of odd ones."""
        return [tir.Shuffle(list(pair), list(range(first, 2 * self.lanes, 2))) for first in (0, 1)]

    def pieces(self, columns: Sequence[tir.PrimExpr]) -> list[tir.PrimExpr]:
        """The opposite of `columns`."""
        if self.lanes == 1 or len(columns) == 1:
            return list(columns)
        halves = self.pieces(columns[::2]), self.pieces(columns[1::2])
        return [piece for pair in zip(*halves, strict=True) for piece in self._in_turn(*map(self.keep, pair))]

    def _in_turn(self, even: tir.PrimExpr, odd: tir.PrimExpr) -> list[tir.PrimExpr]:
        """Two vectors that follow each other, whose elements come from one and the other."""
        places = [place // 2 + place % 2 * self.lanes for place in range(2 * self.lanes)]
        return [tir.Shuffle([even, odd], places[: self.lanes]), tir.Shuffle([even, odd], places[self.lanes :])]

    def join_columns(self, vectors: Sequence[tir.PrimExpr], buffer: tir.Buffer, *index: tir.PrimExpr) -> None:
        """The opposite: store first elements, second elements and so on, from an index on."""
        *outer, last = index
        for i, piece in enumerate(self.pieces(vectors)):
            self.store(buffer, piece, *outer, last + i * self.lanes)

    def shifted(self, first: tir.PrimExpr, second: tir.PrimExpr, count: int) -> tir.PrimExpr:
        """A vector that begins at element `count` of `first` and goes on in `second`."""
        if count == 0 or count == self.lanes:
            return second if count else first
        return tir.Shuffle([first, second], list(range(count, count + self.lanes)))

    def fetch(self, buffer: tir.Buffer, *index: tir.PrimExpr) -> None:
        """Have an element near by when it is read or written. Outside of a buffer this is harmless.

        Also before a line is written as a whole: it is read from memory all the same, and a core waits for few lines at
        a time. Fetched as if to be read; as if to be written takes a tenth longer.
        """
        if not self.features.fetch:
            return
        to_read, every_level, data = (tir.const(number, "int32") for number in (0, 3, 1))
        place = tir.address_of(tir.BufferLoad(buffer, list(index)))
        self.ib.emit(tir.Evaluate(tir.call_intrin("handle", "tir.prefetch", place, to_read, every_level, data)))

    def places(self, *index: tir.PrimExpr) -> list[tir.PrimExpr]:
        """Indices of a vector from an index on, along the last axis."""
        *outer, last = index
        return [*outer, tir.Ramp(last, 1, self.lanes) if self.lanes > 1 else last]

    def product(self, matrix: Matrix, operand: Callable[[int], tir.PrimExpr]) -> list[tir.PrimExpr]:
        """``matrix @ operands``, one for each row.

        Rows and columns of Winograd's matrices come in pairs, for the points a and -a: what a pair shares is computed
        once.
        """
        terms = _Terms(self, matrix, operand)
        result: list[tir.PrimExpr] = []
        while len(result) < len(matrix):
            first, *second = matrix[len(result) : len(result) + 2]
            halves = even_odd(first, second[0]) if second else None
            if halves is None:
                result.append(self.keep(terms.sum(first)))
            else:
                even, odd = (self.keep(terms.sum(half)) for half in halves)
                result += [self.keep(even + odd), self.keep(even - odd)]
        return result


class _Terms:
    """The operands of a product, and the sums and differences of those that come in pairs; each is computed once."""

    def __init__(self, code: VectorCode, matrix: Matrix, operand: Callable[[int], tir.PrimExpr]) -> None:
        self.code = code
        self.operand = operand
        self.pairs = {i for i in range(len(matrix[0]) - 1) if _columns_pair(matrix, i)}
        self.known: dict[tuple[int, str], tir.PrimExpr] = {}

    def sum(self, weights: Sequence[Fraction]) -> tir.PrimExpr:
        terms: list[tuple[Fraction, tir.PrimExpr]] = []
        i = 0
        while i < len(weights):
            # Halves of rows may part a pair.
            if i in self.pairs and abs(weights[i]) == abs(weights[i + 1]):
                terms.append((weights[i], self._term(i, "+" if weights[i] == weights[i + 1] else "-")))
                i += 2
            else:
                if weights[i]:
                    terms.append((weights[i], self._term(i, "")))
                i += 1
        return self._weighted(terms)

    def _term(self, i: int, sign: str) -> tir.PrimExpr:
        if (i, sign) not in self.known:
            if sign:
                first, second = self._term(i, ""), self._term(i + 1, "")
                self.known[i, sign] = self.code.keep(first + second if sign == "+" else first - second)
            else:
                self.known[i, sign] = self.code.keep(self.operand(i))
        return self.known[i, sign]

    def _weighted(self, terms: Sequence[tuple[Fraction, tir.PrimExpr]]) -> tir.PrimExpr:
        # Those of weight 1 first: then every further one is one addition or one fused multiply-add.
        total: tir.PrimExpr | None = None
        for weight, value in sorted(terms, key=lambda term: (term[0] != 1, abs(term[0]) != 1)):
            if total is None:
                total = value if weight == 1 else value * self.code.splat(float(weight))
            elif abs(weight) == 1:
                total = total + value if weight > 0 else total - value
            else:
                total = total + value * self.code.splat(float(weight))
        return self.code.splat(0.0) if total is None else total


def _columns_pair(matrix: Matrix, column: int) -> bool:
    """Whether a column and the next are equal up to the signs of their entries, and nowhere zero."""
    return all(row[column] and abs(row[column]) == abs(row[column + 1]) for row in matrix)


def even_odd(first: Sequence[Fraction], second: Sequence[Fraction]) -> tuple[list[Fraction], list[Fraction]] | None:
    """(even, odd) with first = even + odd and second = even - odd, of different columns; None if there are none."""
    even = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    odd = [(a - b) / 2 for a, b in zip(first, second, strict=True)]
    disjoint = not any(a and b for a, b in zip(even, odd, strict=True))
    return (even, odd) if disjoint and any(even) and any(odd) else None
