"""Recipes and the trainer: whole runs on tiny data, exact resume, several processes, errors in one line."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import numpy_helper
from PIL import Image
from safetensors.torch import load_file, save_file

from jointsparse.frontends import inspect, training
from jointsparse.frontends.errors import InputError
from jointsparse.frontends.model_file import read_model
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
    names = {"model.safetensors", "results.json", "history.csv"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


@pytest.mark.parametrize("tuning_steps", [0, 8])
def test_a_quantised_run_ends_in_one_file(tmp_path: Path, data: Path, tuning_steps: int) -> None:
    """The file holds the weights of model.safetensors, few values in all, and is measured as it is."""
    table = f"[quantisation]\nbits = 5\ntuning_steps = {tuning_steps}\n"
    output = tmp_path / "out"
    results = train(write(tmp_path / "recipe.toml", SUPER_RESOLUTION + table), data, output)
    assert results == json.loads((output / "results.json").read_text())
    quantised = results["quantised"]
    assert {"spatial", "winograd", "winograd_spec", "entropy"} <= set(quantised)
    assert 2 < quantised["levels"] <= 31
    assert quantised["file_bytes"] == (output / "model.jsm").stat().st_size
    weights = {t.name: numpy_helper.to_array(t) for t in read_model(output / "model.jsm").graph.initializer}
    state = load_file(output / "model.safetensors")
    kernels = [key for key in state if key.endswith("weight")]
    for key in state:
        np.testing.assert_array_equal(weights[key], state[key].numpy())
    values = np.unique(np.concatenate([weights[key].ravel() for key in kernels]))
    assert len(values) == quantised["levels"]
    multiples = np.isin(values, (np.rint(values / quantised["step"]) * quantised["step"]).astype(np.float32))
    assert multiples.all() == (tuning_steps == 0), "fine-tuning moves the values of the codes"
    zeros = sum(int((weights[key] == 0).sum()) for key in kernels) / sum(weights[key].size for key in kernels)
    assert zeros >= 0.6
    info = inspect(output / "model.jsm")
    assert info.spatial_sparsity == pytest.approx(zeros)
    assert info.winograd_sparsity is not None
    assert info.winograd_sparsity >= 0.6


@pytest.mark.parametrize(("recipe", "loss"), [(SUPER_RESOLUTION, "photos"), (CLASSIFICATION, "test")])
def test_a_run_quantised_within_an_increase_of_the_loss(tmp_path: Path, data: Path, recipe: str, loss: str) -> None:
    table = "[quantisation]\nincrease = 1e-3\ncalibration = 2\n"
    output = tmp_path / "out"
    quantised = train(write(tmp_path / "recipe.toml", recipe + table), data, output)["quantised"]
    assert quantised["step"] is None
    assert len(set(quantised["steps"].values())) > 1
    assert loss in quantised.get("spatial", quantised.get("dense"))
    weights = {t.name: numpy_helper.to_array(t) for t in read_model(output / "model.jsm").graph.initializer}
    for name, value in load_file(output / "model.safetensors").items():
        if recipe == SUPER_RESOLUTION:
            np.testing.assert_array_equal(weights[name], value.numpy())


def test_a_step_for_all_and_an_increase_of_the_loss_contradict_each_other(tmp_path: Path, data: Path) -> None:
    for values, message in [
        ("increase = 1e-3\nbits = 7", "bits is for one step"),
        ("calibration = 3", "goes with quantisation.increase"),
        ("increase = inf", "increase of the loss inf"),
    ]:
        recipe = write(tmp_path / "recipe.toml", f"{CLASSIFICATION}[quantisation]\n{values}\n")
        with pytest.raises(InputError, match=message):
            train(recipe, data, tmp_path / "out")


def test_a_dense_classifier_is_quantised_with_dither(tmp_path: Path, data: Path) -> None:
    table = "[quantisation]\nstep = 0.02\ndither = true\ntuning_steps = 3\n"
    recipe = write(tmp_path / "recipe.toml", CLASSIFICATION + table)
    results = train(recipe, data, tmp_path / "out", overrides={"run.epochs": 4})
    assert results["quantised"]["step"] == pytest.approx(0.02)
    assert 0 <= results["quantised"]["dense"]["test"] <= 100
    info = inspect(tmp_path / "out" / "model.jsm")
    assert all(layer.dithered for layer in info.layers)
    assert info.winograd_sparsity is None


def test_a_finished_run_is_never_overwritten(tmp_path: Path, data: Path) -> None:
    recipe = write(tmp_path / "recipe.toml", CLASSIFICATION)
    output = tmp_path / "out"
    results = train(recipe, data, output, overrides={"run.epochs": 1})
    weights = (output / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="a finished run lies there"):
        train(recipe, data, output, overrides={"run.epochs": 1})
    with pytest.raises(InputError, match="another recipe"):
        train(recipe, data, output, resume=True)
    assert train(recipe, tmp_path / "no data are read", output, resume=True, overrides={"run.epochs": 1}) == results
    assert (output / "model.safetensors").read_bytes() == weights
    (output / "results.json").write_text("[1]")
    with pytest.raises(InputError, match="not the results of a run"):
        train(recipe, data, output, resume=True)


def test_winograd_alone_is_measured_before_spatial_pruning(tmp_path: Path, data: Path) -> None:
    """Without spatial weights held at zero, pruning nothing in the Winograd domain leaves the trained model."""
    recipe = write(tmp_path / "recipe.toml", SUPER_RESOLUTION)
    overrides = {"sparsity.hold": 0.0, "sparsity.prune_winograd": 0.0, "run.evaluate_every": 3}
    results = train(recipe, data, tmp_path / "out", overrides=overrides)
    trained = float(history(tmp_path / "out")[-1]["photos"])
    assert results["winograd_only"]["photos"] == pytest.approx(trained, abs=1e-3)
    assert results["spatial"]["photos"] != pytest.approx(trained, abs=1e-3)


class Killed(Exception):
    pass


def kill(monkeypatch: pytest.MonkeyPatch, recipe: Path, data: Path, output: Path, epoch: int, step: int) -> None:
    """Train until the given step."""
    whole_step = training._Trainee.training_step

    def dies(self: training._Trainee, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
        if self.current_epoch == epoch and index == step:
            raise Killed
        return whole_step(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(training._Trainee, "training_step", dies)
        with pytest.raises(Killed):
            train(recipe, data, output)


def test_a_killed_run_resumes_exactly(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write(tmp_path / "recipe.toml", SUPER_RESOLUTION)
    train(recipe, data, tmp_path / "whole")
    kill(monkeypatch, recipe, data, tmp_path / "parts", epoch=2, step=5)
    with pytest.raises(InputError, match="--resume"):
        train(recipe, tmp_path / "no data are read", tmp_path / "parts")
    train(recipe, data, tmp_path / "parts", resume=True)
    assert [row["epoch"] for row in history(tmp_path / "parts")] == ["1", "2", "3"]
    whole, parts = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_checkpoints_that_cannot_be_resumed_are_refused_in_one_line(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write(tmp_path / "recipe.toml", CLASSIFICATION)
    output = tmp_path / "out"
    kill(monkeypatch, recipe, data, output, epoch=1, step=0)
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
    assert all(float(row["loss"]) > 0 for row in rows)
    seconds = [float(row["seconds"]) for row in rows]  # since the run began, in tenths
    assert seconds == sorted(seconds)
    assert seconds[-1] > 0
    assert "epoch 8" in capsys.readouterr().out, "plain lines where there is no terminal"


APPROXIMATION = """
[approximation]
ratio = 2.0
images = 32
positions = 200
iterations = 5
[quantisation]
increase = 1e-2
calibration = 2
"""


def test_an_approximated_run_ends_in_one_file(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = write(tmp_path / "dense.toml", CLASSIFICATION)
    train(dense, data, tmp_path / "dense")
    text = CLASSIFICATION + APPROXIMATION
    recipe, start = write(tmp_path / "recipe.toml", text), tmp_path / "dense" / "model.safetensors"
    results = train(recipe, data, tmp_path / "out", weights=start)
    assert results["approximation"]["ratio"] == pytest.approx(2, abs=0.1)
    assert set(results["approximated"]) == {"test"}
    assert inspect(tmp_path / "out" / "model.jsm").file_bytes == results["quantised"]["file_bytes"]
    assert not list((tmp_path / "out").glob("*.pt"))

    # Killed when two layers are done: they are not made again.
    capsys.readouterr()
    module = sys.modules["jointsparse.frontends.approximation.approximate"]
    fit = module.fit

    def dies(original: Any, result: Any, name: str, *rest: Any, **options: Any) -> Any:
        if name == "layer3.1.conv1":
            raise Killed
        return fit(original, result, name, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, "fit", dies)
        with pytest.raises(Killed):
            train(recipe, data, tmp_path / "parts", weights=start)
    with pytest.raises(InputError, match=r"approximation\.pt.*--resume"):
        train(recipe, data, tmp_path / "parts", weights=start)
    done = capsys.readouterr().out
    train(recipe, data, tmp_path / "parts", resume=True, weights=start)
    again = [line for line in capsys.readouterr().out.splitlines() if "approximating" in line]
    assert not {line for line in done.splitlines() if "weights; error" in line} & set(again)
    whole, parts = (load_file(tmp_path / run / "model.safetensors") for run in ("out", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_an_approximation_takes_one_process(tmp_path: Path, data: Path) -> None:
    text = CLASSIFICATION + APPROXIMATION
    model = build("resnet20", width=4, classes=2)
    save_file(model.state_dict(), tmp_path / "start.safetensors")
    with pytest.raises(InputError, match="one process"):
        train(
            write(tmp_path / "recipe.toml", text),
            data,
            tmp_path / "out",
            weights=tmp_path / "start.safetensors",
            processes=2,
        )


def test_two_processes_share_every_batch(tmp_path: Path, data: Path) -> None:
    """The same weights as one process would make, up to rounding: the batch is shared out, not doubled."""
    table = "[quantisation]\nbits = 12\ntuning_steps = 2\n"
    recipe = write(tmp_path / "recipe.toml", SUPER_RESOLUTION.replace("epochs = 3", "epochs = 1") + table)
    train(recipe, data, tmp_path / "one")
    # Lightning starts the second process by running the command again.
    script = Path(sys.executable).with_name("jointsparse")
    command = [script, "train", recipe, "--data", data, "--output", tmp_path / "two", "--processes", "2"]
    done = subprocess.run(command, check=True, timeout=300, capture_output=True, text=True)
    assert done.stdout.count("weights and figures are in") == 1
    assert done.stdout.count("Winograd, quantised") == 1
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
        ("prune_spatial = 0.6\nprune_winograd = 0.6", "prune_spatial = 0\nprune_winograd = 0", "both 0"),
        ("[sparsity]", "[quantisation]\nbits = 40\n[sparsity]", "40 bits"),
        ("[sparsity]", "[quantisation]\nbits = 4\nstep = 0.1\n[sparsity]", "contradict"),
        ("[sparsity]", "[quantisation]\nstep = -0.1\n[sparsity]", "step -0.1"),
        ("[sparsity]", "[quantisation]\ntuning_steps = -1\n[sparsity]", "at least 0"),
        ("[run]", "[run", "not a TOML file"),
        ('name = "vdsr"', 'name = "vgg"', "unknown network"),
        ("patch = 16", "patch = 64", "smaller patch"),
        ('train = "photos"', 'train = "elsewhere"', "elsewhere: no such folder"),
        ("options = ", "pretrained = true\noptions = ", "--weights"),
        ("[sparsity]", "[approximation]\nratio = 2.0\n[sparsity]", "--weights"),
        ("[sparsity]", "[approximation]\nratio = 1\n[sparsity]", "greater than 1"),
        ("[sparsity]", "[approximation]\nratio = 2\nbudget = 'bytes'\n[sparsity]", "parameters or multiplications"),
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
    for name in ("epochs", "sparse.spatial", "run.epoch"):
        with pytest.raises(InputError, match=name):
            read_recipe(recipe, {name: 1})
    with pytest.raises(InputError, match="cannot read"):
        read_recipe(tmp_path / "nowhere.toml")


def test_an_override_may_add_a_table(tmp_path: Path) -> None:
    recipe = write(tmp_path / "recipe.toml", CLASSIFICATION)
    assert read_recipe(recipe).quantisation is None
    quantisation = read_recipe(recipe, {"quantisation.bits": 6}).quantisation
    assert quantisation is not None
    assert quantisation.bits == 6


def test_a_removed_output_folder_is_made_anew(tmp_path: Path, data: Path) -> None:
    recipe = write(tmp_path / "recipe.toml", CLASSIFICATION)
    output = tmp_path / "deep" / "out"
    train(recipe, data, output, overrides={"run.epochs": 1})
    shutil.rmtree(output)
    assert train(recipe, data, output, overrides={"run.epochs": 1})["dense"]
