"""Recipes and the trainer: whole runs on tiny data, exact resume, several processes, errors in one line."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from jointsparse.frontends import training
from jointsparse.frontends.errors import InputError
from jointsparse.frontends.networks import build
from jointsparse.frontends.recipe import read_recipe
from jointsparse.frontends.training import train

SUPER_RESOLUTION = """
[run]
epochs = 3
seed = 4
threads = 1
[network]
name = "vdsr"
options = { depth = 3, width = 8 }
[data]
kind = "super-resolution"
train = "photos"
test = ["photos"]
scale = 2
patch = 16
batch = 4
steps = 12
[optimiser]
rate = 2e-3
[sparsity]
alpha = 20.0
ramp = 0.3
hold = 0.3
prune_spatial = 0.6
prune_winograd = 0.6
spatial = 0.6
winograd = 0.6
"""

CLASSIFICATION = """
[run]
epochs = 2
precision = "bf16"
threads = 1
[network]
name = "resnet20"
options = { width = 4, classes = 2 }
[data]
kind = "classification"
train = "train"
test = ["test"]
batch = 8
[optimiser]
rate = 5e-3
weight_decay = 1e-4
clip = 1.0
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smooth pictures for super-resolution; bright and dark ones to tell apart."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    (root / "photos").mkdir()
    for i in range(3):
        y, x = np.mgrid[0:40, 0:44] / 40
        wave = np.sin(rng.uniform(4, 25) * x + rng.uniform(4, 25) * y)
        Image.fromarray((127 + 100 * wave).astype(np.uint8)).save(root / "photos" / f"{i}.png")
    for split, count in (("train", 20), ("test", 10)):
        for label, level in (("bright", 170), ("dark", 60)):
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(level - 50, level + 50, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def history(output: Path) -> list[dict[str, str]]:
    with (output / "history.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_sparse_run_from_recipe_to_results(tmp_path: Path, data: Path) -> None:
    recipe = write(tmp_path / "recipe.toml", SUPER_RESOLUTION)
    weights = tmp_path / "start.safetensors"
    torch.manual_seed(0)
    save_file(build("vdsr", depth=3, width=8).state_dict(), weights)
    results = train(recipe, data, tmp_path / "out", weights=weights)
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    assert {"baseline", "before", "spatial", "winograd"} <= set(results)
    assert "winograd_only" not in results, "the weights were pruned spatially during training"
    assert all(20 < results[build]["photos"] < 60 for build in ("baseline", "before", "spatial", "winograd"))
    assert results["recipe"]["run"]["seed"] == 4
    state = load_file(tmp_path / "out" / "model.safetensors")
    kernels = [v for k, v in state.items() if k.endswith("weight")]
    zeros = sum(int((w == 0).sum()) for w in kernels) / sum(w.numel() for w in kernels)
    assert 0.6 <= zeros < 0.62
    assert set(results["winograd_spec"]) == {"conv0.weight", "conv1.weight", "conv2.weight"}
    names = {"model.safetensors", "results.json", "last.ckpt", "history.csv"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


def test_winograd_alone_is_measured_before_spatial_pruning(tmp_path: Path, data: Path) -> None:
    """Without spatial weights held at zero, pruning nothing in the Winograd domain leaves the trained model."""
    recipe = write(tmp_path / "recipe.toml", SUPER_RESOLUTION)
    overrides = {"sparsity.hold": 0.0, "sparsity.prune_winograd": 0.0, "run.evaluate_every": 3}
    results = train(recipe, data, tmp_path / "out", overrides=overrides)
    trained = float(history(tmp_path / "out")[-1]["photos"])
    assert results["winograd_only"]["photos"] == pytest.approx(trained, abs=1e-3)
    assert results["spatial"]["photos"] != pytest.approx(trained, abs=1e-3)


def test_a_killed_run_resumes_exactly(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write(tmp_path / "recipe.toml", SUPER_RESOLUTION)
    train(recipe, data, tmp_path / "whole")

    class Killed(Exception):
        pass

    step = training._Trainee.training_step

    def dies(self: training._Trainee, batch: object, index: int) -> torch.Tensor:
        if self.current_epoch == 2 and index == 5:
            raise Killed
        return step(self, batch, index)

    monkeypatch.setattr(training._Trainee, "training_step", dies)
    with pytest.raises(Killed):
        train(recipe, data, tmp_path / "parts")
    monkeypatch.undo()
    with pytest.raises(InputError, match="--resume"):
        train(recipe, tmp_path / "no data are read", tmp_path / "parts")
    train(recipe, data, tmp_path / "parts", resume=True)
    assert [row["epoch"] for row in history(tmp_path / "parts")] == ["1", "2", "3"]
    whole, parts = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_checkpoints_that_cannot_be_resumed_are_refused_in_one_line(tmp_path: Path, data: Path) -> None:
    recipe = write(tmp_path / "recipe.toml", CLASSIFICATION)
    output = tmp_path / "out"
    train(recipe, data, output, overrides={"run.epochs": 1})
    checkpoint = output / "last.ckpt"
    whole = checkpoint.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"hello"):
        checkpoint.write_bytes(damaged)
        with pytest.raises(InputError, match=r"last\.ckpt: damaged") as caught:
            train(recipe, data, output, resume=True)
        assert "\n" not in str(caught.value)
    checkpoint.write_bytes(whole)
    with pytest.raises(InputError, match="another recipe") as caught:
        train(recipe, data, output, resume=True, overrides={"network.options": {"width": 8, "classes": 2}})
    assert "\n" not in str(caught.value)


def test_a_dense_classification_run_learns(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write(tmp_path / "recipe.toml", CLASSIFICATION)
    results = train(recipe, data, tmp_path / "out", overrides={"run.epochs": 8, "run.evaluate_every": 4})
    assert results["dense"]["test"] >= 90
    assert results["recipe"]["run"]["epochs"] == 8
    rows = history(tmp_path / "out")
    assert [row["epoch"] for row in rows] == [str(n) for n in range(1, 9)]
    assert [bool(row["test"]) for row in rows] == [n % 4 == 0 for n in range(1, 9)]
    assert all(float(row["loss"]) > 0 and float(row["seconds"]) > 0 for row in rows)
    assert "epoch 8" in capsys.readouterr().out, "plain lines where there is no terminal"


def test_two_processes_share_every_batch(tmp_path: Path, data: Path) -> None:
    """The same weights as one process would make, up to rounding: the batch is shared out, not doubled."""
    recipe = write(tmp_path / "recipe.toml", SUPER_RESOLUTION.replace("epochs = 3", "epochs = 1"))
    train(recipe, data, tmp_path / "one")
    program = write(
        tmp_path / "program.py",  # Lightning starts the second process by running the program again.
        "import sys; from pathlib import Path; from jointsparse.frontends.training import train\n"
        "r, d, o = map(Path, sys.argv[1:]); train(r, d, o, processes=2)",
    )
    subprocess.run([sys.executable, program, recipe, data, tmp_path / "two"], check=True, timeout=300)
    one, two = (load_file(tmp_path / run / "model.safetensors") for run in ("one", "two"))
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=0.05, atol=2e-3)


def test_shipped_recipes_are_sound() -> None:
    folder = Path(training.__file__).parent / "recipes"
    recipes = {path.stem: read_recipe(path) for path in folder.glob("*.toml")}
    assert {"ct_srcnn_x3", "vdsr_x3_joint", "resnet20_dense", "resnet20_joint"} <= set(recipes)
    for recipe in recipes.values():
        build(recipe.network.name, **recipe.network.options)
    ablation = read_recipe(folder / "vdsr_x3_joint.toml", {"sparsity.winograd": 0})
    assert ablation.sparsity is not None
    assert (ablation.sparsity.spatial, ablation.sparsity.winograd) == (0.8, 0)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("rate = 2e-3", "rates = 2e-3", "optimiser.rates"),
        ("epochs = 3", "", "run.epochs is missing"),
        ("epochs = 3", 'epochs = "many"', "run.epochs must be a int"),
        ("epochs = 3", "epochs = 0", "greater than 0"),
        ("epochs = 3", "epochs = true", "run.epochs"),
        ('test = ["photos"]', "test = [3]", "data.test"),
        ('kind = "super-resolution"', 'kind = "detection"', "classification"),
        ("[optimiser]", "[optimizer]", r"\[optimizer\]"),
        ("ramp = 0.3", "ramp = 1.5", "share"),
        ("spatial = 0.6", "spatial = 1", "below 1"),
        ("[run]", "[run", "not a TOML file"),
        ('name = "vdsr"', 'name = "vgg"', "unknown network"),
        ("patch = 16", "patch = 64", "smaller patch"),
        ('train = "photos"', 'train = "elsewhere"', "elsewhere: no such folder"),
        ("options = ", "pretrained = true\noptions = ", "--weights"),
    ],
)
def test_bad_recipes_are_refused_in_one_line(tmp_path: Path, data: Path, old: str, new: str, words: str) -> None:
    assert old in SUPER_RESOLUTION
    recipe = write(tmp_path / "recipe.toml", SUPER_RESOLUTION.replace(old, new, 1))
    with pytest.raises(InputError, match=words) as caught:
        train(recipe, data, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_bad_overrides_are_refused(tmp_path: Path) -> None:
    recipe = write(tmp_path / "recipe.toml", CLASSIFICATION)
    for name in ("epochs", "sparsity.spatial", "run.epoch"):
        with pytest.raises(InputError, match=name):
            read_recipe(recipe, {name: 1})
    with pytest.raises(InputError, match="cannot read"):
        read_recipe(tmp_path / "nowhere.toml")


def test_a_removed_output_folder_is_made_anew(tmp_path: Path, data: Path) -> None:
    recipe = write(tmp_path / "recipe.toml", CLASSIFICATION)
    output = tmp_path / "deep" / "out"
    train(recipe, data, output, overrides={"run.epochs": 1})
    shutil.rmtree(output)
    assert train(recipe, data, output, overrides={"run.epochs": 1})["dense"]
