"""The three steps of a sparse Winograd convolution, for some vectors of tiles: transform the input, multiply by the
sparse filters, transform back.

For each of the n x n positions xi of a tile the filters are a sparse K x C matrix; the products are
``M[xi, k, t] = sum over e of values[e] * V[xi, indices[e], t]`` with tiles t as vector lanes. Matrices come from
winograd.py (Winograd 1980; Lavin and Gray, arXiv 1509.09308); pruning in that domain is Liu et al., arXiv 1802.06367.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

from tvm import tir

from .convolution_buffers import ConvolutionBuffers
from .vector_code import VectorCode, even_odd
from .winograd import Matrix, transform
from .winograd_plan import WinogradPlan

Load = Callable[[tir.PrimExpr, int, int], tir.PrimExpr]
"""(first tile of a vector, row, column) -> pixels of its tiles; rows and columns are counted from a tile's first."""
Fetch = Callable[[tir.PrimExpr], None]
"""(first tile of a vector)."""
Store = Callable[[tir.PrimExpr, int, int, tir.PrimExpr], None]
"""(first tile of a vector, row, column, pixels of its tiles)."""

_VALUES_AHEAD = 256
"""Non-zeros from the one that is used to the one that is fetched: in a network weights come from beyond L2."""


@dataclass(frozen=True)
class Weights:
    """BundledRows of formats.py and biases, and where those of a layer begin in buffers that several share."""

    buffers: ConvolutionBuffers
    first_value: int = 0
    first_bundle: int = 0
    first_row: int = 0
    first_bias: int = 0


class WinogradSteps:
    """Emits the steps of one layer.

    Args:
        plan: of the layer; where its layout has its tiles does not matter here.
    """

    def __init__(self, code: VectorCode, plan: WinogradPlan, weights: Weights) -> None:
        self.code, self.plan, self.weights = code, plan, weights
        self.matrices = transform(plan.layout.m, plan.geometry.kernel[0])
        self.reach = (plan.geometry.kernel[0] - 1) // 2

    def transform_input(
        self, c: tir.PrimExpr, vectors: int, load: Load, inputs: tir.Buffer, fetch: Fetch | None = None
    ) -> None:
        """``V = BT d B`` for one channel.

        Args:
            fetch: emitted once for every vector; of what is read later, while there is time.
        """
        code, n = self.code, self.matrices.n
        with code.loop(vectors, "t") as t:
            vector = code.let(t * code.lanes)
            target = code.let(c * self.plan.tiles + vector)
            if fetch is not None:
                fetch(vector)

            def pixel(col: int, row: int) -> tir.PrimExpr:
                return load(vector, row - self.reach, col - self.reach)

            # A few rows at a time: all of them would not fit into the registers.
            for rows in row_groups(self.matrices.BT):
                columns = [code.product(self.matrices.BT, partial(pixel, j), rows) for j in range(n)]
                for u in rows:
                    row = code.product(self.matrices.BT, partial(_entry, columns, u))
                    for v in range(n):
                        code.store(inputs, row[v], (u * n + v) * self.plan.input_stride + target)

    def multiply(self, xi: tir.PrimExpr, vectors: int, inputs: tir.Buffer, products: tir.Buffer) -> None:
        """``M = U V`` at one position: sums in registers, non-zeros outside, vectors inside."""
        code, plan, together = self.code, self.plan, self.plan.blocking.together
        weights, buffers = self.weights, self.weights.buffers
        assert buffers.filters is not None
        base, target = code.let(xi * plan.input_stride), code.let(xi * plan.product_stride)
        for t in range(vectors):
            code.store(inputs, code.splat(0.0), base + plan.geometry.in_channels * plan.tiles + t * code.lanes)
        with code.loop(plan.bundles, "bundle") as i:
            bundle = code.let(xi * plan.bundles + i)
            first = code.let(buffers.indptr[weights.first_bundle + bundle])
            count = code.let(buffers.indptr[weights.first_bundle + bundle + 1] - first)
            sums = [code.array(vectors, "sums") for _ in range(together)]
            for one in chain(*sums):
                code.set(one, code.splat(0.0))
            with code.loop(count, "e") as e:
                entry = code.let(weights.first_value + (first + e) * together)
                code.fetch(buffers.values, entry + _VALUES_AHEAD)
                for r in range(together):
                    operand = code.let(base + tir.Cast("int32", buffers.indices[entry + r]) * plan.index_unit)
                    weight = code.keep(code.splat(buffers.values[entry + r]))
                    for t, one in enumerate(sums[r]):
                        code.set(one, one + weight * code.load(inputs, operand + t * code.lanes))
            for r in range(together):
                filter_ = buffers.filters[weights.first_row + bundle * together + r]
                row = code.let(target + filter_ * plan.tiles)
                for t, one in enumerate(sums[r]):
                    code.store(products, one, row + t * code.lanes)

    def transform_output(self, k: tir.PrimExpr, vectors: int, products: tir.Buffer, store: Store) -> None:
        """``Y = AT M A`` and the bias, for one filter."""
        code, n, m = self.code, self.matrices.n, self.plan.layout.m
        bias = code.keep(code.splat(self.weights.buffers.bias[self.weights.first_bias + k]))
        with code.loop(vectors, "t") as t:
            vector = code.let(t * code.lanes)
            source = code.let(k * self.plan.tiles + vector)

            def at_position(v: int, u: int) -> tir.PrimExpr:
                return code.load(products, (u * n + v) * self.plan.product_stride + source)

            columns = [code.product(self.matrices.AT, partial(at_position, v)) for v in range(n)]
            for i in range(m):
                row = code.product(self.matrices.AT, partial(_entry, columns, i))
                for j in range(m):
                    store(vector, i, j, row[j] + bias)


def _entry(columns: Sequence[Mapping[int, tir.PrimExpr]], row: int, column: int) -> tir.PrimExpr:
    return columns[column][row]


def row_groups(matrix: Matrix) -> list[tuple[int, ...]]:
    """Rows that share sums together, the others alone."""
    groups: list[tuple[int, ...]] = []
    row = 0
    while row < len(matrix):
        paired = row + 1 < len(matrix) and even_odd(matrix[row], matrix[row + 1]) is not None
        groups.append((row, row + 1) if paired else (row,))
        row += len(groups[-1])
    return groups
