"""The way from a model to a model with sparse layers, in numbered phases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tvm
from tvm import relay

from ..schedules.targets import why_not_target
from ..schedules.winograd import TILES
from .absorb_conversions import AbsorbConversions
from .absorb_epilogues import AbsorbEpilogues
from .absorb_gathers import AbsorbGathers
from .absorb_pooling import AbsorbPooling
from .alternatives import Planner
from .bind_parameters import BindParameters
from .choose_kernels import DOMAINS, ChooseKernels
from .collect_convolutions import CollectConvolutions
from .convolutions import MAIN
from .costs import CostModel
from .keep_tiles import KeepTiles
from .layers import Worklist
from .measured_costs import MeasuredCostModel
from .merge_parts import MergeParts
from .pad_pairs import PadPairs
from .plan import Plan
from .prune_winograd import PruneWinograd
from .rewrite_convolutions import RewriteConvolutions
from .rewrite_pooling import RewritePooling


def sparsify(
    mod: tvm.IRModule,
    params: Mapping[str, Any] | None,
    target: Any,
    domain: str = "auto",
    *,
    winograd_sparsity: float = 0.0,
    tile: int | None = None,
    weighted: bool = True,
    cost_model: CostModel | None = None,
) -> tuple[tvm.IRModule, dict[str, Any], Plan]:
    """Replace convolutions and fully-connected layers of ``mod["main"]`` by sparse ones where that is faster.

    The result is plain TVM: ``tvm.relay.build(mod, target=target, params=params)``. The arguments are left as they
    were. A second time nothing changes: sparse operators are left alone, and so is everything else that the kernels do
    not support (another data type, layout or operator, a dynamic shape, a target without sparse kernels, weights that
    are not constant), each with its reason in the plan.

    Sums of layers that stand for one (``frontends.approximate``) are put into the form that is the fastest, unless
    ``winograd_sparsity`` is asked for.

    Args:
        mod: Relay, weights as parameters or as constants.
        params: by name, tvm NDArray or numpy; None if the module has its weights bound.
        target: what will be given to ``relay.build``: a string, a Target or a list or mapping of them.
        domain: ``auto`` takes the cheapest kernel for each layer, dense included. The others force, whatever the cost:
            ``spatial`` sparse direct; ``winograd`` sparse Winograd, and sparse direct for the layers outside its reach,
            fully-connected ones among them; ``dense`` no sparse kernel. Layers that no such kernel supports stay dense.
        winograd_sparsity: in [0, 1); prune this share of the Winograd weights, one threshold over all layers within
            Winograd's reach, of a model that carries no thresholds of its own. 0 prunes nothing, and the result equals
            dense convolution. Only Winograd kernels are changed by it.
        tile: allow this Winograd output tile size only, 2 or 4; None for the cheaper of both.
        weighted: with ``winograd_sparsity``, magnitudes count by how much they change the output, not raw.
        cost_model: predicts the kernels' costs; by default what was measured on CPUs of the target's
            family, and a model calibrated on such for all other layers.

    Returns:
        The module, the parameters that it still has, and the plan.

    Raises:
        ValueError: for an argument out of range, or a malformed Winograd attribute.
    """
    _check(mod, domain, winograd_sparsity, tile)
    params = dict(params or {})
    device = _deciding_target(target)
    worklist, costs = Worklist(), cost_model or MeasuredCostModel()

    def planning(layers: Worklist) -> list[tvm.transform.Pass]:
        return [
            # Which layers there are, and what stands against a sparse kernel.
            CollectConvolutions(layers, params, device),
            # Which Winograd weights are zero; then a kernel for each layer, by cost.
            PruneWinograd(layers, winograd_sparsity, tile=tile, weighted=weighted),
            ChooseKernels(layers, device, domain, cost_model=costs),
        ]

    planner = Planner(planning, device, domain, costs)
    passes = [
        # Phase 1. Canonical form: inference only, scales folded into weights, padding into convolutions.
        BindParameters(params, keep_convolution_weights=True),
        relay.transform.InferType(),
        relay.transform.SimplifyInference(),
        relay.transform.FoldConstant(),
        relay.transform.FoldExplicitPadding(),
        relay.transform.FoldScaleAxis(),
        # Phase 2. Layers that were approximated by sums of parts: in the form that is the fastest here. Not where a
        # share of the Winograd weights is to be pruned, which is a share of those that the model has.
        *([] if winograd_sparsity else [step(worklist, planner) for step in (PadPairs, AbsorbGathers, MergeParts)]),
        # Phase 3. A kernel for each layer.
        *planning(worklist),
        # Phase 4. Sparse operators for the layers chosen, the weights of the others constants; no conversion in vain.
        RewriteConvolutions(worklist, device),
        BindParameters(params),
        relay.transform.FoldConstant(),
        AbsorbEpilogues(),
        # First where NCHW is faster, which leaves nothing there to keep in tiles; then at the ends of what is kept so.
        AbsorbConversions(preferred=True),
        KeepTiles(),
        AbsorbConversions(),
        # Phase 5. What lies between them.
        *([] if domain == "dense" else [RewritePooling(device), AbsorbPooling()]),
    ]
    with _every_pass():
        result = tvm.transform.Sequential(passes, name="Sparsify")(mod)
    # Phase 6. Explain.
    bound = _inputs(mod) - _inputs(result)
    return (
        result,
        {name: value for name, value in params.items() if name not in bound},
        worklist.plan(str(target), domain),
    )


def _check(mod: Any, domain: str, winograd_sparsity: float, tile: int | None) -> None:
    if not isinstance(mod, tvm.IRModule):
        raise ValueError(f"sparsify needs an IRModule, got {type(mod).__name__}; tvm.IRModule.from_expr makes one")
    if MAIN not in {var.name_hint for var in mod.get_global_vars()}:
        raise ValueError(f"sparsify needs a module with a function @{MAIN}")
    if domain not in DOMAINS:
        raise ValueError(f"domain must be one of {', '.join(DOMAINS)}, got {domain!r}")
    if not 0 <= winograd_sparsity < 1:
        raise ValueError(f"winograd_sparsity must be in [0, 1), got {winograd_sparsity}")
    if tile not in (None, *TILES):
        raise ValueError(f"tile must be one of {TILES} or None, got {tile!r}")


def _deciding_target(target: Any) -> tvm.target.Target:
    """Of several targets, one that has no sparse kernels: TVM decides only later which of them runs what."""
    targets = list(tvm.target.Target.canon_multi_target(target))
    return next((one for one in targets if why_not_target(one) is not None), targets[0])


def _every_pass() -> tvm.transform.PassContext:
    """The caller's context, but at the level where FoldScaleAxis runs."""
    outer = tvm.transform.PassContext.current()
    return tvm.transform.PassContext(
        opt_level=max(3, outer.opt_level),
        required_pass=outer.required_pass,
        disabled_pass=outer.disabled_pass,
        instruments=outer.instruments,
        config=outer.config,
    )


def _inputs(mod: tvm.IRModule) -> set[str]:
    return {var.name_hint for var in mod[MAIN].params}
