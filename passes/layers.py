"""What the passes know of each layer while they work; ``plan.py`` is what they tell."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from tvm import relay

from ..schedules.geometry import ConvGeometry
from ..schedules.winograd_pruning import WinogradPruning
from .plan import DENSE, DIRECT, TILE, LayerPlan, Plan


@dataclass(frozen=True)
class Weight:
    """The constant filters of a convolution, (K, C / groups, kh, kw); (K, C, 1, 1) of a fully-connected layer.

    Attributes:
        stored: as in the model's parameters; what a Winograd threshold of the file speaks of.
        scale: broadcasts to ``stored``; what the canonical form multiplied it by (BatchNorm folded), else 1.
        parameter: the parameter's name, None for a constant.
    """

    stored: NDArray[np.float32]
    scale: NDArray[np.float64]
    parameter: str | None

    @property
    def value(self) -> NDArray[np.float32]:
        """What the convolution multiplies by."""
        if np.all(self.scale == 1):
            # A fully-connected layer has hundreds of megabytes of them.
            return self.stored.astype(np.float32, copy=False)
        return (self.stored * self.scale).astype(np.float32)

    def folded(self) -> Weight:
        """The same filters with the scale in ``stored``, for where no threshold of the file speaks of them."""
        return Weight(self.value, np.ones((1, 1, 1, 1)), self.parameter)

    def as_filters(self, shape: tuple[int, ...]) -> Weight:
        """The same filters in the order (K, C / groups, kh, kw).

        TVM's depthwise convolutions may have (C, K / C, kh, kw) instead, the same numbers in the same order.
        """
        scale = np.broadcast_to(self.scale, (*self.stored.shape[:2], *self.scale.shape[2:]))
        return Weight(self.stored.reshape(shape), scale.reshape(*shape[:2], *self.scale.shape[2:]), self.parameter)

    def winograd(self, pruning: WinogradPruning) -> NDArray[np.float32]:
        """Winograd weights (K, C / groups, n, n), pruned as stored and scaled afterwards."""
        return (pruning.filters(self.stored) * self.scale).astype(np.float32)


@dataclass
class Layer:
    """One convolution or fully-connected layer (which counts as one of a single pixel); each pass fills in its part.

    Attributes:
        name, op: as in LayerPlan.
        call: the layer itself, by which RewriteConvolutions knows it again (CollectConvolutions).
        input_shape, weight_shape, output_shape: where they are static.
        geometry, weight: None only where ``left_alone`` is set.
        spatial_sparsity: share of zero weights, where there are weights at hand.
        left_alone: why the passes cannot change this layer, whatever the cost (CollectConvolutions).
        unsupported: why single kernels cannot (CollectConvolutions, PruneWinograd).
        pruning: by Winograd kernel supported, which of its weights are zero (PruneWinograd).
        nonzeros: by kernel supported, how many weights it multiplies by (ChooseKernels).
        costs: by kernel supported, seconds (ChooseKernels). borrowed, break_even, overtaken: as in LayerPlan.
        kernel, reason: the choice (ChooseKernels; what is there already of a layer left alone).
    """

    name: str
    op: str
    call: relay.Call | None = field(default=None, repr=False, compare=False)
    input_shape: tuple[int, ...] | None = None
    weight_shape: tuple[int, ...] | None = None
    output_shape: tuple[int, ...] | None = None
    geometry: ConvGeometry | None = None
    weight: Weight | None = None
    spatial_sparsity: float | None = None
    left_alone: str | None = None
    unsupported: dict[str, str] = field(default_factory=dict)
    pruning: dict[str, WinogradPruning] = field(default_factory=dict)
    nonzeros: dict[str, int] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)
    borrowed: dict[str, str] = field(default_factory=dict)
    break_even: dict[str, float] = field(default_factory=dict)
    overtaken: dict[str, float] = field(default_factory=dict)
    kernel: str = DENSE
    reason: str = ""

    def sparse_weight(self, kernel: str) -> NDArray[np.float32]:
        """What a sparse kernel multiplies by: filters for direct, Winograd weights for Winograd."""
        assert self.weight is not None
        return self.weight.value if kernel == DIRECT else self.weight.winograd(self.pruning[kernel])

    def sparsity(self, kernel: str) -> float:
        """Share of zeros among the weights of ``kernel``."""
        return 1 - self.nonzeros[kernel] / self.weights(kernel)

    def weights(self, kernel: str) -> int:
        """How many weights ``kernel`` has, zeros included."""
        assert self.geometry is not None
        out_channels, channels, height, width = self.geometry.weight_shape
        if kernel not in TILE:
            return out_channels * channels * height * width
        return out_channels * channels * (TILE[kernel] + height - 1) * (TILE[kernel] + width - 1)

    def multiplications(self, kernel: str) -> int:
        """Of one run; sparse kernels skip zeros, Winograd counts the products and not the transforms."""
        assert self.geometry is not None
        geometry, tile = self.geometry, TILE.get(kernel, 1)
        places = -(-geometry.out_height // tile) * -(-geometry.out_width // tile)
        return geometry.batch * places * self.nonzeros[kernel]

    def plan(self) -> LayerPlan:
        """The record for the user."""
        geometry = self.geometry
        known = self.nonzeros
        return LayerPlan(
            name=self.name,
            op=self.op,
            kernel=self.kernel,
            reason=self.reason,
            input_shape=self.input_shape,
            weight_shape=self.weight_shape,
            output_shape=self.output_shape,
            strides=geometry.strides if geometry else None,
            padding=geometry.padding if geometry else None,
            dilation=geometry.dilation if geometry else None,
            groups=geometry.groups if geometry else None,
            spatial_sparsity=self.spatial_sparsity,
            winograd_sparsity={kernel: self.sparsity(kernel) for kernel in known if kernel in TILE},
            costs={kernel: 1e3 * seconds for kernel, seconds in self.costs.items()},
            borrowed=dict(self.borrowed),
            break_even=dict(self.break_even),
            overtaken=dict(self.overtaken),
            unsupported=dict(self.unsupported),
            multiplications=self.multiplications(self.kernel) if self.kernel in known else None,
        )


@dataclass
class Worklist:
    """The convolutions of one module, handed from pass to pass.

    Attributes:
        layers: in the order of ``find_convolutions``.
        warnings: lines for the user.
        notes: by name of a layer, what passes before the choice of kernels have to say of it.
    """

    layers: list[Layer] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)

    def plan(self, target: str, domain: str) -> Plan:
        """The record for the user."""
        return Plan(target, domain, tuple(map(self._layer_plan, self.layers)), tuple(self.warnings))

    def _layer_plan(self, layer: Layer) -> LayerPlan:
        plan = layer.plan()
        note = self.notes.get(layer.name)
        return plan if note is None else replace(plan, reason=f"{plan.reason}; {note}" if plan.reason else note)
