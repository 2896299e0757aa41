"""Pack the input of a convolution into the phase planes of layouts.py, zero padding included."""

from __future__ import annotations

from tvm import te, tir

from .geometry import ConvGeometry
from .layouts import PhaseLayout

TAG = "jointsparse."
"""How the tags of all our stages begin."""
PADDED = "jointsparse.padded"
PLANES = "jointsparse.planes"


def pack(
    data: te.Tensor, geometry: ConvGeometry, layout: PhaseLayout, *, extra_channels: int = 0, extra_rows: int = 0
) -> te.Tensor:
    """Phase planes of every block.

    ``planes[n, by, bx, c, a * phases[1] + b, y, x]`` is pixel ``(row, col) = ((by * rows + y) * step[0] + a,
    (bx * cols + x) * step[1] + b)`` of the padded image, zero outside of it.

    Args:
        data: (N, C, H, W).
        extra_channels: channels of zeros after the last one, for kernels that read whole vectors past the end.
        extra_rows: rows of zeros or of further pixels at the end of every plane, for the same reason.

    Returns:
        (N, blocks down, blocks across, C + extra_channels, planes, rows, columns).
    """
    batch, channels = geometry.batch, geometry.in_channels
    plane_rows, plane_cols = layout.plane[0] + extra_rows, layout.plane[1]
    (down, across), (step_y, step_x), (phases_y, phases_x) = layout.blocks, layout.step, layout.phases
    strip_rows = (plane_rows - 1) * step_y + phases_y
    strip_cols = (plane_cols - 1) * step_x + phases_x

    def pixel(n: tir.Var, by: tir.Var, bx: tir.Var, c: tir.Var, y: tir.Var, x: tir.Var) -> tir.PrimExpr:
        row = by * (layout.rows * step_y) + y - geometry.padding[0]
        col = bx * (layout.cols * step_x) + x - geometry.padding[1]
        inside = [row >= 0, row < geometry.in_height, col >= 0, col < geometry.in_width]
        if extra_channels:
            inside.append(c < channels)
        return tir.if_then_else(tir.all(*inside), data[n, c, row, col], tir.const(0, data.dtype))

    # Copying whole rows first keeps the conditions of padding out of the loop that sorts pixels into planes.
    padded = te.compute(
        (batch, down, across, channels + extra_channels, strip_rows, strip_cols), pixel, name="padded", tag=PADDED
    )
    return te.compute(
        (batch, down, across, channels + extra_channels, phases_y * phases_x, plane_rows, plane_cols),
        lambda n, by, bx, c, p, y, x: padded[
            n, by, bx, c, y * step_y + p // phases_x, x * step_x + tir.floormod(p, phases_x)
        ],
        name="planes",
        tag=PLANES,
    )


def unbounded(index: tir.PrimExpr) -> tir.PrimExpr:
    """The same index, its range hidden from TVM's bound inference.

    A kernel must compute whole vectors although the last lanes are read by nobody; with the range in sight TVM would
    cut them off and put a condition into every vector loop. The operation is gone in the machine code.
    """
    return tir.bitwise_or(index, tir.const(0, "int32"))
