"""The networks: sizes of the literature, state-dict keys, shapes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from jointsparse.frontends.errors import InputError
from jointsparse.frontends.networks import NETWORKS, build


def count(model: nn.Module) -> int:
    """Weights without biases and BatchNorm."""
    return sum(p.numel() for p in model.parameters() if p.dim() > 1)


@pytest.mark.parametrize(
    ("name", "options", "weights"),
    [
        ("ct-srcnn", {}, 112_480),
        ("vdsr", {}, 664_704),
        ("resnet20", {}, 268_336),
        ("resnet32", {}, 461_872),
        ("resnet18", {}, 11_678_912),
        ("resnet18", {"pool": True}, 11_678_912),
        ("resnet18", {"stem": "cifar", "classes": 10}, 11_164_352),
        ("vgg16", {}, 138_344_128),
        ("alexnet", {}, 61_090_496),
        ("googlenet", {}, 6_990_272),
    ],
)
def test_sizes(name: str, options: dict, weights: int) -> None:
    assert count(build(name, **options)) == weights


@pytest.mark.parametrize("name", ["ct-srcnn", "vdsr"])
def test_super_resolution_starts_near_the_identity(name: str) -> None:
    torch.manual_seed(0)
    x = torch.rand(2, 1, 13, 17)
    y = build(name).eval()(x)
    assert y.shape == x.shape
    assert 0 < float((y - x).detach().abs().mean()) < 0.2


def test_without_residual_the_input_is_not_added() -> None:
    model = build("ct-srcnn", residual=False)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert float(model(torch.ones(1, 1, 9, 9)).detach().abs().max()) == 0


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("resnet20", {}, 32),
        ("resnet18", {"width": 8, "classes": 10}, 64),
        ("resnet18", {"width": 8, "classes": 10, "pool": True}, 64),
        ("resnet18", {"width": 8, "classes": 10, "stem": "cifar"}, 32),
        ("vgg16", {"width": 8, "classes": 10, "stem": "cifar"}, 32),
        ("vgg16", {"width": 4, "classes": 10}, 224),
        ("alexnet", {"width": 8, "classes": 10, "stem": "cifar"}, 32),
        ("alexnet", {"width": 4, "classes": 10}, 224),
        ("googlenet", {"width": 8, "classes": 10, "stem": "cifar"}, 32),
        ("googlenet", {"width": 8, "classes": 10}, 224),
    ],
)
def test_classifiers(name: str, options: dict, size: int) -> None:
    assert build(name, **options)(torch.rand(2, 3, size, size)).shape == (2, 10)


def test_pooling_leaves_winograd_every_3x3_convolution() -> None:
    strides = {
        m.stride
        for m in build("resnet18", width=8, pool=True).modules()
        if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)
    }
    assert strides == {(1, 1)}


@pytest.mark.parametrize("size", [32, 33, 50])
def test_pooling_keeps_the_sizes_of_strides(size: int) -> None:
    """Odd sizes round up in both forms, so that the shortcut fits."""
    assert build("resnet18", width=8, pool=True, classes=3)(torch.rand(1, 3, 2 * size, 2 * size)).shape == (1, 3)


def test_keys_of_the_published_weights() -> None:
    keys = set(build("resnet20").state_dict())
    assert {"conv1.weight", "layer2.0.conv1.weight", "layer3.2.bn2.running_var", "linear.bias"} <= keys
    assert {f"conv{i}.{part}" for i in range(20) for part in ("weight", "bias")} == set(build("vdsr").state_dict())
    assert "layer2.0.downsample.0.weight" in build("resnet18").state_dict()


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("vgg", {}, "unknown network"),
        ("vdsr", {"height": 3}, "height"),
        ("resnet18", {"stem": "tiny"}, "stem"),
        ("resnet18", {"classes": "ten"}, "resnet18"),
        ("vdsr", {"depth": 0}, "depth is 0"),
        ("ct-srcnn", {"residual": -1}, "residual is -1"),
        ("googlenet", {"width": 12}, "multiple of 8"),
    ],
)
def test_bad_requests_are_refused(name: str, options: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        build(name, **options)


def test_every_network_of_the_registry_is_built_by_its_name() -> None:
    assert set(NETWORKS) == {"ct-srcnn", "vdsr", "resnet20", "resnet32", "resnet18", "vgg16", "alexnet", "googlenet"}
