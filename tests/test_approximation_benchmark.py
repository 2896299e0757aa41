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

from benchmarks import approximated_speed, approximation, decompositions, networks
from jointsparse.frontends.approximation.structures import Shape, Structure
from jointsparse.frontends.engines.measuring import Setting
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


def test_a_structure_has_the_ratio() -> None:
    shape = Shape(1, 64, 48, 9)
    structure = approximated_speed.structure_of(shape, 0.125, 4.0)
    assert structure is not None
    assert structure.kept == 6
    assert shape.cost(structure) <= shape.weights / 4 < shape.cost(Structure(6, structure.rank + 1))
    assert approximated_speed.structure_of(Shape(1, 4, 4, 1), 0.9, 4.0) is None, "the kept channels are too many"


def test_speed_of_an_approximated_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def tiny() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU())

    monkeypatch.setitem(networks.NETWORKS, "tiny", networks.Network("Tiny", tiny, (1, 3, 12, 12)))
    monkeypatch.setitem(approximated_speed.RATIOS, "tiny", 2.0)
    rows = approximated_speed.measure("tiny", 0.25, 0.5, Setting(seconds=0.01))
    assert [one.left_out for _, one, _ in rows] == [None] * 4
    dense, *others = [weights for *_, weights in rows]
    assert dense == 16 * 3 * 9 + 32 * 16 * 9
    assert all((dense - 16 * 3 * 9) / (weights - 16 * 3 * 9) == pytest.approx(2, abs=0.2) for weights in others)
    table = approximated_speed.table("tiny", rows)
    assert table.row_count == 4
    assert next(iter(table.columns[4].cells)) == "1.00x"
