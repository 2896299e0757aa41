"""Sparse Winograd convolution F(m x m, r x r): transform tiles, multiply by the sparse filters, transform back.

For each of the n x n positions (u, v) of a tile the filters are a sparse K x C matrix; the products are
``M[u, v, k, t] = sum over e of values[e] * V[u, v, indices[e], t]`` with tiles t as vector lanes. Matrices and tile
grid come from winograd.py (Winograd 1980; Lavin and Gray, arXiv 1509.09308); pruning in that domain is Liu et al.,
arXiv 1802.06367.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

from tvm import te, tir

from . import phases
from .blocking import WinogradBlocking
from .geometry import ConvGeometry
from .winograd import Matrix, transform

INPUT_COLUMNS = "jointsparse.winograd.input_columns"
INPUT = "jointsparse.winograd.input"
PRODUCTS = "jointsparse.winograd.products"
OUTPUT_ROWS = "jointsparse.winograd.output_rows"
OUTPUT_TILES = "jointsparse.winograd.output_tiles"
OUTPUT = "jointsparse.winograd.output"


def sparse_winograd(
    data: te.Tensor,
    values: te.Tensor,
    indices: te.Tensor,
    indptr: te.Tensor,
    geometry: ConvGeometry,
    m: int,
    blocking: WinogradBlocking,
) -> te.Tensor:
    """Convolve.

    Args:
        data: (N, C, H, W) float32. values, indices, indptr: SparseRows of formats.pack_winograd.
        m: output tile size.
        blocking: tiles computed at a time.

    Returns:
        (N, K, output height, output width).
    """
    layout, panel = blocking.layout, blocking.panel
    matrices = transform(m, geometry.kernel[0])
    n_tile = matrices.n
    blocks = (geometry.batch, *layout.blocks)
    channels, filters = geometry.in_channels, geometry.out_channels

    tile = _tiles(data, geometry, m, n_tile, blocking)
    columns = te.compute(
        (*blocks, channels, n_tile, n_tile, blocking.tiles),
        lambda n, by, bx, c, u, j, t: linear_map(matrices.BT, u, lambda i: tile(n, by, bx, c, i, j, t)),
        name="input_columns",
        tag=INPUT_COLUMNS,
    )
    inputs = te.compute(
        (*blocks, n_tile, n_tile, channels, blocking.panels, panel),
        lambda n, by, bx, u, v, c, po, pi: linear_map(
            matrices.BT, v, lambda j: columns[n, by, bx, c, u, j, po * panel + pi]
        ),
        name="inputs",
        tag=INPUT,
    )

    def product(
        n: tir.Var, by: tir.Var, bx: tir.Var, u: tir.Var, v: tir.Var, k: tir.Var, po: tir.Var, pi: tir.Var
    ) -> tir.PrimExpr:
        row = (u * n_tile + v) * filters + k
        # LLVM code generation wants loops that start at 0.
        e = te.reduce_axis((0, indptr[row + 1] - indptr[row]), name="e")
        entry = indptr[row] + e
        return te.sum(values[entry] * inputs[n, by, bx, u, v, indices[entry], po, pi], axis=e)

    products = te.compute(
        (*blocks, n_tile, n_tile, filters, blocking.panels, panel), product, name="products", tag=PRODUCTS
    )
    rows = te.compute(
        (*blocks, filters, m, n_tile, blocking.tiles),
        lambda n, by, bx, k, i, v, t: linear_map(
            matrices.AT, i, lambda u: products[n, by, bx, u, v, k, t // panel, tir.floormod(t, panel)]
        ),
        name="output_rows",
        tag=OUTPUT_ROWS,
    )
    # Column j of a tile innermost: then the pixels of an output row lie side by side.
    tiles = te.compute(
        (*blocks, filters, m, blocking.panels, panel, m),
        lambda n, by, bx, k, i, po, pi, j: linear_map(
            matrices.AT, j, lambda v: rows[n, by, bx, k, i, v, po * panel + pi]
        ),
        name="output_tiles",
        tag=OUTPUT_TILES,
    )

    def pixel(n: tir.Var, k: tir.Var, h: tir.Var, w: tir.Var) -> tir.PrimExpr:
        row, col = tir.floormod(h // m, layout.rows), tir.floormod(w, layout.cols * m)
        place = phases.unbounded(row * (blocking.width * m) + col)
        t = place // m
        by, bx = h // (layout.rows * m), w // (layout.cols * m)
        i, j, po, pi = tir.floormod(h, m), tir.floormod(place, m), t // panel, tir.floormod(t, panel)
        return tiles[n, by, bx, k, i, po, pi, j]

    return te.compute(geometry.out_shape, pixel, name="output", tag=OUTPUT)


def _tiles(
    data: te.Tensor, geometry: ConvGeometry, m: int, n_tile: int, blocking: WinogradBlocking
) -> Callable[..., tir.PrimExpr]:
    """Access to pixel (i, j) of the padded input under tile t of a block."""
    layout, width = blocking.layout, blocking.width
    (_, plane_cols), last = layout.plane, blocking.tiles - 1
    flat = width == plane_cols
    halo = (n_tile - 1) // m
    # The last vector reaches beyond the last tile.
    last_row = (last + halo * plane_cols + halo) // plane_cols if flat else last // width + halo
    planes = phases.pack(data, geometry, layout, extra_rows=max(0, last_row + 1 - layout.plane[0]))

    def tile(n: tir.Var, by: tir.Var, bx: tir.Var, c: tir.Var, i: int, j: tir.Var, t: tir.Var) -> tir.PrimExpr:
        plane = i % m * layout.phases[1] + tir.floormod(j, m)
        if flat:
            # TVM folds the division back into the flat offset.
            place = t + (i // m * plane_cols + j // m)
            return planes[n, by, bx, c, plane, place // plane_cols, tir.floormod(place, plane_cols)]
        return planes[n, by, bx, c, plane, t // width + i // m, tir.floormod(t, width) + j // m]

    return tile


def linear_map(matrix: Matrix, row: tir.PrimExpr, operand: Callable[[int], tir.PrimExpr]) -> tir.PrimExpr:
    """``sum over i of matrix[row][i] * operand(i)``, as a choice by `row` that vanishes once `row` is unrolled.

    Rows and columns of Winograd matrices come in pairs, for the points a and -a. What such a pair shares is written
    as the same expression, for LLVM to compute once.
    """
    choices = [_combination(matrix, r, operand) for r in range(len(matrix))]
    result = choices[-1]
    for r in reversed(range(len(matrix) - 1)):
        result = tir.if_then_else(tir.EQ(row, tir.const(r, "int32")), choices[r], result)
    return result


def _combination(matrix: Matrix, r: int, operand: Callable[[int], tir.PrimExpr]) -> tir.PrimExpr:
    pair = _row_pair(matrix, r)
    if pair is not None:
        even, odd, sign = pair
        left, right = _weighted_sum(_terms(even, operand)), _weighted_sum(_terms(odd, operand))
        return left + right if sign > 0 else left - right
    terms, column = [], 0
    while column < len(matrix[r]):
        a = matrix[r][column]
        if _columns_pair(matrix, column):
            first, second = operand(column), operand(column + 1)
            terms.append((a, first + second if a == matrix[r][column + 1] else first - second))
            column += 2
        else:
            terms.append((a, operand(column)))
            column += 1
    return _weighted_sum(terms)


def _row_pair(matrix: Matrix, r: int) -> tuple[Sequence[Fraction], Sequence[Fraction], int] | None:
    """Row r as ``even + sign * odd`` where a neighbouring row is ``even - sign * odd``, else None."""
    for first in (r - 1, r):
        if first >= 0 and first + 1 < len(matrix):
            half_sum = [(a + b) / 2 for a, b in zip(matrix[first], matrix[first + 1], strict=True)]
            half_difference = [(a - b) / 2 for a, b in zip(matrix[first], matrix[first + 1], strict=True)]
            disjoint = all(not (a and b) for a, b in zip(half_sum, half_difference, strict=True))
            if disjoint and any(half_sum) and any(half_difference):
                return half_sum, half_difference, 1 if r == first else -1
    return None


def _columns_pair(matrix: Matrix, column: int) -> bool:
    """Whether a column and the next are equal up to the signs of their entries, and nowhere zero."""
    if column + 1 >= len(matrix[0]):
        return False
    return all(row[column] and abs(row[column]) == abs(row[column + 1]) for row in matrix)


def _terms(weights: Sequence[Fraction], operand: Callable[[int], tir.PrimExpr]) -> list[tuple[Fraction, tir.PrimExpr]]:
    return [(weight, operand(i)) for i, weight in enumerate(weights) if weight]


def _weighted_sum(terms: Sequence[tuple[Fraction, tir.PrimExpr]]) -> tir.PrimExpr:
    total: tir.PrimExpr | None = None
    for weight, value in sorted((t for t in terms if t[0]), key=lambda t: t[0] < 0):  # start with a positive one
        term = value if abs(weight) == 1 else value * tir.const(float(abs(weight)), "float32")
        if total is None:
            total = term if weight > 0 else tir.const(0, "float32") - term
        else:
            total = total + term if weight > 0 else total - term
    return tir.const(0, "float32") if total is None else total
