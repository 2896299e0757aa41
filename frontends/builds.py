"""What becomes of trained weights: pruned, quantised, and measured as each build computes with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .joint_sparsity import JointSparsity
from .quantization import CodebookTuner, Quantization, quantize_, step_for_bits
from .rate_aware import quantize_within_
from .recipe import Recipe, SparsityTable
from .tasks import Task, evaluate
from .winograd_inference import winograd_pruned

__all__ = ["calibration", "final_pruning", "holds", "measure_pruned", "measure_quantised", "quantise_and_tune"]


def final_pruning(model: nn.Module, plan: Recipe) -> JointSparsity | None:
    """What prunes at the end, by the recipe's ``prune_spatial`` and ``prune_winograd``; None for a dense model.

    Raises:
        InputError: both are 0, or the model has nothing to prune so.
    """
    target = plan.sparsity
    if target is None:
        return None
    shares = target.prune_spatial, target.prune_winograd
    return JointSparsity(model, *shares, target.tile, weighted=target.weighted, exclude=target.exclude)


def calibration(task: Task, plan: Recipe, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Some batches as in training, but none that training sees; fewer where the data have no more."""
    batches = task.dataset(plan.run.epochs, 0, 1)
    return [batches[index] for index in range(min(count, len(batches)))]


def holds(target: SparsityTable) -> bool:
    """Whether training ends with steps for which spatially pruned weights stay zero."""
    return target.spatial > 0 and target.hold > 0


def measure_pruned(task: Task, model: nn.Module, plan: Recipe, pruner: JointSparsity | None) -> dict[str, Any]:
    """Prune as the recipe says (in place) and measure each build from these weights.

    ``spatial``: spatially pruned weights. ``winograd``: those weights, as the file stores them, pruned in the Winograd
    domain as well. ``winograd_only``: the weights before spatial pruning, pruned in the Winograd domain alone; not
    measured where training has pruned them spatially and held them so.
    """
    results: dict[str, Any] = {}
    if pruner is not None:
        if plan.sparsity is not None and not holds(plan.sparsity):
            with winograd_pruned(model, pruner.winograd_spec()):
                results["winograd_only"] = evaluate(task, model)
        results["spatial_sparsity"] = pruner.prune_("spatial")
    return results | _builds(task, model, pruner)


def measure_quantised(
    task: Task, model: nn.Module, quantization: Quantization, pruner: JointSparsity | None
) -> dict[str, Any]:
    """Measure each build of the quantised weights, as the file stores them."""
    return {
        "step": quantization.step,
        "steps": {name: layer.step for name, layer in quantization.layers.items()},
        "levels": quantization.levels,
        "entropy": round(quantization.entropy, 4),
        "spatial_sparsity": {name: float((layer.codes == 0).mean()) for name, layer in quantization.layers.items()},
        **_builds(task, model, pruner),
    }


def quantise_and_tune(
    model: nn.Module, objective: JointSparsity | None, pruner: JointSparsity | None, task: Task, plan: Recipe
) -> Quantization:
    """Quantise the model in place, within the recipe's increase of the loss in either domain; or by one step, and
    then fine-tune its codebook. On batches that training has not seen.

    In fine-tuning the regularisers stay on, with the coefficients that training has found: without them the Winograd
    domain would lose its sparsity. On one process.
    """
    table = plan.quantisation
    assert table is not None
    if table.increase:
        return quantize_within_(
            model,
            calibration(task, plan, table.calibration),
            table.increase,
            task.loss_name,
            objective=pruner,
            progress=lambda line: print(f"quantising: {line}", flush=True),
        )
    step = table.step or step_for_bits(model, table.bits)
    quantization = quantize_(model, step, table.dither, plan.run.seed)
    if not table.tuning_steps:
        return quantization
    device = next(model.parameters()).device
    tuner = CodebookTuner(model, quantization, table.rate)
    model.train()
    for index in range(table.tuning_steps):
        epoch, position = divmod(index, task.steps())
        if position == 0:
            batches = task.dataset(plan.run.epochs + epoch, 0, 1)
        inputs, target = (tensor.to(device) for tensor in batches[position])
        with torch.autocast(device.type, torch.bfloat16, enabled=plan.run.precision == "bf16"):
            output = model(inputs.contiguous(memory_format=torch.channels_last))
        loss = task.loss(output, target)
        # Not told of the loss: its scale is measured in training, and would be averaged over processes that have ended.
        (loss + objective() if objective is not None else loss).backward()
        tuner.step()
        model.zero_grad()
    model.eval()
    return tuner.quantization


def _builds(task: Task, model: nn.Module, pruner: JointSparsity | None) -> dict[str, Any]:
    """Figures of the present weights, by build."""
    if pruner is None:
        return {"dense": evaluate(task, model)}
    spec = pruner.winograd_spec()
    results: dict[str, Any] = {"spatial": evaluate(task, model)}
    results["winograd_sparsity"] = pruner.prune_("winograd")
    results["winograd_spec"] = spec
    with winograd_pruned(model, spec):
        results["winograd"] = evaluate(task, model)
    return results
