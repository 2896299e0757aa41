"""Codebook fine-tuning by a recipe: it learns, and the objective keeps the Winograd domain sparse meanwhile."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from jointsparse.frontends import builds
from jointsparse.frontends.joint_sparsity import JointSparsity
from jointsparse.frontends.networks import build
from jointsparse.frontends.recipe import Recipe, read_recipe
from jointsparse.frontends.tasks import TASKS, Task

RECIPE = """
[run]
epochs = 1
[network]
name = "resnet20"
options = { width = 4, classes = 2 }
[data]
kind = "classification"
train = "train"
test = ["train"]
batch = 20
[optimiser]
rate = 1e-3
[quantisation]
bits = 4
"""


@pytest.fixture
def task(tmp_path: Path) -> tuple[Recipe, Task]:
    rng = np.random.default_rng(0)
    for label, level in (("bright", 140), ("dark", 110)):
        folder = tmp_path / "train" / label
        folder.mkdir(parents=True)
        for i in range(20):
            Image.fromarray(rng.integers(level - 90, level + 90, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (tmp_path / "recipe.toml").write_text(RECIPE)
    plan = read_recipe(tmp_path / "recipe.toml")
    return plan, TASKS[plan.data.kind](plan, tmp_path)


def _pruned() -> tuple[nn.Module, JointSparsity]:
    torch.manual_seed(0)
    model = build("resnet20", width=4, classes=2)
    objective = JointSparsity(model, 0.5, 0.5, alpha=30.0)
    objective.prune_("spatial")
    return model, objective


@torch.no_grad()
def _loss(model: nn.Module, task: Task) -> float:
    """With the batch's own statistics, so that BatchNorm's running ones take no part."""
    model.train()
    batches: Any = task.dataset(0, 0, 1)
    return float(np.mean([float(task.loss(model(batches[i][0]), batches[i][1])) for i in range(task.steps())]))


def test_tuning_moves_the_codes_values_only_and_lowers_the_loss(task: tuple[Recipe, Task]) -> None:
    plan, data = task
    model, _ = _pruned()
    before = {key: value.clone() for key, value in model.named_parameters()}
    coarse = builds.quantise_and_tune(model, None, None, data, _tuning(plan, steps=0, rate=0.1))
    loss = _loss(model, data)
    model, _ = _pruned()
    tuned = builds.quantise_and_tune(model, None, None, data, _tuning(plan, steps=60, rate=0.1))
    assert _loss(model, data) < 0.9 * loss
    for name, layer in tuned.layers.items():
        np.testing.assert_array_equal(layer.codes, coarse.layers[name].codes)
        np.testing.assert_array_equal(model.get_submodule(name).weight.detach().numpy(), layer.dequantize())
    for key, value in model.named_parameters():
        if key.removesuffix(".weight") not in tuned.layers:
            assert torch.equal(value, before[key])
        assert not value[before[key] == 0].any() or value.dim() < 2
        assert value.grad is None


def test_tuning_keeps_the_objective_on(task: tuple[Recipe, Task]) -> None:
    plan, data = task
    shares = []
    for regularised in (True, False):
        model, objective = _pruned()
        tuning = _tuning(plan, steps=30, rate=0.02)
        builds.quantise_and_tune(model, objective if regularised else None, None, data, tuning)
        objective.update_thresholds()
        shares.append(float(objective.regularisers()["winograd"].detach()))
    assert shares[0] < 0.9 * shares[1]


def _tuning(plan: Recipe, steps: int, rate: float) -> Recipe:
    assert plan.quantisation is not None
    return replace(plan, quantisation=replace(plan.quantisation, tuning_steps=steps, rate=rate))
