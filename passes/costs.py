"""What each kernel would cost for a layer: an interface, and a linear model calibrated by measurement.

The model counts what a kernel does (vector multiply-adds, packed pixels, transformed tiles, ...) from the very blocking
that the schedules use, and multiplies each count by nanoseconds. ``benchmarks/calibrate_costs.py`` measures the kernels
on a machine, fits the nanoseconds and prints the table below.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol, runtime_checkable

import tvm

from ..schedules.direct_plan import direct_plan
from ..schedules.geometry import ConvGeometry
from ..schedules.sparse_dense import image_block, segment_length
from ..schedules.targets import CpuFacts, cpu_facts
from ..schedules.winograd_plan import winograd_plan
from .plan import DENSE, DIRECT, TILE


class CostModel(Protocol):
    """Whatever predicts, or remembers, how long a kernel takes."""

    def cost(self, kernel: str, geometry: ConvGeometry, nonzeros: int, target: tvm.target.Target) -> float:
        """Seconds of one run on one thread; must not fall as ``nonzeros`` grows.

        Args:
            kernel: ``dense``, ``direct``, ``winograd_f2`` or ``winograd_f4``.
            geometry: a layer that the kernel supports.
            nonzeros: weights that the kernel multiplies by; for ``dense`` all of them.
            target: what the layer is built for.
        """
        ...


@runtime_checkable
class Borrowing(Protocol):
    """A cost model that can tell when it predicts a kernel by what was measured on other CPUs."""

    def borrowed_from(self, kernel: str, geometry: ConvGeometry, target: tvm.target.Target) -> str | None:
        """The family of CPUs measured instead, for example ``avx512``; None if such CPUs as the target's were."""
        ...


def break_even_sparsity(
    model: CostModel, kernel: str, geometry: ConvGeometry, weights: int, dense_cost: float, target: tvm.target.Target
) -> float | None:
    """The least sparsity at which ``kernel`` costs no more than ``dense_cost`` seconds; None if it always costs more.

    Args:
        weights: of the kernel's own domain, zeros included.
    """
    affordable = bisect_right(
        range(weights + 1), dense_cost, key=lambda nonzeros: model.cost(kernel, geometry, nonzeros, target)
    )
    return None if affordable == 0 else 1 - (affordable - 1) / weights


Coefficients = Mapping[str, Mapping[str, float]]
"""By kind of kernel, nanoseconds by what is counted (see ``counts``)."""

# Printed by benchmarks/calibrate_costs.py; see there for the layers measured.
FAMILIES: Mapping[str, Coefficients] = {
    # Chosen by it against the best: 1.007 times its time on average, 1.41 at worst, within 5 % in 95.1% of 591 cases.
    "avx512": {
        "dense": {"vectors": 0.159, "inputs": 1.3, "outputs": 1.84, "weights": 0.11},  # mean error 13%
        "direct": {
            "vectors": 0.213,
            "touched": 0.0796,
            "entries": 0.249,
            "rows": 0.167,
            "packed": 0.136,
            "outputs": 0.0905,
            "fixed": 191.0,
        },  # mean error 10%
        "winograd_f2": {
            "vectors": 0.212,
            "entries": 0.164,
            "far_entries": 0.0956,
            "rows": 0.743,
            "inputs": 2.18,
            "outputs": 1.39,
            "fixed": 502.0,
        },  # mean error 11%
        "winograd_f4": {
            "vectors": 0.252,
            "entries": 0.072,
            "far_entries": 0.168,
            "rows": 2.65,
            "inputs": 3.15,
            "outputs": 1.12,
        },  # mean error 14%
        "dense_1x1": {"vectors": 0.196, "inputs": 0.288, "outputs": 0.594, "weights": 0.0324},  # mean error 3%
        "direct_1x1": {
            "vectors": 0.257,
            "entries": 0.0493,
            "rows": 4.48,
            "packed": 0.0993,
            "outputs": 0.0132,
            "fixed": 1920.0,
        },  # mean error 7%
        "dense_fc": {"vectors": 0.149, "ragged": 0.19, "far_weights": 0.142},  # mean error 43%
        "direct_fc": {
            "vectors": 0.224,
            "entries": 0.158,
            "far_entries": 0.095,
            "rows": 2.38,
            "packed": 0.934,
            "fixed": 1650.0,
        },  # mean error 17%
        "dense_grouped": {"vectors": 0.156, "outputs": 1.21, "weights": 0.672},  # mean error 10%
        "depthwise": {"vectors": 0.967, "inputs": 0.647},  # mean error 35%
    },
    # Chosen by it against the best: 1.007 times its time on average, 1.49 at worst, within 5 % in 94.8% of 464 cases.
    "avx2": {
        "dense": {"vectors": 0.179, "inputs": 1.37, "outputs": 1.13},  # mean error 23%
        "direct": {"vectors": 0.166, "touched": 0.054, "packed": 0.109, "outputs": 0.109},  # mean error 12%
        "winograd_f2": {
            "vectors": 0.162,
            "entries": 0.0422,
            "far_entries": 0.129,
            "rows": 1.43,
            "inputs": 1.32,
            "outputs": 0.47,
            "fixed": 941.0,
        },  # mean error 10%
        "winograd_f4": {
            "vectors": 0.17,
            "far_entries": 0.167,
            "rows": 1.92,
            "inputs": 2.09,
            "outputs": 0.833,
        },  # mean error 10%
        "dense_1x1": {"vectors": 0.222, "inputs": 0.239, "outputs": 0.606},  # mean error 11%
        "direct_1x1": {
            "vectors": 0.159,
            "entries": 0.149,
            "rows": 4.51,
            "packed": 0.0406,
            "outputs": 0.0137,
            "fixed": 1850.0,
        },  # mean error 9%
        "dense_fc": {"vectors": 0.277, "ragged": 0.127, "far_weights": 0.125, "fixed": 966.0},  # mean error 36%
        "direct_fc": {
            "vectors": 0.161,
            "entries": 0.267,
            "far_entries": 0.0523,
            "rows": 1.62,
            "packed": 0.424,
            "fixed": 1540.0,
        },  # mean error 10%
        "dense_grouped": {"vectors": 0.194, "outputs": 1.3},  # mean error 20%
        "depthwise": {"vectors": 0.148, "inputs": 0.803, "outputs": 0.12},  # mean error 20%
    },
}


@dataclass(frozen=True)
class LinearCostModel:
    """Sum over what a kernel does of count times nanoseconds.

    Attributes:
        families: coefficients by family of CPUs; what a family lacks is taken from the nearest that has it.
    """

    families: Mapping[str, Coefficients] = field(default_factory=lambda: FAMILIES)

    def cost(self, kernel: str, geometry: ConvGeometry, nonzeros: int, target: tvm.target.Target) -> float:
        cpu = cpu_facts(target)
        name = kind(kernel, geometry)
        coefficients = self.families[measured_family(name, cpu, self.families)][name]
        amounts = counts(kernel, geometry, nonzeros, cpu)
        return 1e-9 * sum(nanoseconds * amounts[term] for term, nanoseconds in coefficients.items())

    def borrowed_from(self, kernel: str, geometry: ConvGeometry, target: tvm.target.Target) -> str | None:
        cpu = cpu_facts(target)
        measured = measured_family(kind(kernel, geometry), cpu, self.families)
        return None if measured == family(cpu) else measured


# By what a CPU has, (lanes, registers): its family and those that stand in for it, the nearest first.
_NEAREST = {
    (16, 32): ("avx512", "avx2"),
    (8, 16): ("avx2", "avx512"),
    (4, 32): ("neon", "sse", "avx2", "avx512"),
    (4, 16): ("sse", "avx2", "avx512"),
}
_NEAREST_TO_OTHERS = ("scalar", "sse", "avx2", "avx512")


def family(cpu: CpuFacts) -> str:
    """Name under which coefficients measured on such a CPU belong into FAMILIES."""
    return _nearest(cpu)[0]


def measured_family(name: str, cpu: CpuFacts, families: Mapping[str, Coefficients]) -> str:
    """The nearest family in which a kind of kernel has been measured.

    Counts are of vectors, so that a stand-in still knows the vector length.
    """
    return next(near for near in _nearest(cpu) if name in families.get(near, {}))


def _nearest(cpu: CpuFacts) -> tuple[str, ...]:
    return _NEAREST.get((cpu.lanes, cpu.registers), _NEAREST_TO_OTHERS)


def kind(kernel: str, geometry: ConvGeometry) -> str:
    """Key of the coefficients for a layer.

    TVM has several dense convolutions, of very different speed; taps of a 1x1 filter never meet in L1; fully-connected
    layers (fc) have kernels of their own.
    """
    if geometry.fully_connected:
        return "dense_fc" if kernel == DENSE else "direct_fc"
    if kernel == DIRECT and geometry.kernel == (1, 1):
        return "direct_1x1"
    if kernel != DENSE:
        return kernel
    if geometry.groups > 1:
        return "depthwise" if geometry.groups == geometry.in_channels else "dense_grouped"
    return "dense_1x1" if geometry.kernel == (1, 1) else "dense"


def counts(kernel: str, geometry: ConvGeometry, nonzeros: int, cpu: CpuFacts) -> dict[str, float]:
    """How often a kernel does what, waste at the edges of the image included.

    Returns:
        ``vectors`` (vector multiply-adds; of sparse kernels by non-zeros), ``touched`` (direct, vectors
        brought into L1 that other taps of the filter then find there), ``entries`` (non-zeros read),
        ``far_entries`` (those of them that L2 cannot hold), ``rows`` (filter rows begun), ``packed`` (pixels packed),
        ``inputs`` and ``outputs`` (elements; for Winograd vectors of tile elements transformed), ``weights`` (dense,
        elements read), ``far_weights`` (those of them that L2 cannot hold), ``ragged`` (multiply-adds, if TVM's
        nn.dense takes output units by other than whole vectors), ``fixed`` (1).
    """
    if kernel == DENSE:
        return _dense_counts(geometry, cpu)
    if geometry.fully_connected:
        return _fully_connected_counts(geometry, nonzeros, cpu)
    work = _direct_work(geometry, cpu) if kernel == DIRECT else _winograd_work(geometry, TILE[kernel], cpu)
    return {
        "vectors": nonzeros * work.panels * work.panel_vectors,
        "touched": _planes_touched(geometry, nonzeros) * work.panels * work.panel_vectors if kernel == DIRECT else 0,
        "entries": nonzeros * work.panels,
        "far_entries": max(0, nonzeros - cpu.l2 // _ENTRY_BYTES) * work.panels,
        "rows": work.rows * work.panels,
        "packed": work.packed,
        "inputs": work.inputs,
        "outputs": work.outputs,
        "fixed": 1,
    }


def _planes_touched(geometry: ConvGeometry, nonzeros: int) -> float:
    """Pairs of a filter and a channel with at least one non-zero, were they spread at random."""
    out_channels, channels, height, width = geometry.weight_shape
    pairs, taps = out_channels * channels, height * width
    return pairs * (1 - (1 - nonzeros / (pairs * taps)) ** taps)


# A value and an index.
_ENTRY_BYTES = 8
_NARROW_ENTRY_BYTES = 6


@dataclass(frozen=True)
class _Work:
    """Of one run, non-zeros apart. panels: how often each non-zero is read. panel_vectors: what it then multiplies."""

    panels: int
    panel_vectors: float
    rows: int
    packed: int
    inputs: int
    outputs: int


def _dense_counts(geometry: ConvGeometry, cpu: CpuFacts) -> dict[str, float]:
    out_channels, channels, height, width = geometry.weight_shape
    pixels = geometry.batch * geometry.out_height * geometry.out_width
    return {
        "vectors": geometry.macs / cpu.lanes,
        "inputs": geometry.batch * geometry.in_channels * geometry.in_height * geometry.in_width,
        "outputs": pixels * out_channels,
        "weights": out_channels * channels * height * width,
        "far_weights": max(0, out_channels * channels * height * width - cpu.l2 // 4),
        "ragged": geometry.macs if _dense_tile(out_channels, cpu) % cpu.lanes else 0,
        "fixed": 1,
    }


def _dense_tile(outputs: int, cpu: CpuFacts) -> int:
    """How many output units at a time TVM's nn.dense computes, untuned."""
    return next(tile for tile in range(2 * cpu.lanes, 0, -1) if outputs % tile == 0)


def _fully_connected_counts(geometry: ConvGeometry, nonzeros: int, cpu: CpuFacts) -> dict[str, float]:
    """Vectors are of images: one image has none, there the non-zeros are the lanes."""
    block = image_block(geometry.batch, cpu.lanes)
    blocks = -(-geometry.batch // block.images)
    several = geometry.batch > 1
    segment = segment_length(geometry.batch, geometry.in_channels, cpu.l1)
    return {
        "vectors": nonzeros * blocks * block.vectors if several else 0,
        "touched": 0,
        "entries": nonzeros * blocks,
        "far_entries": max(0, nonzeros - cpu.l2 // _NARROW_ENTRY_BYTES),
        "rows": geometry.out_channels * blocks * -(-geometry.in_channels // segment),
        "packed": geometry.in_channels * blocks * block.images if several else 0,
        "inputs": geometry.batch * geometry.in_channels,
        "outputs": geometry.batch * geometry.out_channels,
        "fixed": 1,
    }


@lru_cache(maxsize=4096)
def _direct_work(geometry: ConvGeometry, cpu: CpuFacts) -> _Work:
    plan = direct_plan(geometry, cpu)
    packed = plan.all_blocks * geometry.in_channels * plan.channel_size if plan.packed else 0
    outputs = geometry.batch * geometry.out_channels * geometry.out_height * geometry.out_width
    return _Work(
        panels=plan.all_blocks * plan.panels,
        panel_vectors=-(-plan.panel_vectors * plan.lanes // cpu.lanes),
        rows=geometry.out_channels * plan.channel_blocks,
        packed=packed,
        inputs=packed,
        outputs=outputs,
    )


@lru_cache(maxsize=4096)
def _winograd_work(geometry: ConvGeometry, tile: int, cpu: CpuFacts) -> _Work:
    plan = winograd_plan(geometry, tile, cpu)
    vectors = geometry.batch * plan.layout.vectors * plan.positions
    return _Work(
        panels=geometry.batch * plan.blocking.blocks,
        panel_vectors=plan.blocking.image / plan.blocking.blocks,
        rows=geometry.out_channels * plan.positions,
        packed=geometry.batch * geometry.in_channels * plan.layout.length,
        inputs=vectors * geometry.in_channels,
        outputs=vectors * geometry.out_channels,
    )
