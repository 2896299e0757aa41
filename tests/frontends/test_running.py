"""Packages: what TVM's own runner makes of ours, and how those that cannot run are refused."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jointsparse.frontends import inspect, model_file
from jointsparse.frontends.compiling import compile_model, read_model
from jointsparse.frontends.errors import InputError
from jointsparse.frontends.running import read_inputs, run_package, write_outputs
from tests.frontends.onnx_models import two_convolutions, write


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package")
    model = write(two_convolutions(), folder / "model.onnx")
    compile_model(model, "llvm", folder / "model.tar")
    return folder / "model.tar"


def _outputs_of_onnxruntime(x: np.ndarray) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(two_convolutions().SerializeToString())
    return session.run(None, {"x": x})[0]


def test_result_is_that_of_onnxruntime(package: Path) -> None:
    x = np.random.default_rng(1).normal(size=(1, 4, 12, 12)).astype(np.float32)
    result = run_package(package, {"x": x})
    np.testing.assert_allclose(result.outputs["output_0"], _outputs_of_onnxruntime(x), rtol=1e-4, atol=1e-5)
    assert not result.times


def test_domains_agree(package: Path, tmp_path: Path) -> None:
    model = package.with_name("model.onnx")
    x = np.random.default_rng(2).normal(size=(1, 4, 12, 12)).astype(np.float32)
    for domain in ("spatial", "winograd", "dense"):
        plan = compile_model(model, "llvm", tmp_path / "m.tar", domain=domain)
        assert all(layer.sparse == (domain != "dense") for layer in plan)
        result = run_package(tmp_path / "m.tar", {"x": x}).outputs["output_0"]
        np.testing.assert_allclose(result, _outputs_of_onnxruntime(x), rtol=1e-4, atol=1e-5)


def test_libraries_in_a_file(package: Path, tmp_path: Path) -> None:
    """Beside the weights, for several targets; what reads the model does not see them."""
    model, deployed = tmp_path / "model.jsm", tmp_path / "deployed.jsm"
    model_file.save(package.with_name("model.onnx"), None, model)
    compile_model(model, "llvm", deployed, domain="winograd", embed_library=True)
    x = np.random.default_rng(3).normal(size=(1, 4, 12, 12)).astype(np.float32)
    expected = _outputs_of_onnxruntime(x)
    np.testing.assert_allclose(run_package(deployed, {"x": x}).outputs["output_0"], expected, rtol=1e-4, atol=1e-5)
    once = deployed.read_bytes()
    compile_model(deployed, "llvm", deployed, domain="dense", embed_library=True)
    info = inspect(deployed)
    assert [name.split()[0] for name in info.libraries] == ["dense", "winograd"]
    assert info.ratio == inspect(model).ratio
    assert info.file_bytes > len(once) > info.library_bytes / 2
    assert model_file.read_model(deployed) == model_file.read_model(model)
    with pytest.raises(InputError, match=r"2 libraries.*dense for llvm.*winograd for llvm"):
        run_package(deployed)
    for domain in ("dense", "winograd"):
        outputs = run_package(deployed, {"x": x}, target=domain).outputs
        np.testing.assert_allclose(outputs["output_0"], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="has no library"):
        run_package(model)
    with pytest.raises(InputError, match=r"only \.jsm"):
        compile_model(model, "llvm", tmp_path / "m.tar", embed_library=True)


@pytest.mark.parametrize("mode", ["zeros", "ones"])
def test_missing_inputs_are_filled(package: Path, mode: str) -> None:
    x = np.full((1, 4, 12, 12), float(mode == "ones"), np.float32)
    filled, given = run_package(package, fill_mode=mode), run_package(package, {"x": x})
    np.testing.assert_array_equal(filled.outputs["output_0"], given.outputs["output_0"])


def test_times(package: Path) -> None:
    times = run_package(package, time=True, repeat=3, number=2).times
    assert len(times.results) == 3
    assert times.min > 0


def test_inputs_that_do_not_fit(package: Path) -> None:
    x = np.zeros((1, 4, 12, 12), np.float32)
    with pytest.raises(InputError, match=r"input 'z': .* none of this name, but x"):
        run_package(package, {"z": x})
    with pytest.raises(InputError, match=r"takes float32 \[1, 4, 12, 12\], not float32 \[4, 12, 12\]"):
        run_package(package, {"x": x[0]})
    with pytest.raises(InputError, match="not float64"):
        run_package(package, {"x": x.astype(np.float64)})


def test_foreign_files(package: Path, tmp_path: Path) -> None:
    data = package.read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.tar").write_text("not a tar")
    (tmp_path / "empty.tar").write_bytes(b"")
    with tarfile.open(tmp_path / "other.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("readme"), io.BytesIO())
    for name in ("cut.tar", "text.tar", "empty.tar", "other.tar"):
        with pytest.raises(InputError, match=f"{name}: not a package"):
            run_package(tmp_path / name)
    with pytest.raises(InputError, match="no such file"):
        run_package(tmp_path / "missing.tar")


def _changed(package: Path, path: Path, name: str, change: Callable[[bytes], bytes]) -> Path:
    """A copy of `package` with one of its files changed."""
    with tarfile.open(package) as source, tarfile.open(path, "w") as target:
        for member in source.getmembers():
            content = source.extractfile(member).read()  # type: ignore[union-attr]
            if member.name == name:
                content = change(content)
                member.size = len(content)
            target.addfile(member, io.BytesIO(content))
    return path


def _member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    "member",
    [
        _member("../../x"),
        _member("folder/../../x"),
        _member("/x"),
        _member("x", tarfile.SYMTYPE, "../.."),
        _member("x", tarfile.LNKTYPE, "mod.so"),
        _member("x", tarfile.FIFOTYPE),
    ],
    ids=lambda member: f"{member.name} {member.type.decode()}",
)
def test_package_that_reaches_outside_is_never_unpacked(
    package: Path, tmp_path: Path, member: tarfile.TarInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _changed(package, tmp_path / "hostile.tar", "", bytes)
    with tarfile.open(path, "a") as archive:
        archive.addfile(member)
    unpacked = []
    monkeypatch.setattr(tarfile.TarFile, "extractall", lambda *_, **__: unpacked.append(path))
    with pytest.raises(InputError, match=r"hostile\.tar: not a package .* do not trust it"):
        run_package(path)
    assert not unpacked


def test_package_packed_again_with_its_folder_runs(package: Path, tmp_path: Path) -> None:
    with tarfile.open(package) as source:
        source.extractall(tmp_path / "content", filter="data")
    with tarfile.open(tmp_path / "again.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "content", ".")
    assert run_package(tmp_path / "again.tar.gz").outputs["output_0"].shape == (1, 4, 6, 6)


def test_library_of_another_machine(package: Path, tmp_path: Path) -> None:
    # The machine field of the ELF header: 0xF3 is RISC-V.
    path = _changed(package, tmp_path / "other.tar", "mod.so", lambda code: code[:18] + b"\xf3\x00" + code[20:])
    with pytest.raises(InputError, match="another machine"):
        run_package(path)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mod.json", lambda content: b""),
        ("mod.json", lambda content: content[:-9]),
        ("mod.json", lambda content: b"[1, 2]"),
        ("mod.json", lambda content: b'{"arg_nodes": [7], "nodes": []}'),
        ("mod.json", lambda content: b"\xff" + content),
        ("mod.params", lambda content: b""),
        ("mod.params", lambda content: b"junk"),
        ("mod.params", lambda content: content[: len(content) // 2]),
        ("mod.params", lambda content: content[:16] + b"\xff" * 64 + content[80:]),
    ],
)
def test_damaged_content(package: Path, tmp_path: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    path = _changed(package, tmp_path / "damaged.tar", name, change)
    with pytest.raises(InputError, match=r"damaged\.tar: (not a package|its graph or parameters are damaged)"):
        run_package(path)


def test_npz_with_flipped_bits(tmp_path: Path) -> None:
    """Every byte of the headers, the array and the directory: read or refused, and no other exception."""
    path = tmp_path / "flipped.npz"
    np.savez_compressed(path, x=np.arange(4, dtype=np.float32))
    data = path.read_bytes()
    refused = 0
    for index in range(len(data)):
        for mask in (0x01, 0x10, 0xFF):
            path.write_bytes(data[:index] + bytes([data[index] ^ mask]) + data[index + 1 :])
            try:
                read_inputs(path)
            except InputError:
                refused += 1
    assert refused > len(data)


@pytest.mark.parametrize("header", ["{'shape': (4,", "{'descr': '<f4', 'fortran_order': False, 'shape': (1 << 60,)}"])
def test_npz_with_a_damaged_header(tmp_path: Path, header: str) -> None:
    path = tmp_path / "header.npz"
    text = header.encode("latin1").ljust(118) + b"\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)
    with pytest.raises(InputError, match=r"not a readable \.npz"):
        read_inputs(path)


def test_npz_round_trip_and_faults(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write_outputs({"output_0": np.arange(3)}, path)
    np.testing.assert_array_equal(read_inputs(path)["output_0"], np.arange(3))
    with pytest.raises(InputError, match="no such file"):
        read_inputs(tmp_path / "missing.npz")
    np.save(tmp_path / "bare.npy", np.arange(3))
    with pytest.raises(InputError, match="one bare array"):
        read_inputs(tmp_path / "bare.npy")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"not a readable \.npz"):
        read_inputs(path)
    np.savez(path, object=np.array([{}], dtype=object))
    with pytest.raises(InputError, match=r"not a readable \.npz"):
        read_inputs(path)


def test_models_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_model(tmp_path / "missing.onnx")
    with pytest.raises(InputError, match=r"not a \.jsm or \.onnx file"):
        read_model(tmp_path / "model.pt")
    (tmp_path / "broken.onnx").write_bytes(b"\x00" * 50)
    with pytest.raises(InputError, match=r"broken\.onnx"):
        read_model(tmp_path / "broken.onnx")


def _log_of_autotvm(model: Path, log: Path) -> None:
    """Records with the last configuration of every task, which is not what TVM falls back to."""
    from tvm import autotvm

    mod, params = read_model(model)
    with log.open("w") as file:
        for task in autotvm.task.extract_from_program(mod["main"], params, "llvm"):
            record = autotvm.MeasureInput(task.target, task, task.config_space.get(len(task.config_space) - 1))
            file.write(autotvm.record.encode(record, autotvm.MeasureResult((1e-6,), 0, 0.1, 0.0)) + "\n")


def _log_of_auto_scheduler(model: Path, log: Path) -> None:
    """Records with the unscheduled program of every task."""
    from tvm import auto_scheduler

    mod, params = read_model(model)
    tasks, _ = auto_scheduler.extract_tasks(mod, params, "llvm")
    inputs = [auto_scheduler.MeasureInput(task, task.compute_dag.get_init_state()) for task in tasks]
    results = [auto_scheduler.MeasureResult([1e-6], 0, "", 0.1, 0.0) for _ in tasks]
    auto_scheduler.save_records(str(log), inputs, results)


@pytest.mark.parametrize("make_log", [_log_of_autotvm, _log_of_auto_scheduler])
def test_tuning_records_are_applied(make_log: Callable[[Path, Path], None], package: Path, tmp_path: Path) -> None:
    model = package.with_name("model.onnx")
    log = tmp_path / "log.json"
    make_log(model, log)
    assert log.stat().st_size > 0
    for name, records in (("plain", None), ("again", None), ("tuned", log)):
        compile_model(model, "llvm", tmp_path / f"{name}.tar", domain="dense", tuning_records=records)
    assert _code(tmp_path / "plain.tar") == _code(tmp_path / "again.tar")
    assert _code(tmp_path / "plain.tar") != _code(tmp_path / "tuned.tar")
    x = np.random.default_rng(3).normal(size=(1, 4, 12, 12)).astype(np.float32)
    result = run_package(tmp_path / "tuned.tar", {"x": x}).outputs["output_0"]
    np.testing.assert_allclose(result, _outputs_of_onnxruntime(x), rtol=1e-4, atol=1e-5)


def _code(package: Path) -> bytes:
    with tarfile.open(package) as archive:
        return archive.extractfile("mod.so").read()  # type: ignore[union-attr]


def test_broken_tuning_log(tmp_path: Path) -> None:
    model = write(two_convolutions(), tmp_path / "model.onnx")
    log = tmp_path / "log.json"
    with pytest.raises(InputError, match="no such tuning log"):
        compile_model(model, "llvm", tmp_path / "m.tar", tuning_records=log)
    for text in ("", "not a record\n", '{"a": 1}\n'):
        log.write_text(text)
        with pytest.raises(InputError, match="holds no records"):
            compile_model(model, "llvm", tmp_path / "m.tar", tuning_records=log)
    assert not (tmp_path / "m.tar").exists()


def test_linked_by_the_compiler_asked_for(tmp_path: Path) -> None:
    model = write(two_convolutions(), tmp_path / "model.onnx")
    compiler = tmp_path / "my-g++"
    compiler.write_text(f'#!/bin/sh\ntouch {tmp_path}/called\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    compile_model(model, "llvm", tmp_path / "m.tar", cross_compiler=str(compiler))
    assert (tmp_path / "called").exists()
    assert run_package(tmp_path / "m.tar").outputs["output_0"].shape == (1, 4, 6, 6)


def test_open_axes_take_the_shapes_given(tmp_path: Path) -> None:
    model = two_convolutions()
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = f"side{axis}"
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    path = write(model, tmp_path / "model.onnx")
    with pytest.raises(InputError, match="side2"):
        read_model(path)
    for shapes in ((1, 4, 16, 12), {"x": (1, 4, 16, 12)}):
        compile_model(path, "llvm", tmp_path / "m.tar", domain="dense", input_shapes=shapes)
        assert run_package(tmp_path / "m.tar").outputs["output_0"].shape == (1, 4, 8, 6)


def test_failing_linker(tmp_path: Path) -> None:
    model = write(two_convolutions(), tmp_path / "model.onnx")
    compiler = tmp_path / "broken-g++"
    compiler.write_text("#!/bin/sh\necho 'fatal error: no space' >&2\nexit 1\n")
    compiler.chmod(0o755)
    with pytest.raises(InputError, match="fatal error: no space"):
        compile_model(model, "llvm", tmp_path / "m.tar", cross_compiler=str(compiler))
    assert not (tmp_path / "m.tar").exists()
