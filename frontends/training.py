"""The project's own trainer: a recipe, data and an output folder give trained weights and measured results.

It stands on Lightning (checkpoints, resume, several processes). Whoever has a training loop needs none of it:
``JointSparsity`` works in any. A run leaves in its output folder ``model.safetensors`` (the weights; spatially pruned
where the recipe asks for sparsity, quantised where it asks for that), ``model.jsm`` (where they are quantised),
``history.csv`` (a header, then one line an epoch) and ``results.json`` (figures, recipe, seed, versions), which comes
last and marks the run as finished. ``last.ckpt`` is there until then, and ``approximation.pt`` (the layers done) where
the recipe asks for an approximation.
"""

from __future__ import annotations

import json
import math
import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from . import builds
from .approximation import HeldConv2d, approximate
from .errors import InputError
from .history import Lines
from .inspection import inspect
from .joint_sparsity import JointSparsity
from .model_file import save
from .networks import build
from .outputs import replacing
from .recipe import Recipe, read_recipe
from .state_dicts import load_weights
from .tasks import TASKS, Metrics, Task, evaluate

__all__ = ["train"]


def train(
    recipe: Path,
    data: Path,
    output: Path,
    resume: bool = False,
    *,
    weights: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    processes: int = 1,
) -> dict[str, Any]:
    """Train by a recipe and measure the weights started from and every build of the trained ones.

    Args:
        recipe: a TOML file, see ``recipe.Recipe``. data: the folder or archive that the recipe's names lie in.
        output: folder for the results, made where missing.
        resume: go on from ``output/last.ckpt`` if there is one; where the run has finished, only return its results.
        weights: to start from, as ``state_dicts.load_weights`` reads them; required where the recipe says
            ``pretrained = true`` or approximates.
        overrides: recipe values to change, ``{"sparsity.spatial": 0}``.
        processes: how many processes share every batch (DDP).

    Returns:
        what ``results.json`` holds. On processes other than the first, an empty dict.

    Raises:
        InputError: for a bad recipe, data or weights, an earlier run in the folder without ``resume``, or one of
            another recipe or with a damaged checkpoint.
    """
    plan = read_recipe(recipe, overrides or {})
    finished = _earlier_run(output, plan, resume)
    if finished is not None:
        return finished
    if plan.approximation is not None and processes > 1:
        raise InputError(f"{recipe}: approximates the model, which takes one process; leave --processes out")
    task = TASKS[plan.data.kind](plan, data)
    if weights is None and (plan.network.pretrained or plan.approximation is not None):
        raise InputError(f"{recipe}: starts from pre-trained weights; give them with --weights FILE.safetensors")
    output.mkdir(parents=True, exist_ok=True)
    lightning.seed_everything(plan.run.seed, workers=True, verbose=False)
    if plan.run.threads:
        torch.set_num_threads(plan.run.threads)
    model = build(plan.network.name, **plan.network.options)
    if weights is not None:
        load_weights(model, weights)
    start = time.time()
    before = evaluate(task, model) if weights is not None and plan.run.evaluate_start else {}
    model, approximated = _approximated(model, task, plan, output)
    # Before the training: what it refuses would otherwise come to light only after.
    pruner = builds.final_pruning(model, plan)
    trainee = _Trainee(model, task, plan)
    _fit(trainee, plan, output, processes)
    if not trainee.trainer.is_global_zero:
        return {}
    seconds = round(time.time() - start, 1)
    results = {
        "recipe": plan.table,
        "weights": weights.name if weights is not None else None,
        "seconds": seconds,
        "versions": {
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "python": platform.python_version(),
        },
        "baseline": task.baseline(),
        "before": before,
        **approximated,
        **_finish(trainee, pruner, output),
    }
    _save_weights(model, output / _WEIGHTS)
    _write_json(results, output / _RESULTS)
    for name in _UNFINISHED:
        (output / name).unlink(missing_ok=True)
    return results


_CHECKPOINT = "last.ckpt"
_LAYERS = "approximation.pt"
_UNFINISHED = (_CHECKPOINT, _LAYERS)
_WEIGHTS = "model.safetensors"
_FILE = "model.jsm"
_RESULTS = "results.json"


def _earlier_run(output: Path, plan: Recipe, resume: bool) -> dict[str, Any] | None:
    """The results of a run that has finished in this folder, None where there is none.

    Raises:
        InputError: there is a run, finished or not, that may not be resumed.
    """
    file = output / _RESULTS
    if not resume and file.exists():
        raise InputError(f"{file}: a finished run lies there; give another output folder, or remove it")
    for checkpoint in [] if resume else [output / name for name in _UNFINISHED]:
        if checkpoint.exists():
            raise InputError(f"{checkpoint}: an earlier run lies there; give --resume or another output folder")
    if not file.exists():
        return None
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        recipe = results["recipe"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: not the results of a run; give another output folder") from error
    if recipe != plan.table:
        raise InputError(f"{file}: of a finished run by another recipe; give another output folder")
    return dict(results)


def _approximated(model: nn.Module, task: Task, plan: Recipe, output: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The model with sums of parts for its layers, and figures; where the recipe does not ask for that, as it is."""
    table = plan.approximation
    if table is None:
        return model, {}
    made = approximate(
        model,
        builds.calibration(task, plan, -(-table.images // plan.data.batch)),
        table.ratio,
        budget=table.budget,
        units=table.units,
        loss=task.loss_name,
        exclude=table.exclude,
        positions=table.positions,
        iterations=table.iterations,
        seed=plan.run.seed,
        checkpoint=output / _LAYERS,
        progress=lambda line: print(f"approximating: {line}", flush=True),
    )
    # Weights held at zero are none.
    held = sum(int(part.held.sum()) for part in made.modules() if isinstance(part, HeldConv2d))
    weights = [sum(p.numel() for p in one.parameters() if p.dim() > 1) for one in (model, made)]
    weights[1] -= held
    figures = {"weights": weights[1], "ratio": round(weights[0] / weights[1], 3)}
    return made, {"approximation": figures, "approximated": evaluate(task, made)}


def _finish(trainee: _Trainee, pruner: JointSparsity | None, output: Path) -> dict[str, Any]:
    """Prune, quantise and write what the recipe asks for, and measure it."""
    model, task, plan = trainee.model, trainee.task, trainee.plan
    trainee.cpu()
    results = builds.measure_pruned(task, model, plan, pruner)
    if plan.quantisation is None:
        return results
    device = trainee.trainer.strategy.root_device
    # The tuner sums in float64, which not every accelerator has.
    trainee.to(device if device.type == "cuda" else "cpu")
    quantization = builds.quantise_and_tune(model, trainee.objective, pruner, task, plan)
    trainee.cpu()
    quantised = builds.measure_quantised(task, model, quantization, pruner)
    save(model, task.example(), output / _FILE, objective=pruner)
    info = inspect(output / _FILE)
    return results | {"quantised": quantised | {"file_bytes": info.file_bytes, "ratio": round(info.ratio, 3)}}


# --- training --------------------------------------------------------------------------------------------------------


class _Trainee(lightning.LightningModule):
    """The network, its loss and, where the recipe asks for it, the joint-sparsity objective."""

    def __init__(self, model: nn.Module, task: Task, plan: Recipe) -> None:
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.task = task
        self.plan = plan
        self.total = plan.run.epochs * task.steps()
        self.objective = self._objective()

    def _objective(self) -> JointSparsity | None:
        target = self.plan.sparsity
        if target is None:
            return None
        return JointSparsity(
            self.model,
            target.spatial,
            target.winograd,
            target.tile,
            weighted=target.weighted,
            alpha=target.alpha,
            floor=target.floor,
            speed=target.speed,
            ramp=round(target.ramp * self.total),
            exclude=target.exclude,
        )

    def configure_optimizers(self) -> Any:
        chosen = self.plan.optimiser
        kernels = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() <= 1]
        groups: list[dict[str, Any]] = [
            {"params": kernels, "weight_decay": chosen.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        if self.objective is not None:
            groups.append({"params": list(self.objective.parameters()), "weight_decay": 0.0})
        optimiser = torch.optim.AdamW(groups, lr=chosen.rate)
        rate = torch.optim.lr_scheduler.LambdaLR(optimiser, self._rate)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": rate, "interval": "step"}}

    def _rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine."""
        warm = max(1, round(self.plan.optimiser.warmup * self.total))
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.total - warm)))

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        batches = self.task.dataset(self.current_epoch, trainer.global_rank, trainer.world_size)
        return DataLoader(batches, batch_size=None, shuffle=False)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        inputs, target = batch
        loss = self.task.loss(self.model(inputs.contiguous(memory_format=torch.channels_last)), target)
        self.log("loss", loss, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True)
        if self.objective is None:
            return loss
        penalty = self.objective(loss)
        if index % 50 == 0:
            self.log_dict(self.objective.state(), on_step=False, on_epoch=True)
        return loss + penalty

    def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
        target = self.plan.sparsity
        if self.objective is None or target is None or not builds.holds(target):
            return
        if self.global_step == max(1, round((1 - target.hold) * self.total)):
            self.objective.prune_("spatial")
        self.objective.hold_()


def _fit(trainee: _Trainee, plan: Recipe, output: Path, processes: int) -> None:
    """Train, from the checkpoint where there is one."""
    terminal = sys.stdout.isatty()
    checkpoint = output / _CHECKPOINT

    def measure() -> Metrics:
        return evaluate(trainee.task, trainee.model)

    callbacks: list[Callback] = [
        ModelCheckpoint(output, filename=checkpoint.stem, save_top_k=1, enable_version_counter=False, every_n_epochs=1),
        Lines(output / "history.csv", plan.run.evaluate_every, measure, plain=not terminal),
    ]
    if terminal:
        callbacks.append(TQDMProgressBar(refresh_rate=5))
    trainer = lightning.Trainer(
        accelerator="auto",
        devices=processes,
        strategy=DDPStrategy() if processes > 1 else "auto",
        max_epochs=plan.run.epochs,
        precision="bf16-mixed" if plan.run.precision == "bf16" else "32-true",
        gradient_clip_val=plan.optimiser.clip or None,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=terminal,
        enable_model_summary=False,
        use_distributed_sampler=False,
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
    )
    found = checkpoint.exists()
    if found:
        _check_checkpoint(trainee, checkpoint)
    trainer.fit(trainee, ckpt_path=checkpoint if found else None)


def _check_checkpoint(trainee: _Trainee, path: Path) -> None:
    """Read a checkpoint before Lightning does, whose complaints are pages long."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    # Not a zip, cut off, no pickle, no such key: each raises an error of its own.
    except Exception as error:
        raise InputError(f"{path}: damaged, cannot be resumed; remove it to train anew") from error
    try:
        trainee.load_state_dict(state)
    except (RuntimeError, KeyError) as error:
        detail = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: of another recipe ({detail}); give the recipe of that run") from error


# --- files -----------------------------------------------------------------------------------------------------------


def _save_weights(model: nn.Module, path: Path) -> None:
    from safetensors.torch import save

    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    with replacing(path) as scratch:
        scratch.write_bytes(save(state))  # its save_file would make a file that only its owner can read


def _write_json(results: Mapping[str, Any], path: Path) -> None:
    with replacing(path) as scratch:
        scratch.write_text(json.dumps(results, indent=1) + "\n")
