"""What the trainer can train for: super-resolution and classification, each with its data, loss and figures."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import data as datasets
from .losses import LOSSES, evaluating
from .recipe import Recipe

__all__ = ["TASKS", "Metrics", "Task", "evaluate"]

Metrics = dict[str, float]


class SuperResolution:
    """Mean square error in training, mean PSNR in dB per test folder (and of bicubic enlargement as baseline)."""

    loss_name = "mse"

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

    def example(self) -> Tensor:
        """The first test image."""
        low = next(iter(self.test_pairs.values()))[0].low
        return torch.from_numpy(low)[None, None]

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return LOSSES[self.loss_name](prediction, target)

    def evaluate(self, model: nn.Module) -> Metrics:
        return {name: self._psnr(model, pairs) for name, pairs in self.test_pairs.items()}

    def baseline(self) -> Metrics:
        return {name: self._psnr(nn.Identity(), pairs) for name, pairs in self.test_pairs.items()}

    def _psnr(self, model: nn.Module, pairs: list[datasets.Pair]) -> float:
        device = _device(model)

        def enlarge(pair: datasets.Pair) -> np.ndarray:
            return model(torch.from_numpy(pair.low)[None, None].to(device)).float()[0, 0].cpu().numpy()

        return round(float(np.mean([datasets.psnr(enlarge(p), p.high, self.spec.scale) for p in pairs])), 4)


class Classification:
    """Cross-entropy in training, accuracy in per cent on the test split."""

    loss_name = "cross-entropy"

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

    def example(self) -> Tensor:
        """The first test image."""
        images, _ = datasets.LabelledBatches(next(iter(self.test_data.values())), batch=1, augment=False)[0]
        return images

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return LOSSES[self.loss_name](prediction, target)

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


Task = SuperResolution | Classification
TASKS: dict[str, type[SuperResolution] | type[Classification]] = {
    "super-resolution": SuperResolution,
    "classification": Classification,
}


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@torch.inference_mode()
def evaluate(task: Task, model: nn.Module) -> Metrics:
    """The task's figures on its test data, in evaluation mode."""
    with evaluating(model):
        return task.evaluate(model)
