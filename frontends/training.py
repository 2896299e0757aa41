"""The project's own trainer: a recipe, data and an output folder give trained weights and measured results.

It stands on Lightning (checkpoints, resume, several processes). Whoever has a training loop needs none of it:
``JointSparsity`` works in any. A run leaves in its output folder ``model.safetensors`` (the weights; spatially pruned
where the recipe asks for sparsity), ``results.json`` (figures, recipe, seed, versions), ``last.ckpt`` while it runs,
and ``history.csv`` (a header, then one line an epoch).
"""

from __future__ import annotations

import copy
import csv
import json
import math
import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from . import data as datasets
from .errors import InputError
from .joint_sparsity import JointSparsity
from .networks import build
from .outputs import replacing
from .recipe import Recipe, SparsityTable, read_recipe
from .state_dicts import load_weights
from .winograd_inference import winograd_pruned

__all__ = ["train"]

Metrics = dict[str, float]


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
        resume: go on from ``output/last.ckpt`` if there is one.
        weights: to start from, as ``state_dicts.load_weights`` reads them; required where the recipe says
            ``pretrained = true``.
        overrides: recipe values to change, ``{"sparsity.spatial": 0}``.
        processes: how many processes share every batch (DDP).

    Returns:
        what ``results.json`` holds. On processes other than the first, an empty dict.

    Raises:
        InputError: for a bad recipe, data or weights, a checkpoint without ``resume``, or one that is damaged or of
            another recipe.
    """
    plan = read_recipe(recipe, overrides or {})
    checkpoint = output / "last.ckpt"
    if checkpoint.exists() and not resume:
        raise InputError(f"{checkpoint}: an earlier run lies there; give --resume or another output folder")
    task = _TASKS[plan.data.kind](plan, data)
    if weights is None and plan.network.pretrained:
        raise InputError(f"{recipe}: starts from pre-trained weights; give them with --weights FILE.safetensors")
    output.mkdir(parents=True, exist_ok=True)
    lightning.seed_everything(plan.run.seed, workers=True, verbose=False)
    if plan.run.threads:
        torch.set_num_threads(plan.run.threads)
    model = build(plan.network.name, **plan.network.options)
    if weights is not None:
        load_weights(model, weights)
    start = time.time()
    before = _evaluate(task, model) if weights is not None and plan.run.evaluate_start else {}
    trainee = _Trainee(model, task, plan)
    _fit(trainee, plan, checkpoint, processes)
    if not trainee.trainer.is_global_zero:
        return {}
    results = {
        "recipe": plan.table,
        "weights": weights.name if weights is not None else None,
        "seconds": round(time.time() - start, 1),
        "versions": {
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "python": platform.python_version(),
        },
        "baseline": task.baseline(),
        "before": before,
        **_measure_builds(task, model, plan),
    }
    _save_weights(model, output / "model.safetensors")
    _write_json(results, output / "results.json")
    return results


# --- tasks: what differs between super-resolution and classification -------------------------------------------------


class _SuperResolution:
    """Mean square error in training, mean PSNR in dB per test folder (and of bicubic enlargement as baseline)."""

    def __init__(self, plan: Recipe, root: Path) -> None:
        self.spec = plan.data
        self.seed = plan.run.seed
        self.train_pairs = datasets.read_pairs(root / self.spec.train, self.spec.scale)
        self.test_pairs = {name: datasets.read_pairs(root / name, self.spec.scale) for name in self.spec.test}
        self.batches: datasets.PatchBatches | None = None

    def dataset(self, epoch: int, rank: int, world: int) -> Any:
        if self.batches is None:
            self.batches = datasets.PatchBatches(
                self.train_pairs,
                scale=self.spec.scale,
                patch=self.spec.patch,
                batch=self.spec.batch,
                length=self.spec.steps,
                seed=self.seed,
                shrink=tuple(self.spec.shrink),
            )
        batches = copy.copy(self.batches)
        batches.epoch, batches.rank, batches.world = epoch, rank, world
        return batches

    def steps(self) -> int:
        return self.spec.steps

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(prediction.float(), target)

    def evaluate(self, model: nn.Module) -> Metrics:
        return {name: self._psnr(model, pairs) for name, pairs in self.test_pairs.items()}

    def baseline(self) -> Metrics:
        return {name: self._psnr(nn.Identity(), pairs) for name, pairs in self.test_pairs.items()}

    def _psnr(self, model: nn.Module, pairs: list[datasets.Pair]) -> float:
        device = _device(model)

        def enlarge(pair: datasets.Pair) -> np.ndarray:
            return model(torch.from_numpy(pair.low)[None, None].to(device)).float()[0, 0].cpu().numpy()

        return round(float(np.mean([datasets.psnr(enlarge(p), p.high, self.spec.scale) for p in pairs])), 4)


class _Classification:
    """Cross-entropy in training, accuracy in per cent on the test split."""

    def __init__(self, plan: Recipe, root: Path) -> None:
        self.spec = plan.data
        self.seed = plan.run.seed
        self.train_data = datasets.read_labelled(root, self.spec.train)
        self.test_data = {name: datasets.read_labelled(root, name) for name in self.spec.test}

    def dataset(self, epoch: int, rank: int, world: int) -> Any:
        return datasets.LabelledBatches(
            self.train_data,
            batch=self.spec.batch,
            augment=True,
            seed=self.seed,
            epoch=epoch,
            rank=rank,
            world=world,
        )

    def steps(self) -> int:
        return len(self.train_data.labels) // self.spec.batch

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(prediction.float(), target)

    def evaluate(self, model: nn.Module) -> Metrics:
        return {name: self._accuracy(model, split) for name, split in self.test_data.items()}

    def baseline(self) -> Metrics:
        return {}

    def _accuracy(self, model: nn.Module, split: datasets.Labelled) -> float:
        device = _device(model)
        batches = datasets.LabelledBatches(split, batch=500, augment=False)
        pairs = (batches[i] for i in range(len(batches)))
        right = sum(int((model(x.to(device)).argmax(1).cpu() == y).sum()) for x, y in pairs)
        return round(100 * right / len(split.labels), 4)


_Task = _SuperResolution | _Classification
_TASKS: dict[str, type[_SuperResolution] | type[_Classification]] = {
    "super-resolution": _SuperResolution,
    "classification": _Classification,
}


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@torch.inference_mode()
def _evaluate(task: _Task, model: nn.Module) -> Metrics:
    training = model.training
    model.eval()
    try:
        return task.evaluate(model)
    finally:
        model.train(training)


def _measure_builds(task: _Task, model: nn.Module, plan: Recipe) -> dict[str, Any]:
    """Prune as the recipe says (in place) and measure each build from these weights.

    ``spatial``: spatially pruned weights. ``winograd``: those weights, as the file stores them, pruned in the Winograd
    domain as well. ``winograd_only``: the weights before spatial pruning, pruned in the Winograd domain alone; not
    measured where training has pruned them spatially and held them so.
    """
    model.cpu()
    if plan.sparsity is None:
        return {"dense": _evaluate(task, model)}
    target = plan.sparsity
    pruner = JointSparsity(model, target.prune_spatial, target.prune_winograd, target.tile, weighted=target.weighted)
    results: dict[str, Any] = {}
    if not _holds(target):
        with winograd_pruned(model, pruner.winograd_spec()):
            results["winograd_only"] = _evaluate(task, model)
    results["spatial_sparsity"] = pruner.prune_("spatial")
    results["spatial"] = _evaluate(task, model)
    results["winograd_sparsity"] = pruner.prune_("winograd")
    results["winograd_spec"] = pruner.winograd_spec()
    with winograd_pruned(model, results["winograd_spec"]):
        results["winograd"] = _evaluate(task, model)
    return results


def _holds(target: SparsityTable) -> bool:
    """Whether training ends with steps for which spatially pruned weights stay zero."""
    return target.spatial > 0 and target.hold > 0


# --- training --------------------------------------------------------------------------------------------------------


class _Trainee(lightning.LightningModule):
    """The network, its loss and, where the recipe asks for it, the joint-sparsity objective."""

    def __init__(self, model: nn.Module, task: _Task, plan: Recipe) -> None:
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
        if self.objective is None or target is None or not _holds(target):
            return
        if self.global_step == max(1, round((1 - target.hold) * self.total)):
            self.objective.prune_("spatial")
        self.objective.hold_()


class _Lines(Callback):
    """One line an epoch: to ``history.csv`` and, where no terminal shows a progress bar, to standard output."""

    def __init__(self, file: Path, every: int, plain: bool) -> None:
        self.file, self.every, self.plain = file, every, plain
        self.start = time.time()

    def on_train_epoch_end(self, trainer: lightning.Trainer, trainee: lightning.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        line: dict[str, Any] = {"epoch": epoch, "seconds": round(time.time() - self.start, 1)}
        line |= {k: float(f"{float(v):.5g}") for k, v in trainer.callback_metrics.items()}
        if self.every and epoch % self.every == 0 and trainer.is_global_zero:
            assert isinstance(trainee, _Trainee)
            measured = _evaluate(trainee.task, trainee.model)
            line |= measured
        if not trainer.is_global_zero:
            return
        self._record(line)
        if self.plain:
            print("  ".join(f"{k} {v}" for k, v in line.items()), flush=True)

    def _record(self, line: dict[str, Any]) -> None:
        """Add a row to the file, and columns for figures new to it, which some epochs have and others have not."""
        rows = [*_earlier_rows(self.file, line["epoch"]), line]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with replacing(self.file) as scratch, scratch.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            writer.writerows(rows)


def _earlier_rows(file: Path, epoch: int) -> list[dict[str, Any]]:
    """The rows of the epochs before ``epoch``: a resumed run writes its own in place of those after its checkpoint."""
    if not file.exists():
        return []
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream, restkey="", restval=""))
    return [row for row in rows if row.get("epoch", "").isdigit() and int(row["epoch"]) < epoch]


def _fit(trainee: _Trainee, plan: Recipe, checkpoint: Path, processes: int) -> None:
    """Train, from the checkpoint where there is one."""
    terminal = sys.stdout.isatty()
    output = checkpoint.parent
    callbacks: list[Callback] = [
        ModelCheckpoint(output, filename="last", save_top_k=1, enable_version_counter=False, every_n_epochs=1),
        _Lines(output / "history.csv", plan.run.evaluate_every, plain=not terminal),
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
    from safetensors.torch import save_file

    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    with replacing(path) as scratch:
        save_file(state, scratch)


def _write_json(results: Mapping[str, Any], path: Path) -> None:
    with replacing(path) as scratch:
        scratch.write_text(json.dumps(results, indent=1) + "\n")
