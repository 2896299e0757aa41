"""Max pooling of what a sparse direct convolution has computed: a large image is neither written nor read again.

Windows reach into the block of outputs above. Blocks of an image are therefore computed one after the other, in
as many chunks as there are parts elsewhere; of every filter the last rows of a block are kept for the next. What
activates comes behind the pooling, where there is less of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce

from tvm import tir

from .blocking import PARALLEL_BLOCKS
from .direct_plan import DirectPlan
from .epilogues import Activation
from .max_pool import LOWEST, PoolGeometry, rows_inside
from .row_code import each_run
from .row_windows import RowWindows
from .vector_code import VectorCode

_BLOCKS_OF_CHUNK = 8
"""At least: one more is computed for each chunk, to have the rows above its first."""


@dataclass(frozen=True)
class PooledPlan:
    """A direct convolution and the pooling of its result."""

    plan: DirectPlan
    pool: PoolGeometry

    @property
    def kept(self) -> int:
        """Rows of the block above that windows read."""
        return self.pool.pool[0] - self.pool.strides[0]

    @property
    def results(self) -> int:
        """Rows of the pooled image that a block makes."""
        return self.plan.rows // self.pool.strides[0]

    @property
    def blocks(self) -> int:
        """Of an image."""
        return -(-self.pool.out[0] // self.results)

    @property
    def chunks(self) -> int:
        """Of an image: blocks computed one after the other."""
        return min(PARALLEL_BLOCKS, self.blocks)

    @property
    def ahead(self) -> int:
        """Blocks computed before those of a chunk."""
        return int(self.kept > 0)

    @property
    def top(self) -> int:
        """Of the first block, in the image that is pooled: a window ends where a block ends."""
        return self.kept - self.pool.padding[0]


def why_not_pooled(plan: DirectPlan, pool: PoolGeometry, activation: Activation) -> str | None:
    """Why a convolution by this plan cannot pool its result, or None if it can; where it would not gain, it cannot."""
    pooled, (height, width) = PooledPlan(plan, pool), plan.geometry.out_shape[2:]
    if activation.activation == "leaky_relu" and activation.low < 0:
        return "an activation that falls cannot follow the maximum"
    if pool.has_empty_windows((height, width)):
        return "of a window without a pixel it would activate what stands for none"
    if height == 1:
        return "its image is one row, or is counted through as one"
    if plan.blocks[1] > 1 or plan.rows % pool.strides[0]:
        return "its blocks are not whole windows"
    if plan.cols % plan.lanes:
        return "its rows are not whole vectors"
    if plan.together > 1:
        return "a filter that is in a bundle twice would keep its rows twice"
    if not 0 <= pooled.kept <= plan.rows:
        return "windows reach beyond the block above"
    if not plan.blocks_in_parallel or pooled.blocks < _BLOCKS_OF_CHUNK * PARALLEL_BLOCKS:
        return "it has few blocks"
    return None


@dataclass(frozen=True)
class PooledResults:
    """Emits the pooling of a block.

    Attributes:
        code: of the CPU's vectors. result: the pooled image.
    """

    code: VectorCode
    pooled: PooledPlan
    activation: Activation
    result: tir.Buffer

    def finish(
        self, image: tir.PrimExpr, number: tir.PrimExpr, k: tir.PrimExpr, sums: tir.Buffer, first: tir.PrimExpr
    ) -> None:
        """Of a filter.

        Args:
            number: of the block; -1 is above the image, or above a chunk: only its last rows count.
            first: of the sums; those kept of the block above are before it.
        """
        code, pooled = self.code, self.pooled
        height = pooled.plan.geometry.out_height
        inside = [rows_inside(pooled.pool, y, height) for y in range(pooled.pool.out[0])]
        with code.loop(pooled.results, "row") as row:
            y = code.let(number * pooled.results + row)
            start = code.let(first + (row * pooled.pool.strides[0] - pooled.kept) * pooled.plan.cols)
            with code.ib.if_scope(tir.all(y >= 0, y < pooled.pool.out[0])):
                each_run(code.ib, y, inside, partial(self._row, (image, k, y), sums, start))
        self._keep_last_rows(sums, first)

    def _row(
        self,
        place: tuple[tir.PrimExpr, tir.PrimExpr, tir.PrimExpr],
        sums: tir.Buffer,
        start: tir.PrimExpr,
        taps: tuple[int, ...],
    ) -> None:
        """One of the pooled image, from these rows of its windows."""
        plan, pool = self.pooled.plan, self.pooled.pool

        def largest_row(code: VectorCode, x: tir.PrimExpr) -> tir.PrimExpr:
            return reduce(tir.Max, [code.load(sums, start + tap * plan.cols + x) for tap in taps])

        def largest_column(code: VectorCode, x: tir.PrimExpr, columns: Sequence[tir.PrimExpr]) -> None:
            value = self.activation.emit(code, reduce(tir.Max, columns))
            code.store(self.result, value, *place, x)

        across = (-pool.padding[1], pool.strides[1], pool.pool[1], pool.out[1])
        windows = RowWindows(plan.geometry.out_width, *across, fill=LOWEST, lanes=plan.lanes)
        windows.emit(self.code.ib, largest_row if taps else None, largest_column)

    def _keep_last_rows(self, sums: tir.Buffer, first: tir.PrimExpr) -> None:
        code, plan, kept = self.code, self.pooled.plan, self.pooled.kept
        with code.loop(kept * plan.cols // code.lanes, "v") as v:
            last = code.load(sums, first + (plan.rows - kept) * plan.cols + v * code.lanes)
            code.store(sums, last, first - kept * plan.cols + v * code.lanes)
