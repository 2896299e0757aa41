"""The loop that sparse convolutions spend their time in: rows of weights times vectors, sums in registers.

Rows lie in bundles (formats.BundledRows), non-zeros outside, vectors inside: rows side by side have loops end less
often, where a core foresees wrongly how often they run, and with few vectors one sum would wait for the addition
before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tir

from .convolution_buffers import ConvolutionBuffers
from .vector_code import VectorCode

_MULTIPLY_ADDS = 32
"""Of a pass at most: with twice as many, LLVM 22 has sums on the stack."""


@dataclass(frozen=True)
class Operands:
    """What weights are multiplied with.

    Attributes:
        buffer, outer: where, but for the index along the last axis.
        first: what the index of a non-zero is added to.
        unit: floats that it counts.
        vectors: how far behind its first each vector of a non-zero lies.
    """

    buffer: tir.Buffer
    first: tir.PrimExpr
    vectors: Sequence[int]
    unit: int = 1
    outer: tuple[tir.PrimExpr, ...] = ()


@dataclass(frozen=True)
class Products:
    """Emits the loop.

    Attributes:
        together: rows of a bundle.
        unrolled: non-zeros of each row that a pass takes at most.
        ahead: weights from the one that is used to the one that is fetched, once in a pass; none with 0.
    """

    code: VectorCode
    weights: ConvolutionBuffers
    together: int
    unrolled: int = 1
    ahead: int = 0

    def add(self, sums: Sequence[Sequence[tir.BufferLoad]], bundle: tir.PrimExpr, operands: Operands) -> None:
        """Those of a bundle, to the sums: by row, by vector."""
        code, together = self.code, self.together
        begin = code.let(self.weights.indptr[bundle])
        count = code.let(self.weights.indptr[bundle + 1] - begin)
        # In 64 bits, so that what is added to it becomes part of an address.
        first = code.let(tir.Cast("int64", begin * together))
        step = max(1, min(self.unrolled, _MULTIPLY_ADDS // sum(map(len, sums))))
        passes = code.let(count // step)
        with code.loop(passes, "pass") as number:
            self._add(sums, code.let(first + tir.Cast("int64", number) * (step * together)), step, operands)
        if step > 1:
            rest = code.let(passes * step)
            with code.loop(count - rest, "e") as e:
                self._add(sums, code.let(first + tir.Cast("int64", rest + e) * together), 1, operands)

    def _add(
        self, sums: Sequence[Sequence[tir.BufferLoad]], entry: tir.PrimExpr, count: int, operands: Operands
    ) -> None:
        """Of so many non-zeros of each row, from an entry on."""
        code, values, together = self.code, self.weights.values, self.together
        # Several in a pass share an address; with one pass for each the loop's counter is as good.
        held = self.unrolled > 1
        weights = code.splats_behind(values, entry) if held else lambda floats: code.splat(values[entry + floats])
        if self.ahead:
            code.fetch(values, entry + self.ahead)
        for number in range(count):
            for r, distance in enumerate(self._distances(entry + number * together, operands.unit)):
                self._multiply_add(sums[r], weights(number * together + r), operands, distance)

    def _distances(self, entry: tir.PrimExpr, unit: int) -> list[tir.PrimExpr]:
        """How far the operands of an entry's non-zeros are from the first, one for each row.

        Loads are what the loop is bound by, so two or four indices of 16 bits come in one. It also keeps LLVM from
        computing with them in a vector: they would be taken out of it by the ports that multiply. Source code, which
        has one lane, knows no such loads.
        """
        indices, together = self.weights.indices, self.together
        one_load = f"uint{16 * together}"
        if indices.dtype == "uint16" and one_load in ("uint32", "uint64") and self.code.lanes > 1:
            bits = self.code.let(
                tir.reinterpret(one_load, indices.vload([tir.Ramp(entry, tir.const(1, "int64"), together)]))
            )
            each = [(bits >> tir.const(16 * r, one_load)) & tir.const(0xFFFF, one_load) for r in range(together)]
        else:
            each = [indices[entry + r] for r in range(together)]
        return [tir.Cast("int64", index) * unit for index in each]

    def _multiply_add(
        self, sums: Sequence[tir.BufferLoad], weight: tir.PrimExpr, operands: Operands, distance: tir.PrimExpr
    ) -> None:
        """To each sum of a row. A weight that meets several vectors is broadcast once."""
        code, buffer, outer = self.code, operands.buffer, operands.outer
        first = code.let(operands.first + distance)
        if len(sums) == 1:
            vector = code.hold(code.load(buffer, *outer, first + operands.vectors[0]))
            code.set(sums[0], sums[0] + weight * vector)
            return
        weight, load = code.keep(weight), code.behind(buffer, *outer, first)
        for one, floats in zip(sums, operands.vectors, strict=True):
            code.set(one, one + weight * load(floats))
