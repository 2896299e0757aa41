"""Choose a kernel for every layer by its predicted cost, and say why."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tvm

from .costs import Borrowing, CostModel, break_even_sparsity
from .layers import Layer, Worklist
from .plan import DENSE, DIRECT, WINOGRAD, percent

DOMAINS = ("auto", "spatial", "winograd", "dense")

# In the order of preference at equal cost.
ORDER = (DENSE, DIRECT, *WINOGRAD.values())

_ASKED = {
    "spatial": (DIRECT,),
    "winograd": (*WINOGRAD.values(),),
    "dense": (DENSE,),
}


@tvm.transform.module_pass(opt_level=0, name="ChooseKernels")
class ChooseKernels:
    """Enter kernel, reason, costs and break-even sparsities into a worklist; the module is handed back unchanged.

    Args:
        worklist: as PruneWinograd left it.
        target: what the module will be built for.
        domain: ``auto`` takes the cheapest of all kernels, dense included. The others force: ``spatial`` sparse direct,
            ``winograd`` the cheaper Winograd kernel (sparse direct where none reaches), ``dense`` nothing sparse; a
            layer that no such kernel supports stays dense.
        cost_model: predicts; the seconds of one run on one thread.
    """

    def __init__(
        self, worklist: Worklist, target: tvm.target.Target, domain: str = "auto", *, cost_model: CostModel
    ) -> None:
        self.worklist = worklist
        self.target = target
        self.domain = domain
        self.cost_model = cost_model

    def transform_module(self, mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        for layer in self.worklist.layers:
            if layer.left_alone is not None:
                layer.reason = layer.left_alone
                continue
            self._predict(layer)
            layer.kernel, layer.reason = choose(layer, self.domain)
            layer.overtaken = layer.break_even if layer.kernel == DENSE else self._break_even(layer, layer.kernel)
            if self.domain == "auto" and layer.kernel != DENSE:
                layer.reason += _next(layer)
        return mod

    def _predict(self, layer: Layer) -> None:
        assert layer.geometry is not None
        geometry = layer.geometry
        for kernel in ORDER:
            if kernel in layer.unsupported:
                continue
            weights = layer.weights(kernel)
            nonzeros = weights if kernel == DENSE else int(np.count_nonzero(layer.sparse_weight(kernel)))
            layer.nonzeros[kernel] = nonzeros
            layer.costs[kernel] = self.cost_model.cost(kernel, geometry, nonzeros, self.target)
            if isinstance(self.cost_model, Borrowing):
                family = self.cost_model.borrowed_from(kernel, geometry, self.target)
                if family is not None:
                    layer.borrowed[kernel] = family
        layer.break_even = self._break_even(layer, DENSE)

    def _break_even(self, layer: Layer, rival: str) -> dict[str, float]:
        """By sparse kernel, the sparsity from which it costs no more than a rival does."""
        assert layer.geometry is not None
        shares = {
            kernel: break_even_sparsity(
                self.cost_model, kernel, layer.geometry, layer.weights(kernel), layer.costs[rival], self.target
            )
            for kernel in layer.costs
            if kernel not in (DENSE, rival)
        }
        return {kernel: share for kernel, share in shares.items() if share is not None}


def choose(layer: Layer, domain: str) -> tuple[str, str]:
    """Kernel and reason."""
    if domain == "auto":
        kernel = _cheapest(layer, ORDER)
        return kernel, _why_dense_wins(layer) if kernel == DENSE else _gain(layer, kernel)
    kernel = _cheapest(layer, _ASKED[domain])
    if kernel == DENSE and domain == "winograd":
        return _cheapest(layer, (DIRECT,)), _why_not(layer, _ASKED[domain])
    if kernel == DENSE and domain == "spatial":
        return kernel, layer.unsupported[DIRECT]
    if kernel == DENSE or layer.costs[kernel] < layer.costs[DENSE]:
        return kernel, "asked for"
    return kernel, f"asked for, slower than dense: {_needs(layer, kernel)}"


def _cheapest(layer: Layer, kernels: tuple[str, ...]) -> str:
    """Of those supported; dense if none is."""
    return min((kernel for kernel in kernels if kernel in layer.costs), key=layer.costs.__getitem__, default=DENSE)


def _why_not(layer: Layer, kernels: tuple[str, ...]) -> str:
    return "; ".join(dict.fromkeys(layer.unsupported[kernel] for kernel in kernels))


def _gain(layer: Layer, kernel: str) -> str:
    return f"{layer.costs[DENSE] / layer.costs[kernel]:.2g} times as fast as dense"


def _next(layer: Layer) -> str:
    """What it would take for another kernel to win."""
    beyond = {kernel: share for kernel, share in layer.overtaken.items() if share > layer.sparsity(kernel)}
    if not beyond:
        return ""
    nearest = _nearest(layer, beyond)
    return f"; {_needs_to_win(nearest, beyond[nearest], layer.sparsity(nearest))}"


def _why_dense_wins(layer: Layer) -> str:
    """What it would take for a sparse kernel to win."""
    if not layer.break_even:
        return "no sparse kernel wins here, however sparse"
    return _needs(layer, _nearest(layer, layer.break_even))


def _nearest(layer: Layer, shares: Mapping[str, float]) -> str:
    """Of sparse kernels, the one that lacks the least sparsity."""
    return min(shares, key=lambda kernel: shares[kernel] - layer.sparsity(kernel))


def _needs(layer: Layer, kernel: str) -> str:
    if kernel not in layer.break_even:
        return f"{kernel} does not win here, however sparse"
    return _needs_to_win(kernel, layer.break_even[kernel], layer.sparsity(kernel))


def _needs_to_win(kernel: str, needed: float, sparsity: float) -> str:
    return f"{kernel} needs {percent(needed)} to win here, has {percent(sparsity)}"
