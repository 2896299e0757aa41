"""Layers that could stand where others are: what they would cost, and the calls that put them there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relay

from ..schedules.geometry import ConvGeometry
from ..schedules.winograd_pruning import ATTRIBUTE, parse
from .choose_kernels import ORDER, choose
from .collect_convolutions import why_not_kernels
from .convolutions import is_convolution
from .costs import CostModel
from .layers import Layer, Worklist
from .parts import LAYERS
from .plan import DENSE
from .straight_graphs import Rewriter, rewrite_straight


@dataclass(frozen=True)
class Planner:
    """How kernels will be chosen.

    Attributes:
        passes: those that fill a worklist. target, domain, cost_model: as for ChooseKernels.
    """

    passes: Callable[[Worklist], Sequence[tvm.transform.Pass]]
    target: tvm.target.Target
    domain: str
    cost_model: CostModel


class Alternatives:
    """The layers of a module, each with the kernel and the costs that it would have, and what others would cost.

    Args:
        mod: a ``@main`` without functions inside. nodes: all of it, operands first, of whatever inference of types.
        planner: how kernels will be chosen.

    Attributes:
        layers: by call, those that another layer may replace: costs are known, and no Winograd threshold of the model's
            own speaks of this very weight.
    """

    def __init__(self, mod: tvm.IRModule, nodes: Sequence[relay.Expr], planner: Planner) -> None:
        self.mod = mod
        self.nodes = nodes
        self.planner = planner

    @cached_property
    def layers(self) -> Mapping[relay.Call, Layer]:
        worklist = Worklist()
        tvm.transform.Sequential(list(self.planner.passes(worklist)))(self.mod)
        attribute = self.mod.get_attr(ATTRIBUTE)
        thresholds = {} if attribute is None else parse(str(attribute), "the module")
        # In the same order; behind them in the list come those of other functions.
        calls = [node for node in self.nodes if isinstance(node, relay.Call) and is_convolution(node)]
        return {
            call: layer
            for call, layer in zip(calls, worklist.layers, strict=False)
            if layer.costs and layer.weight is not None and layer.weight.parameter not in thresholds
        }

    def best(self, layer: Layer, geometry: ConvGeometry, nonzeros: Mapping[str, int]) -> tuple[str, float]:
        """The kernel that would be chosen for a layer of another geometry, and its seconds.

        Args:
            layer: gives the operator, and the kernels that are allowed.
            nonzeros: by sparse kernel.
        """
        planner = self.planner
        reasons = why_not_kernels(geometry, layer.op, planner.target)
        unsupported = {kernel: reason for kernel, reason in reasons.items() if reason is not None}
        other = Layer("", layer.op, geometry=geometry, unsupported=unsupported)
        for kernel in ORDER:
            if kernel not in layer.costs:
                other.unsupported.setdefault(kernel, layer.unsupported[kernel])
            elif kernel not in unsupported:
                other.nonzeros[kernel] = other.weights(kernel) if kernel == DENSE else nonzeros[kernel]
                other.costs[kernel] = planner.cost_model.cost(kernel, geometry, other.nonzeros[kernel], planner.target)
        kernel, _ = choose(other, planner.domain)
        return kernel, other.costs[kernel]


@dataclass(frozen=True)
class Replacement:
    """What takes the place of a node: made of the new value of another."""

    source: relay.Expr
    make: Callable[[relay.Expr], relay.Expr]


Finder = Callable[[list[relay.Expr], Alternatives], Iterable[tuple[relay.Call, Replacement]]]
"""Tells which nodes of a graph are to be replaced by what."""


def replace_layers(mod: tvm.IRModule, planner: Planner, find: Finder) -> tvm.IRModule:
    """``@main`` with replacements in their places; with control flow or functions inside handed back unchanged."""

    def replacer(nodes: list[relay.Expr]) -> Rewriter:
        return _Replacer(dict(find(nodes, Alternatives(mod, nodes, planner))), nodes)

    return rewrite_straight(mod, LAYERS, replacer)


class ReplacingPass(ABC):
    """What passes that replace single layers share.

    Args:
        worklist: gets a note on every layer replaced. planner: how kernels will be chosen.
    """

    def __init__(self, worklist: Worklist, planner: Planner) -> None:
        self.worklist = worklist
        self.planner = planner

    def transform_module(self, mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        """For TVM."""
        return replace_layers(mod, self.planner, self.replacements)

    @abstractmethod
    def replacements(
        self, nodes: list[relay.Expr], alternatives: Alternatives
    ) -> Iterable[tuple[relay.Call, Replacement]]:
        """What is to be replaced by what, of all nodes of a graph."""


class _Replacer(Rewriter):
    def __init__(self, replacements: Mapping[relay.Call, Replacement], nodes: list[relay.Expr]) -> None:
        self.replacements = replacements
        super().__init__(nodes)

    def call(self, call: relay.Call) -> relay.Expr | None:
        found = self.replacements.get(call)
        return super().call(call) if found is None else found.make(self.value(found.source))


def layer_call(layer: Layer, filters: NDArray[np.float32], data: relay.Expr, name: str | None = None) -> relay.Call:
    """A layer with other filters, of whatever numbers of channels. Its span holds its name, or the one given, which
    CollectConvolutions finds there."""
    geometry = layer.geometry
    assert geometry is not None
    if layer.op == "nn.dense":
        call = relay.nn.dense(data, relay.const(filters[:, :, 0, 0]))
    else:
        call = relay.nn.conv2d(
            data,
            relay.const(filters),
            strides=geometry.strides,
            padding=geometry.padding,
            dilation=geometry.dilation,
            groups=geometry.groups,
            channels=filters.shape[0],
            kernel_size=geometry.kernel,
        )
    span = tvm.ir.Span(tvm.ir.SourceName(name or layer.name), 0, 0, 0, 0)
    return relay.Call(call.op, call.args, call.attrs, call.type_args, span)
