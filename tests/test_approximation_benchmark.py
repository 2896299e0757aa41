"""The comparison of ways to make a classifier smaller."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from benchmarks import approximation, decompositions
from jointsparse.frontends.networks import build

RECIPE = """
[run]
epochs = 1
threads = 1
[network]
name = "alexnet"
options = { stem = "cifar", width = 4, classes = 2 }
[data]
kind = "classification"
train = "train"
test = ["test"]
batch = 4
[optimiser]
rate = 1e-3
"""


@pytest.mark.parametrize("method", [decompositions.svd, decompositions.tucker])
@pytest.mark.parametrize("network", ["alexnet", "googlenet"])
def test_decompositions_keep_to_the_ratio(method, network: str) -> None:
    model = build(network, stem="cifar", width=8, classes=10).eval()
    made = method(model, 3.0)
    assert 3 <= decompositions.weights(model) / decompositions.weights(made) < 3.5
    assert made(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_a_full_rank_is_the_layer_itself() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(6, 4, 3, 2, 1), nn.Conv2d(4, 6, 1), nn.Linear(5, 7)]
    inputs = [torch.rand(2, 6, 9, 9), torch.rand(2, 4, 5, 5), torch.rand(3, 5)]
    for layer, x in zip(layers, inputs, strict=True):
        for decompose in (decompositions._pair, decompositions._triple):
            made = decompose(layer, 1.0)
            torch.testing.assert_close(made(x), layer(x))


def test_rows_are_kept_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for split, label, count in (("train", "cat", 4), ("train", "dog", 4), ("test", "cat", 2), ("test", "dog", 2)):
        (tmp_path / split / label).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / label / f"{i}.png")
    recipe, weights, output = tmp_path / "tiny.toml", tmp_path / "tiny.safetensors", tmp_path / "out"
    recipe.write_text(RECIPE)
    torch.manual_seed(0)
    save_file(build("alexnet", stem="cifar", width=4, classes=2).state_dict(), weights)
    monkeypatch.setattr(approximation, "IMAGES", 8)
    given = [
        str(recipe),
        str(weights),
        "--data",
        str(tmp_path),
        "--output",
        str(output),
        "--ratio",
        "2",
        "--epochs",
        "1",
    ]
    for methods in (["svd"], ["svd", "ours", "tucker"]):
        monkeypatch.setattr(sys, "argv", ["approximation", *given, "--method", *methods])
        approximation.main()
    rows = json.loads((output / "results.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["svd", "ours", "tucker"]
    assert all(2 <= row["parameter_ratio"] < 2.5 and set(row["after"]) == {"test"} for row in rows)
    assert "fine-tuned" in capsys.readouterr().out
