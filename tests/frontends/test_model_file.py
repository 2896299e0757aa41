"""save, load, decompress: what goes in comes out, in ONNX Runtime and in TVM."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, helper, numpy_helper

from jointsparse import frontends
from jointsparse.frontends import container, model_file, onnx_graph, winograd_spec
from jointsparse.frontends.errors import InputError
from jointsparse.frontends.quantization import LayerQuantization
from jointsparse.schedules.winograd_pruning import WinogradPruning
from tests.frontends.graphs import floats, model, read_index, run, take_apart
from tests.frontends.torch_models import Residual, Shared, randomised


def _objective(module: torch.nn.Module, **options: Any) -> frontends.JointSparsity:
    return frontends.JointSparsity(module, **{"spatial": 0.5, "winograd": 0.6, "tile": 4, **options})


def _reference(module: torch.nn.Module, *inputs: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return module(*inputs).numpy()


def _decompressed(path: Path) -> ModelProto:
    onnx_path = path.with_suffix(".onnx")
    frontends.decompress(path, onnx_path)
    onnx.checker.check_model(str(onnx_path), full_check=True)
    return onnx.load(onnx_path)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "m.jsm"


def test_float_module_comes_back_exactly(path: Path) -> None:
    module, x = randomised(Residual()), torch.randn(2, 3, 16, 16)
    frontends.save(module, x, path)
    result = run(_decompressed(path), x.numpy())[0]
    np.testing.assert_allclose(result, _reference(module, x), rtol=1e-4, atol=1e-5)
    bases = {record.name: record.base for record in model_file.read(path).records}
    np.testing.assert_array_equal(bases["conv1.weight"], module.conv1.weight.detach().numpy())


@pytest.mark.parametrize("dither", [False, True])
def test_quantised_module_is_stored_as_codes_behind_batch_norm(path: Path, dither: bool) -> None:
    module, x = randomised(Residual()), torch.randn(1, 3, 16, 16)
    module.conv1.weight.data[module.conv1.weight.abs() < 0.03] = 0
    frontends.quantize_(module, step=0.02, dither=dither, seed=3)
    frontends.save(module, x, path)
    proto = _decompressed(path)
    np.testing.assert_allclose(run(proto, x.numpy())[0], _reference(module, x), rtol=1e-4, atol=1e-5)
    records = {record.name: record for record in model_file.read(path).records}
    layers = {f"{name}.weight": part for name, part in module.named_modules() if hasattr(part, "quantization")}
    assert set(layers) == {k for k, r in records.items() if isinstance(r.base, LayerQuantization)}
    weights = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    for name, part in layers.items():
        record, weight = records[name], part.weight.detach().numpy()
        np.testing.assert_array_equal(record.base.dequantize(), weight)
        scale = np.float32(1) if record.scale is None else record.scale.reshape(-1, 1, 1, 1)
        np.testing.assert_array_equal(weights[name], weight * scale)
    assert records["conv1.weight"].scale is not None
    assert records["fc.weight"].scale is None
    raw = sum(4 * p.numel() for p in module.parameters())
    assert path.stat().st_size < raw / 2


@pytest.mark.parametrize("dither", [False, True])
def test_tuned_codebook_is_stored_once_for_all_layers(path: Path, dither: bool) -> None:
    from jointsparse.frontends.quantization import CodebookTuner

    module, x = randomised(Residual()), torch.randn(1, 3, 16, 16)
    tuner = CodebookTuner(module, frontends.quantize_(module, step=0.02, dither=dither), rate=0.1)
    module(x).square().sum().backward()
    tuner.step()
    frontends.save(module, x, path)
    np.testing.assert_allclose(run(_decompressed(path), x.numpy())[0], _reference(module, x), rtol=1e-4, atol=1e-5)
    sections = take_apart(path.read_bytes())
    assert len(read_index(sections)["books"]) == 1
    for record in model_file.read(path).records:
        if isinstance(record.base, LayerQuantization):
            weight = module.get_parameter(record.name).detach().numpy()
            np.testing.assert_array_equal(record.base.dequantize(), weight)


def test_module_without_a_zero_and_with_zeros_only(path: Path) -> None:
    module, x = randomised(Residual()), torch.randn(1, 3, 16, 16)
    module.conv1.weight.data.zero_()
    module.conv2.weight.data.fill_(0.5)
    frontends.quantize_(module, step=0.25)
    frontends.save(module, x, path)
    np.testing.assert_allclose(run(_decompressed(path), x.numpy())[0], _reference(module, x), rtol=1e-4, atol=1e-5)
    info = frontends.inspect(path)
    layers = {layer.name: layer for layer in info.layers}
    weights = sum(layer.weights for layer in info.layers)
    assert info.entropy == pytest.approx(sum(layer.entropy * layer.weights for layer in info.layers) / weights)
    assert info.bits_per_weight == pytest.approx(8 * sum(layer.bytes for layer in info.layers) / weights)
    assert (layers["conv1.weight"].spatial_sparsity, layers["conv1.weight"].entropy) == (1, 0)
    assert (layers["conv2.weight"].spatial_sparsity, layers["conv2.weight"].entropy) == (0, 0)


def test_equal_tensors_keep_their_names(path: Path) -> None:
    """The legacy exporter merges initializers of equal values; each layer keeps its weight, codes and threshold."""
    module = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3)).eval()
    module[2].load_state_dict(module[0].state_dict())
    frontends.quantize_(module, step=0.02)
    frontends.save(module, torch.randn(1, 4, 9, 9), path, objective=_objective(module))
    contents = model_file.read(path)
    assert {record.name for record in contents.records} == set(contents.winograd) == {"0.weight", "2.weight"}
    assert all(isinstance(record.base, LayerQuantization) for record in contents.records)


def test_shared_grouped_two_inputs(path: Path) -> None:
    module, inputs = randomised(Shared()), (torch.randn(1, 4, 9, 7), torch.randn(1, 4, 9, 7))
    frontends.quantize_(module, step=0.05)
    objective = _objective(module, tile={"conv": 4, "grouped": 2})
    threshold = objective.winograd_spec()["conv.weight"]["threshold"]
    frontends.save(module, inputs, path, objective=objective)
    contents = model_file.read(path)
    records = {record.name: record for record in contents.records}
    assert records["conv.weight.scaled"].base == container.Shared("conv.weight")
    assert {k: (v.tile, v.threshold) for k, v in contents.winograd.items()} == {
        "conv.weight": (4, threshold),
        "conv.weight.scaled": (4, threshold),
        "grouped.weight": (2, threshold),
    }
    proto = _decompressed(path)
    arrays = [x.numpy() for x in inputs]
    np.testing.assert_allclose(run(proto, *arrays)[0], _reference(module, *inputs), rtol=1e-4, atol=1e-5)
    layers = {layer.name: layer for layer in frontends.inspect(path).layers}
    assert layers["conv.weight.scaled"].bytes < layers["conv.weight"].bytes


def test_thresholds_prune_the_same_entries_before_and_after_folding(path: Path) -> None:
    module, x = randomised(Residual()), torch.randn(1, 3, 16, 16)
    objective = _objective(module)
    entry = objective.winograd_spec()["conv1.weight"]
    frontends.save(module, x, path, objective=objective)
    layer = WinogradPruning(4, entry["threshold"], entry["weighted"])
    before = layer.magnitudes(module.conv1.weight.detach().numpy()) <= entry["threshold"]
    proto = _decompressed(path)
    weights = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    shapes = {name: weight.shape for name, weight in weights.items()}
    after = winograd_spec.parse(onnx_graph.metadata(proto, winograd_spec.KEY) or "", shapes, "test")["conv1.weight"]
    pruned = after.magnitudes(weights["conv1.weight"]) <= np.reshape(after.threshold, (-1, 1, 1, 1))
    np.testing.assert_array_equal(pruned, before)
    info = frontends.inspect(path)
    layers = {layer.name: layer for layer in info.layers}
    assert layers["conv1.weight"].winograd_sparsity == pytest.approx(before.mean())
    assert 0.01 < before.mean() < 0.99
    assert info.winograd_sparsity == pytest.approx(0.6, abs=0.01)
    assert layers["conv2.weight"].winograd_sparsity is None


def test_same_input_same_bytes(tmp_path: Path) -> None:
    module, x = randomised(Residual()), torch.randn(1, 3, 16, 16)
    frontends.quantize_(module, step=0.02, dither=True)
    for name in ("a.jsm", "b.jsm"):
        frontends.save(module, x, tmp_path / name, objective=_objective(module))
    assert (tmp_path / "a.jsm").read_bytes() == (tmp_path / "b.jsm").read_bytes()


def test_saving_a_decompressed_file_keeps_the_function(tmp_path: Path, path: Path) -> None:
    module, x = randomised(Residual()), torch.randn(1, 3, 16, 16)
    frontends.save(module, x, path, objective=_objective(module))
    first = _decompressed(path)
    again = tmp_path / "again.jsm"
    frontends.save(path.with_suffix(".onnx"), None, again)
    second = _decompressed(again)
    assert onnx_graph.metadata(first, winograd_spec.KEY) == onnx_graph.metadata(second, winograd_spec.KEY)
    np.testing.assert_array_equal(run(first, x.numpy())[0], run(second, x.numpy())[0])


def test_module_mode_and_weights_are_left_alone(path: Path) -> None:
    module = Residual().train()
    module.norm1.eval()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    frontends.save(module, torch.randn(1, 3, 16, 16), path)
    assert module.training
    assert not module.norm1.training
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key])


def test_weights_changed_after_quantising_are_refused(path: Path) -> None:
    module = randomised(Residual())
    frontends.quantize_(module, step=0.02)
    module.conv1.weight.data += 0.001
    with pytest.raises(InputError, match=r"conv1\.weight.*quantise again"):
        frontends.save(module, torch.randn(1, 3, 16, 16), path)
    assert not path.exists()


def test_layer_that_takes_no_part_is_left_out_with_a_warning(path: Path) -> None:
    module = randomised(Residual())
    module.unused = torch.nn.Conv2d(3, 3, 3)
    frontends.quantize_(module, step=0.02)
    with pytest.warns(UserWarning, match=r"unused\.weight"):
        frontends.save(module, torch.randn(1, 3, 16, 16), path)


def test_unused_layer_of_the_objective_is_left_out_with_a_warning(path: Path) -> None:
    module = randomised(Residual())
    module.unused = torch.nn.Conv2d(3, 3, 3)
    with pytest.warns(UserWarning, match=r"unused\.weight"):
        frontends.save(module, torch.randn(1, 3, 16, 16), path, objective=_objective(module))
    assert "conv1.weight" in model_file.read(path).winograd


@pytest.mark.parametrize("wrapped", ["saved", "objective"])
def test_objective_of_another_module_is_refused(path: Path, wrapped: str) -> None:
    """As under DDP, or where the objective was built on a part: the names differ by a prefix."""
    module = randomised(Residual())
    outer = torch.nn.Sequential(module)
    saved, built_on = (outer, module) if wrapped == "saved" else (module, outer)
    with pytest.raises(InputError, match="no weight of the model to be saved; build the objective on"):
        frontends.save(saved, torch.randn(1, 3, 16, 16), path, objective=_objective(built_on))
    assert not path.exists()


def test_weight_computed_since_quantising_is_refused(path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3))
    frontends.quantize_(module, step=0.02)
    torch.nn.utils.parametrizations.weight_norm(module[0])
    with pytest.raises(InputError, match=r"'0\.weight' is no weight"):
        frontends.save(module, torch.randn(1, 3, 8, 8), path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_quantised_weights_must_be_float32(path: Path, dtype: torch.dtype) -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)).to(dtype)
    frontends.quantize_(module, step=0.02)
    with pytest.raises(InputError, match=r"call model\.float\(\) before quantize_"):
        frontends.save(module, torch.randn(1, 3, 8, 8, dtype=dtype), path)


def test_weights_with_thresholds_must_be_of_a_type_that_the_file_can_hold(path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)).to(torch.bfloat16)
    objective = frontends.JointSparsity(module, 0.5, 0.5)
    with pytest.raises(InputError, match=r"is bfloat16; call model\.float\(\) before saving"):
        frontends.save(module, torch.randn(1, 3, 8, 8, dtype=torch.bfloat16), path, objective=objective)


# --- ONNX ------------------------------------------------------------------------------------------------------------


def _open_batch() -> ModelProto:
    conv = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])
    return model([conv], {"x": ("N", 4, 8, 8)}, {"w": floats(4, 4, 3, 3)})


@pytest.mark.parametrize(("example", "batch"), [(None, 1), ((3, 4, 8, 8), 3), ({"x": floats(2, 4, 8, 8)}, 2)])
def test_open_batch_axis_is_fixed(path: Path, example: Any, batch: int) -> None:
    frontends.save(_open_batch(), example, path)
    shape = model_file.read_model(path).graph.input[0].type.tensor_type.shape
    assert [axis.dim_value for axis in shape.dim] == [batch, 4, 8, 8]


def test_open_inner_axis_needs_a_shape(path: Path) -> None:
    conv = helper.make_node("Conv", ["x", "w"], ["y"])
    proto = model([conv], {"x": (1, 4, "H", "W")}, {"w": floats(4, 4, 3, 3)})
    with pytest.raises(InputError, match=r"axis 2 \(H\) of input 'x' is open"):
        frontends.save(proto, None, path)
    frontends.save(proto, (1, 4, 10, 12), path)


@pytest.mark.parametrize(
    ("example", "match"),
    [((1, 4, 8), "4 axes"), ((1, 5, 8, 8), "axis 1"), ({"z": (1, 4, 8, 8)}, "no input 'z'"), ((0, 4, 8, 8), "axis 0")],
)
def test_contradicting_shape_is_refused(path: Path, example: Any, match: str) -> None:
    with pytest.raises(InputError, match=match):
        frontends.save(_open_batch(), example, path)


def test_onnx_with_weights_in_another_file(tmp_path: Path, path: Path) -> None:
    proto = _open_batch()
    source = tmp_path / "m.onnx"
    onnx.save_model(proto, source, save_as_external_data=True, location="m.bin", size_threshold=0)
    assert (tmp_path / "m.bin").exists()
    frontends.save(source, None, path)
    np.testing.assert_array_equal(model_file.read(path).records[0].base, floats(4, 4, 3, 3))
    (tmp_path / "m.bin").unlink()
    with pytest.raises(InputError, match=r"m\.onnx"):
        frontends.save(source, None, path)


def test_onnx_source_is_not_changed(path: Path) -> None:
    proto = _open_batch()
    before = proto.SerializeToString()
    frontends.save(proto, None, path)
    assert proto.SerializeToString() == before


def test_other_metadata_and_integer_tensors_survive(path: Path) -> None:
    table = np.arange(40, dtype=np.int64).reshape(20, 2)
    nodes = [
        helper.make_node("Gather", ["table", "i"], ["rows"]),
        helper.make_node("Cast", ["rows"], ["f"], to=1),
        helper.make_node("Add", ["x", "f"], ["y"]),
    ]
    proto = model(nodes, {"x": (3, 2)}, {"table": table, "i": np.array([3, 0, 19])})
    onnx_graph.set_metadata(proto, "author", "me")
    frontends.save(proto, None, path)
    again = _decompressed(path)
    assert onnx_graph.metadata(again, "author") == "me"
    x = floats(3, 2)
    np.testing.assert_array_equal(run(again, x)[0], x + table[[3, 0, 19]].astype(np.float32))


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [frontends.load, frontends.inspect, model_file.read_model])
def test_missing_and_foreign_files(tmp_path: Path, function: Any) -> None:
    with pytest.raises(InputError, match=r"none\.jsm: there is no such file"):
        function(tmp_path / "none.jsm")
    with pytest.raises(InputError, match="not a file"):
        function(tmp_path)
    (tmp_path / "text.jsm").write_text("hello")
    with pytest.raises(InputError, match=r"text\.jsm: not a \.jsm file"):
        function(tmp_path / "text.jsm")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x08\x0a", bytes(100)])
def test_onnx_that_is_none(tmp_path: Path, content: bytes) -> None:
    source = tmp_path / "bad.onnx"
    source.write_bytes(content)
    with pytest.raises(InputError, match=r"bad\.onnx: ") as caught:
        frontends.save(source, None, tmp_path / "m.jsm")
    assert "\n" not in str(caught.value)


def test_failure_leaves_the_old_file_and_no_other(path: Path) -> None:
    frontends.save(_open_batch(), None, path)
    before = path.read_bytes()
    with pytest.raises(InputError):
        frontends.save(_open_batch(), (9, 9, 9, 9), path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="folder"):
        frontends.save(_open_batch(), None, tmp_path / "no" / "m.jsm")


_WITHOUT = """
import sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
from jointsparse import frontends
source, path = sys.argv[2:4]
frontends.compress(source, path, spatial_sparsity=0.5, winograd_sparsity=0.5)
frontends.decompress(path, path + ".onnx")
print(frontends.inspect(path).ratio)
if "tvm" not in sys.argv[1]:
    print(len(frontends.load(path)[1]))
"""


@pytest.mark.parametrize("missing", ["torch", "torch,tvm"])
def test_without_torch_and_without_tvm(tmp_path: Path, missing: str) -> None:
    onnx.save_model(_open_batch(), tmp_path / "m.onnx")
    command = [sys.executable, "-c", _WITHOUT, missing, str(tmp_path / "m.onnx"), str(tmp_path / "m.jsm")]
    subprocess.run(command, check=True, capture_output=True)


def test_package_import_is_light() -> None:
    code = "import sys, jointsparse.frontends as f; f.InputError; print({'torch', 'tvm', 'onnx'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


def test_every_public_name_exists() -> None:
    for name in frontends.__all__:
        assert getattr(frontends, name) is not None
