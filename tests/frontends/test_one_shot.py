"""compress: pruning, quantisation and coding without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import ModelProto, helper, numpy_helper
from safetensors.torch import save_file

from jointsparse import frontends
from jointsparse.frontends import model_file, one_shot, onnx_graph, winograd_spec
from jointsparse.frontends.errors import InputError
from jointsparse.frontends.networks import build
from jointsparse.frontends.quantization import LayerQuantization
from tests.frontends.graphs import floats, model, run


def _network() -> ModelProto:
    """3x3 stride 1, grouped 5x5, 3x3 stride 2, 1x1, and a dense layer behind a Transpose."""
    nodes = [
        helper.make_node("Conv", ["x", "a", "bias"], ["p"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["p", "b"], ["q"], pads=[2, 2, 2, 2], group=2),
        helper.make_node("Conv", ["q", "c"], ["r"], strides=[2, 2]),
        helper.make_node("Conv", ["r", "d"], ["s"]),
        helper.make_node("GlobalAveragePool", ["s"], ["t"]),
        helper.make_node("Flatten", ["t"], ["u"]),
        helper.make_node("Transpose", ["e"], ["et"], perm=[1, 0]),
        helper.make_node("MatMul", ["u", "et"], ["y"]),
    ]
    constants = {
        "a": floats(16, 4, 3, 3),
        "bias": floats(16, seed=1),
        "b": floats(16, 8, 5, 5, seed=2) / 4,
        "c": floats(16, 16, 3, 3, seed=3) / 2,
        "d": floats(16, 16, 1, 1, seed=4),
        "e": floats(10, 16, seed=5),
    }
    return model(nodes, {"x": (1, 4, 12, 12)}, constants)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "m.jsm"


def _weights(path: Path) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model_file.read_model(path).graph.initializer}


def test_spatial_sparsity_is_met_by_the_smallest_of_all_layers(path: Path) -> None:
    frontends.compress(_network(), path, spatial_sparsity=0.7, step=0)
    before = {t.name: numpy_helper.to_array(t) for t in _network().graph.initializer}
    after = _weights(path)
    layers = "abcde"
    total = sum(before[name].size for name in layers)
    zeros = sum(int((after[name] == 0).sum()) for name in layers)
    assert 0.7 * total <= zeros <= 0.701 * total + 2  # the threshold lies in the widest gap of the next 0.1 %
    largest_pruned = max(np.abs(before[name][after[name] == 0]).max() for name in layers)
    smallest_kept = min(np.abs(after[name][after[name] != 0]).min() for name in layers)
    assert largest_pruned < smallest_kept
    for name in layers:
        kept = after[name] != 0
        np.testing.assert_array_equal(after[name][kept], before[name][kept])
    np.testing.assert_array_equal(after["bias"], before["bias"])
    assert frontends.inspect(path).spatial_sparsity == pytest.approx(zeros / total)


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_winograd_sparsity_is_met_over_the_layers_that_have_one(path: Path, tile: int, weighted: bool) -> None:
    frontends.compress(_network(), path, winograd_sparsity=0.6, tile=tile, weighted=weighted)
    contents = model_file.read(path)
    assert set(contents.winograd) == {"a", "b"}
    assert len({layer.threshold for layer in contents.winograd.values()}) == 1
    info = frontends.inspect(path)
    assert info.winograd_sparsity == pytest.approx(0.6, abs=1e-3)
    assert info.winograd_sparsity >= 0.6
    weights = _weights(path)
    layer = contents.winograd["a"]
    expected = np.mean(layer.magnitudes(weights["a"]) <= layer.threshold)
    assert {x.name: x.winograd_sparsity for x in info.layers}["a"] == pytest.approx(expected)


@pytest.mark.parametrize("dither", [False, True])
def test_step_bounds_the_error(path: Path, dither: bool) -> None:
    frontends.compress(_network(), path, step=0.125, dither=dither, seed=5)
    before = {t.name: numpy_helper.to_array(t) for t in _network().graph.initializer}
    after = _weights(path)
    for name in "abcde":
        # With dither a weight below one step may round to code 0 and lose all of itself.
        kept = after[name] != 0
        assert np.abs(after[name] - before[name])[kept].max() <= 0.0625 + 1e-6
        assert np.abs(before[name][~kept]).max(initial=0) <= 0.125
    records = {r.name: r.base for r in model_file.read(path).records}
    seeds = [records[name].dither_seed for name in "abcde"]
    assert len(set(seeds)) == (5 if dither else 1)


@pytest.mark.parametrize("bits", [2, 5, None])
def test_bits_bound_the_codes_of_every_layer(path: Path, bits: int | None) -> None:
    frontends.compress(_network(), path, bits=bits)
    most = 2 ** ((bits or 8) - 1) - 1
    for record in model_file.read(path).records:
        if record.name in "abcde":
            assert isinstance(record.base, LayerQuantization)
            assert np.abs(record.base.codes).max() == most


def test_file_is_smaller_and_runs_as_what_it_holds(path: Path) -> None:
    frontends.compress(_network(), path, spatial_sparsity=0.5, bits=8)
    x = floats(1, 4, 12, 12, seed=9)
    exact = run(_network(), x)[0]
    dense = path.with_name("dense.jsm")
    frontends.compress(_network(), dense)
    result = run(model_file.read_model(dense), x)[0]
    assert np.abs(result - exact).max() < 0.05 * np.abs(exact).max()
    info = frontends.inspect(path)
    assert info.file_bytes == path.stat().st_size
    assert info.ratio == pytest.approx(4 * info.parameters / info.file_bytes)
    assert info.ratio > 4
    assert info.parameters == sum(x.size for x in _weights(path).values())


def test_same_input_same_bytes(tmp_path: Path) -> None:
    options: dict[str, Any] = {"spatial_sparsity": 0.5, "winograd_sparsity": 0.5, "bits": 4, "dither": True}
    for name in ("a.jsm", "b.jsm"):
        frontends.compress(_network(), tmp_path / name, **options)
    assert (tmp_path / "a.jsm").read_bytes() == (tmp_path / "b.jsm").read_bytes()


@pytest.mark.parametrize("kind", ["safetensors", "pt", "ckpt"])
def test_weights_of_a_named_network(tmp_path: Path, path: Path, kind: str) -> None:
    module = build("resnet20").eval()
    source = tmp_path / f"weights.{kind}"
    if kind == "safetensors":
        save_file(module.state_dict(), source)
    else:
        torch.save({"state_dict": module.state_dict()} if kind == "ckpt" else module.state_dict(), source)
    frontends.compress(source, path, step=0, network="resnet20")
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = module(x).numpy()
    np.testing.assert_allclose(run(model_file.read_model(path), x.numpy())[0], expected, rtol=1e-3, atol=1e-4)


def test_weights_of_a_network_with_options(tmp_path: Path, path: Path) -> None:
    module = build("resnet20", width=4, classes=3).eval()
    save_file(module.state_dict(), tmp_path / "w.safetensors")
    options = {"width": 4, "classes": 3}
    frontends.compress(tmp_path / "w.safetensors", path, step=0, network="resnet20", network_options=options)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = module(x).numpy()
    np.testing.assert_allclose(run(model_file.read_model(path), x.numpy())[0], expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(InputError, match="height"):
        frontends.compress(tmp_path / "w.safetensors", path, network="resnet20", network_options={"height": 4})


class _Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (self.marker.write_text, ("x",))


def test_pickles_are_not_run(tmp_path: Path, path: Path) -> None:
    marker = tmp_path / "was-run"
    torch.save({"weight": _Evil(marker)}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match="weights alone") as caught:
        frontends.compress(tmp_path / "evil.pt", path, network="resnet20")
    assert "\n" not in str(caught.value)
    assert not marker.exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert marker.exists(), "the file must be able to do harm, or this test shows nothing"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"spatial_sparsity": 1.0}, "spatial sparsity 1.0"),
        ({"winograd_sparsity": -0.1}, "Winograd sparsity -0.1"),
        ({"step": 0.1, "bits": 4}, "contradict"),
        ({"step": -1.0}, "step -1.0"),
        ({"step": float("nan")}, "step nan"),
        ({"bits": 1}, "1 bits"),
        ({"bits": 40}, "40 bits"),
        ({"winograd_sparsity": 0.5, "tile": 6}, "tile 6"),
        ({"seed": -1, "dither": True}, "seed -1"),
        ({"seed": 2**32, "dither": True}, "seed 4294967296"),
        ({"input_shape": (1, 3, 12, 12)}, "axis 1"),
    ],
)
def test_bad_options_are_refused(path: Path, options: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        frontends.compress(_network(), path, **options)
    assert not path.exists()


def test_bad_sources_are_refused(tmp_path: Path, path: Path) -> None:
    save_file(build("vdsr", depth=3, width=4).state_dict(), tmp_path / "w.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\x08" * 20)
    (tmp_path / "m.pt2").write_bytes(b"")
    cases = [
        ("w.safetensors", None, "holds weights but no network; name one of"),
        ("w.safetensors", "resnet20", "does not fit the network"),
        ("w.safetensors", "nonesuch", "unknown network"),
        ("broken.safetensors", "vdsr", "weights alone"),
        ("m.pt2", None, "unknown kind of file"),
        ("none.onnx", None, "no such file"),
        ("none.pt", "vdsr", "no such file"),
    ]
    for name, network, match in cases:
        with pytest.raises(InputError, match=match) as caught:
            frontends.compress(tmp_path / name, path, network=network)
        assert "\n" not in str(caught.value)


def test_nothing_to_compress_or_to_prune_in_the_winograd_domain(path: Path) -> None:
    relu = model([helper.make_node("Relu", ["x"], ["y"])], {"x": (1, 4)}, {})
    with pytest.raises(InputError, match="nothing to compress"):
        frontends.compress(relu, path)
    pointwise = model([helper.make_node("Conv", ["x", "w"], ["y"])], {"x": (1, 4, 3, 3)}, {"w": floats(4, 4, 1, 1)})
    with pytest.raises(InputError, match="no 3x3 or 5x5"):
        frontends.compress(pointwise, path, winograd_sparsity=0.5)


def test_report_is_printable_and_json(path: Path) -> None:
    import json

    proto = _network()
    strange = "a\x1b[31m\n[bold]"
    for tensor in proto.graph.initializer:
        tensor.name = strange if tensor.name == "a" else tensor.name
    proto.graph.node[0].input[1] = strange
    frontends.compress(proto, path, spatial_sparsity=0.5, winograd_sparsity=0.5)
    info = frontends.inspect(path)
    text = str(info)
    assert "\x1b" not in text
    assert "[bold]" in text
    assert "ratio" in text
    assert json.loads(info.to_json())["layers"][0]["name"] == strange
    assert onnx_graph.metadata(model_file.read_model(path), winograd_spec.KEY)


def test_equal_magnitudes_are_never_all_pruned(path: Path) -> None:
    signs = np.sign(floats(8, 4, 3, 3))
    binary = model([helper.make_node("Conv", ["x", "w"], ["y"])], {"x": (1, 4, 6, 6)}, {"w": signs})
    with pytest.raises(InputError, match="magnitudes are equal"):
        frontends.compress(binary, path, spatial_sparsity=0.1)
    assert not path.exists()


def test_pruning_separates_neighbouring_floats() -> None:
    """Midway between two neighbours float32 has no number: the threshold must not round to the upper one."""
    values = [np.float32(1)]
    for _ in range(9):
        values.append(np.nextafter(values[-1], np.float32(2)))
    for count in range(1, 10):
        weights = {"w": np.array(values, np.float32)}
        one_shot.prune(weights, count / 10)
        assert int((weights["w"] == 0).sum()) == count


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(path: Path, value: float) -> None:
    network = _network()
    weight = floats(16, 16, 3, 3, seed=3)
    weight[3, 2, 1, 0] = value
    next(t for t in network.graph.initializer if t.name == "c").CopyFrom(numpy_helper.from_array(weight, "c"))
    for options in ({}, {"step": 0}, {"spatial_sparsity": 0.5, "step": 0}):
        with pytest.raises(InputError, match="weight 'c' is not finite"):
            frontends.compress(network, path, **options)
