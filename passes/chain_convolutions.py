"""Chain sparse Winograd convolutions of wide images, to be computed strip by strip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relay

from ..schedules.attributes import winograd_plan_of
from ..schedules.buffers import chain_buffers, why_too_large
from ..schedules.constructors import winograd_chain
from ..schedules.operators import FROM_TILES, TO_TILES, WINOGRAD, WINOGRAD_ADD
from ..schedules.registration import plain
from ..schedules.strip_plan import StripPlan, strip_plan
from ..schedules.winograd_plan import WinogradPlan
from .straight_graphs import Rewriter, is_call, rewrite_straight

_BEYOND_CACHES = 64 << 20
"""Bytes of input and output together, from which memory bounds a convolution by itself."""

# Time of transforms and conversions by themselves, relative to that in a chain, if memory bounds them and if it does
# not. Measured on a core with 2 MiB of L2.
_TRANSFORMS = {True: 1.5, False: 0.8}
_CONVERSIONS = {True: 2.0, False: 1.0}

_NONZEROS = 230
"""That multiply a tile in the time of the transform of a channel."""

_LEAST_UNITS = 2  # of a chain, for threads to share


@tvm.transform.module_pass(opt_level=0, name="ChainConvolutions")
class ChainConvolutions:
    """Join sparse Winograd convolutions that follow each other between two conversions of layout, where memory would
    bound them; the conversions become part of the chain.

    A ``@main`` with control flow or functions inside is handed back unchanged.
    """

    def transform_module(self, mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        return rewrite_straight(mod, (FROM_TILES,), _Rewriter)


class _Rewriter(Rewriter):
    def call(self, call: relay.Call) -> relay.Expr | None:
        run = self._run(call.args[0]) if is_call(call, FROM_TILES) else []
        chains = chained([Link.of(convolution) for convolution in run])
        if not chains:
            return super().call(call)
        value = self.value(run[0].args[0].args[0])
        for plan in chains:
            calls, run = run[: len(plan.layers)], run[len(plan.layers) :]
            residual = self.value(calls[-1].args[-1].args[0]) if is_call(calls[-1], WINOGRAD_ADD) else None
            value = winograd_chain(value, calls, plan, residual)
        return value

    def _run(self, last: relay.Expr) -> list[relay.Call]:
        """The convolutions that lead from a conversion into tiles to this one; none if it is not so, or if anything
        else reads what is between."""
        if is_call(last, WINOGRAD_ADD) and not _is_conversion(last.args[-1]):
            return []
        run: list[relay.Call] = []
        node = last
        while is_call(node, WINOGRAD, *([] if run else [WINOGRAD_ADD])) and self.uses[node] == 1:
            run.insert(0, node)
            node = node.args[0]
        return run if _is_conversion(node) else []


def _is_conversion(node: relay.Expr) -> bool:
    return is_call(node, TO_TILES) and plain(node.attrs["offset"]) == (0, 0)


@dataclass(frozen=True)
class Link:
    """A convolution, and what it takes with every tile.

    The unit is what it takes to read or write a tile of a channel and to transform it, F(4x4, 3x3).
    """

    plan: WinogradPlan
    products: float

    @classmethod
    def of(cls, convolution: relay.Call) -> Link:
        nonzeros = int(np.count_nonzero(convolution.args[1].data.numpy()))
        return cls(winograd_plan_of(convolution.attrs), nonzeros / _NONZEROS)

    @property
    def channels(self) -> int:
        """Read and written."""
        return self.plan.geometry.in_channels + self.plan.geometry.out_channels

    @property
    def transforms(self) -> float:
        return self.channels * self.plan.positions / 36

    @property
    def beyond_caches(self) -> bool:
        """Whether memory bounds it by itself."""
        geometry = self.plan.geometry
        return 4 * geometry.batch * self.channels * geometry.in_height * geometry.in_width >= _BEYOND_CACHES

    @property
    def alone(self) -> float:
        """What it takes by itself."""
        return self.products + self.transforms * _TRANSFORMS[self.beyond_caches]


def chained(layers: Sequence[Link]) -> list[StripPlan]:
    """These layers in chains; none where each by itself takes less.

    A chain converts its first image and its last; without chains that is done apart.
    """
    if not any(layer.beyond_caches for layer in layers):
        return []
    # By layers, the least cost of the first so many, and their chains.
    best: list[tuple[float, list[StripPlan]] | None] = [(0.0, [])]
    for end in range(1, len(layers) + 1):
        options = []
        for begin in range(end):
            before, plan = best[begin], _plan(tuple(layer.plan for layer in layers[begin:end]))
            if before is not None and plan is not None:
                work = sum(layer.transforms + layer.products for layer in layers[begin:end])
                cost = plan.channels[0] + plan.channels[-1] + plan.waste * work
                options.append((before[0] + cost, [*before[1], plan]))
        best.append(min(options, key=lambda option: option[0], default=None))
    if best[-1] is None:
        return []
    first, last = layers[0], layers[-1]
    alone = sum(layer.alone for layer in layers)
    alone += first.plan.geometry.in_channels * _CONVERSIONS[first.beyond_caches]
    alone += last.plan.geometry.out_channels * _CONVERSIONS[last.beyond_caches]
    return best[-1][1] if best[-1][0] < alone else []


def _plan(layers: tuple[WinogradPlan, ...]) -> StripPlan | None:
    """None where the layers cannot be chained, or all threads but one would have nothing to do."""
    plan = strip_plan(layers)
    if plan is None or plan.units < _LEAST_UNITS or why_too_large(chain_buffers(plan)) is not None:
        return None
    return plan
