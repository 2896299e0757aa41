"""How large the buffers of a kernel are. TVM counts their elements in 32 bits, unchecked.

Left out are the buffers of a single channel or row, which are never the largest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from .direct_plan import DirectPlan
from .geometry import ConvGeometry
from .sparse_dense import DensePlan, image_block
from .winograd_plan import WinogradPlan

_MOST = 2**31 - 1


def why_too_large(buffers: Mapping[str, int]) -> str | None:
    """Which buffer has too many elements, or None."""
    for name, elements in buffers.items():
        if elements > _MOST:
            return f"{name} of {elements} elements exceeds 32-bit offsets"
    return None


def argument_buffers(geometry: ConvGeometry, taps: int) -> dict[str, int]:
    """Elements of input, output and weights; `taps` weights to a filter and channel."""
    pixels = geometry.in_height * geometry.in_width
    out_pixels = geometry.out_height * geometry.out_width
    return {
        "input": geometry.batch * geometry.in_channels * pixels,
        "output": geometry.batch * geometry.out_channels * out_pixels,
        "weights": geometry.out_channels * (geometry.in_channels // geometry.groups) * taps,
    }


def dense_buffers(plan: DensePlan, lanes: int) -> dict[str, int]:
    """Elements of what the sparse fully-connected layer keeps, between and in its arguments; groups filled up."""
    images = plan.batch if plan.batch == 1 else image_block(plan.batch, lanes).images
    return {
        "input": -(-plan.batch // images) * images * plan.inputs,
        "output": plan.batch * plan.outputs,
        "weights": plan.segments * plan.outputs * -(-plan.segment // plan.group) * plan.group,
    }


def direct_buffers(plan: DirectPlan) -> dict[str, int]:
    """Elements of what sparse direct convolution keeps, between and in its weights; bundles filled up."""
    planes = plan.planes_size * (plan.all_blocks if plan.in_parts else 1)
    return {
        "weights in bundles": _in_direct_bundles(plan),
        "packed input": planes,
        "sums": plan.sums_filters * plan.rows * plan.cols,
    }


def winograd_buffers(plan: WinogradPlan) -> dict[str, int]:
    """Elements of what sparse Winograd convolution keeps, between and in its weights; bundles filled up."""
    geometry = plan.geometry
    return {
        "weights in bundles": _in_winograd_bundles(plan),
        "input in tiles": math.prod(plan.layout.shape(geometry.batch, geometry.in_channels)),
        "result in tiles": math.prod(plan.layout.shape(geometry.batch, geometry.out_channels)),
        "transformed input": plan.inputs_size,
        "products": plan.products_size,
    }


def _in_direct_bundles(plan: DirectPlan) -> int:
    """At most; with groups a filter has weights in one block of channels only."""
    geometry = plan.geometry
    rows = plan.segments * -(-plan.segment_filters // plan.together) * plan.together
    blocks = plan.channel_blocks if geometry.groups > 1 else 1
    return rows * blocks * (geometry.in_channels // geometry.groups) * math.prod(geometry.kernel)


def _in_winograd_bundles(plan: WinogradPlan) -> int:
    rows = plan.positions * plan.bundles * plan.blocking.together
    return rows * (plan.geometry.in_channels // plan.geometry.groups)
