"""The command line: exit codes, one-line errors, and the whole way from a model to its output."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest

from jointsparse.frontends.cli import console, main
from tests.frontends.onnx_models import two_convolutions, write


@dataclass
class Finished:
    """What a command left behind."""

    code: int
    out: str
    err: str


Command = Callable[..., Finished]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Run ``jointsparse ARGUMENTS`` in this process, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Finished:
        console.settings.verbose = False
        monkeypatch.setattr(sys, "argv", ["jointsparse", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        output = capfd.readouterr()
        return Finished(int(caught.value.code or 0), output.out, output.err)

    return run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write(two_convolutions(), tmp_path / "model.onnx")


def test_the_whole_way(command: Command, model: Path) -> None:
    done = command(
        "compress", model, "--spatial-sparsity", 0.85, "--winograd-sparsity", 0.6, "--bits", 5, "-o", "m.jsm"
    )
    assert done.code == 0, done.err
    assert done.out.startswith("m.jsm: ")

    info = json.loads(command("inspect", "m.jsm", "--json").out)
    assert [layer["name"] for layer in info["layers"]] == ["first.weight", "second.weight"]
    assert info["spatial_sparsity"] >= 0.85
    assert info["winograd_sparsity"] >= 0.6
    assert info["file_bytes"] == Path("m.jsm").stat().st_size
    assert "second.weight" in command("inspect", "m.jsm").out

    assert command("decompress", "m.jsm", "-o", "back.onnx").code == 0
    back = onnx.load("back.onnx")
    onnx.checker.check_model(back)
    assert {tensor.name for tensor in back.graph.initializer} >= {"first.weight", "second.weight"}

    done = command("compile", "m.jsm", "--target", "llvm", "--domain", "winograd", "--json", "-o", "m.tar")
    assert done.code == 0, done.err
    plan = json.loads(done.out)
    assert [layer["kernel"] for layer in plan["layers"]] == ["winograd_f4", "direct"]

    x = np.random.default_rng(0).normal(size=(1, 4, 12, 12)).astype(np.float32)
    np.savez("in.npz", x=x)
    done = command("run", "m.tar", "-i", "in.npz", "-o", "out.npz", "--print-time", "--repeat", 2, "--number", 3)
    assert done.code == 0, done.err
    assert "mean (ms)" in done.out
    ours = np.load("out.npz")["output_0"]
    assert ours.shape == (1, 4, 6, 6)

    tvmc = [Path(sys.executable).with_name("tvmc"), "run", "m.tar", "-i", "in.npz", "-o", "tvmc.npz"]
    subprocess.run(tvmc, check=True, capture_output=True)
    np.testing.assert_array_equal(np.load("tvmc.npz")["output_0"], ours)


def test_explain_prints_a_reason_for_every_convolution(command: Command, model: Path) -> None:
    done = command("compile", model, "--target", "llvm", "--explain", "-o", "m.tar")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    for name in ("first", "second"):
        assert any(line.startswith(name) for line in lines)
    assert lines[-1].startswith("m.tar: ")
    assert [line.split("s  ")[1] for line in done.err.splitlines()][-1] == "linking"


def test_run_json(command: Command, model: Path) -> None:
    assert command("compile", model, "--target", "llvm", "--domain", "dense", "-o", "m.tar").code == 0
    document = json.loads(command("run", "m.tar", "--json").out)
    assert document["outputs"] == {"output_0": {"dtype": "float32", "shape": [1, 4, 6, 6]}}
    assert document["time_ms"] is None
    times = json.loads(command("run", "m.tar", "--json", "--print-time", "--repeat", 3).out)["time_ms"]
    assert len(times["results"]) == 3
    assert times["min"] <= times["median"] <= times["max"]


def test_every_json_key_is_documented(command: Command, model: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    documented = set(re.findall(r"`([a-z_]+)`", page))
    command("compress", model, "--winograd-sparsity", 0.5, "-o", "m.jsm")
    for arguments in (
        ("inspect", "m.jsm"),
        ("compile", "m.jsm", "--target", "llvm", "-o", "m.tar"),
        ("run", "m.tar", "--print-time"),
    ):
        document = json.loads(command(*arguments, "--json").out)
        keys = set(document) | set(document.get("time_ms") or {})
        for layer in document.get("layers", []):
            keys |= set(layer)
        assert keys <= documented, keys - documented


FAULTS = [
    (["inspect", "missing.jsm"], "missing.jsm"),
    (["inspect", "model.onnx"], "model.onnx"),
    (["decompress", "missing.jsm", "-o", "out.onnx"], "missing.jsm"),
    (["compress", "missing.onnx", "-o", "m.jsm"], "missing.onnx"),
    (["compress", "model.onnx", "-o", "."], "directory"),
    (["compress", "model.onnx", "-o", "missing/m.jsm"], "no folder"),
    (["compress", "model.txt", "-o", "m.jsm"], "model.txt"),
    (["compress", "model.onnx", "--input-shapes", "z:[1,4,12,12]", "-o", "m.jsm"], "z"),
    (["compress", "w.safetensors", "--network", "vgg", "-o", "m.jsm"], "w.safetensors"),
    (["compile", "model.onnx", "--target", "bogus", "-o", "m.tar"], "bogus"),
    (["compile", "model.onnx", "--target", "llvm -mcpu=nonsense", "-o", "m.tar"], "nonsense"),
    (["compile", "model.onnx", "--target", "llvm", "-o", "."], "directory"),
    (["compile", "model.onnx", "--target", "llvm", "--cross-compiler", "none-g++", "-o", "m.tar"], "none-g++"),
    (["compile", "model.onnx", "--target", "llvm", "--tuning-records", "none.log", "-o", "m.tar"], "none.log"),
    (["compile", "model.onnx", "--target", "llvm", "--input-shapes", "z:[1,4,12,12]", "-o", "m.tar"], "z"),
    (["run", "missing.tar"], "missing.tar"),
    (["run", "model.onnx"], "not a package"),
    (["run", "model.onnx", "-i", "missing.npz"], "missing.npz"),
    (["run", "model.onnx", "-o", "missing/out.npz"], "no folder"),
    (["train", "missing.toml"], "missing.toml"),
    (["train", "ct_srcnn_x3", "--data", "missing"], "missing"),
    (["demo", "--output", "model.onnx"], "model.onnx"),
]


@pytest.mark.parametrize(
    ("arguments", "said"), FAULTS, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_faults_are_one_line_and_exit_code_1(command: Command, model: Path, arguments: list[str], said: str) -> None:
    before = sorted(os.listdir())
    done = command(*arguments)
    assert done.code == 1
    # Stages that began before the fault are lines of their own.
    last = done.err.splitlines()[-1]
    assert last.startswith("jointsparse: ")
    assert said in last
    assert "unexpected" not in last
    assert "Traceback" not in done.err
    assert done.out == ""
    assert sorted(os.listdir()) == before


COMPRESS = ["compress", "model.onnx", "-o", "m.jsm"]
COMPILE = ["compile", "model.onnx", "--target", "llvm", "-o", "m.tar"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no-such-command"], "no-such-command"),
        (["run"], "PACKAGE"),
        (["run", "p.tar", "--no-such-option"], "--no-such-option"),
        (["run", "p.tar", "--repeat", "0"], "--repeat"),
        (["compile", "model.onnx", "-o", "m.tar"], "--target"),
        ([*COMPILE, "--domain", "frequency"], "frequency"),
        ([*COMPILE, "--winograd-sparsity", "1"], "Winograd sparsity 1.0"),
        ([*COMPILE, "--input-shapes", "[1,4"], "--input-shapes"),
        ([*COMPRESS, "--bits", "many"], "--bits"),
        ([*COMPRESS, "--bits", "17"], "17 bits"),
        ([*COMPRESS, "--step", "0.1", "--bits", "4"], "contradict"),
        ([*COMPRESS, "--step", "-1"], "step -1.0"),
        ([*COMPRESS, "--seed", "-1"], "seed -1"),
        ([*COMPRESS, "--spatial-sparsity", "1.5"], "spatial sparsity 1.5"),
        ([*COMPRESS, "--winograd-sparsity", "nan"], "Winograd sparsity nan"),
        ([*COMPRESS, "--tile", "3"], "tile 3"),
        ([*COMPRESS, "--input-shapes", "x=4"], "--input-shapes"),
        ([*COMPRESS, "--set", "depth=3"], "--network"),
        ([*COMPRESS, "--network", "vdsr", "--set", "depth"], "--set"),
        (["train", "ct_srcnn_x3", "--set", "run.seed"], "--set"),
        (["train", "ct_srcnn_x3", "--set", "=3"], "--set"),
        (["train", "ct_srcnn_x3", "--processes", "0"], "--processes"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_exit_code_2(command: Command, model: Path, arguments: list[str], said: str) -> None:
    done = command(*arguments)
    assert done.code == 2
    assert done.out == ""
    assert "Usage: jointsparse" in done.err
    assert said in done.err
    assert "Traceback" not in done.err
    assert sorted(os.listdir()) == ["model.onnx"]


def test_a_model_with_thresholds_of_its_own_is_not_pruned_again(command: Command, model: Path) -> None:
    assert command("compress", model, "--winograd-sparsity", 0.5, "-o", "m.jsm").code == 0
    done = command("compile", "m.jsm", "--target", "llvm", "--winograd-sparsity", 0.5, "-o", "m.tar")
    assert done.code == 1
    last = done.err.splitlines()[-1]
    assert last.startswith("jointsparse: m.jsm: the model carries Winograd thresholds of its own")
    assert not Path("m.tar").exists()


def test_weights_of_a_network_with_options(command: Command, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from jointsparse.frontends.networks import build

    save_file(build("resnet18", width=4, classes=10, stem="cifar").state_dict(), tmp_path / "w.safetensors")
    network = ["compress", "w.safetensors", "-o", "m.jsm", "--network", "resnet18"]
    done = command(*network, "--set", "width=4", "--set", "classes=10", "--set", "stem=cifar")
    assert done.code == 0, done.err
    shapes = {
        layer["name"]: layer["shape"] for layer in json.loads(command("inspect", "m.jsm", "--json").out)["layers"]
    }
    assert shapes["conv1.weight"] == [4, 3, 3, 3]
    assert shapes["fc.weight"] == [10, 32]
    assert command(*network, "--set", "stem=big").code == 1


@pytest.mark.parametrize("arguments", [["-v", "inspect", "missing.jsm"], ["inspect", "missing.jsm", "-v"]])
def test_verbose_shows_the_traceback(command: Command, arguments: list[str]) -> None:
    done = command(*arguments)
    assert done.code == 1
    assert "Traceback" in done.err
    assert done.err.splitlines()[-1].startswith("jointsparse: missing.jsm")


def test_help_of_every_command(command: Command) -> None:
    listed = command("--help")
    assert listed.code == 0
    for name in ("demo", "train", "compress", "decompress", "inspect", "compile", "run"):
        assert name in listed.out
        shown = command(name, "--help")
        assert shown.code == 0
        assert "Usage: jointsparse " + name in shown.out


def test_version(command: Command) -> None:
    from importlib.metadata import version

    assert command("--version").out == f"jointsparse {version('jointsparse')}\n"


def test_installed_script_and_quiet_streams(tmp_path: Path, model: Path) -> None:
    """As a person runs it: nothing on standard error but stages, nothing on standard output but the result."""
    script = Path(sys.executable).with_name("jointsparse")
    arguments = ["compile", str(model), "--target", "llvm", "--domain", "dense", "-o", str(tmp_path / "m.tar")]
    done = subprocess.run([script, *arguments], capture_output=True, text=True, check=True)
    assert [line.split("s  ")[1].split()[0] for line in done.stderr.splitlines()] == [
        "reading",
        "choosing",
        "building",
        "linking",
    ]
    assert done.stdout.count("\n") == 1
    done = subprocess.run([script, "run", tmp_path / "m.tar"], capture_output=True, text=True, check=True)
    assert done.stdout == "output_0: float32 [1, 4, 6, 6]\n"
    assert done.stderr == ""


def test_bench(command: Command, model: Path) -> None:
    done = command("bench", model, "--against", "onnxruntime", "--seconds", 0.01, "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert (document["format"], document["version"]) == ("jointsparse.bench", 2)
    assert (document["threads"], document["isa"], document["seconds"]) == (1, "native", 0.01)
    assert set(document["machine"]) == {"cpu", "llvm_cpu", "cores", "system", "python"}
    engines = {entry["engine"]: entry for entry in document["engines"]}
    assert list(engines) == ["spatial", "winograd", "auto", "tvm", "onnxruntime"]
    for entry in engines.values():
        assert entry["left_out"] is None
        assert entry["error"] < 1e-5
        assert 0 < entry["min_ms"] <= entry["median_ms"]
    peer, build = (engines[document[key]] for key in ("fastest_peer", "fastest_build"))
    quotients = [one / other for one, other in zip(peer["turns_ms"], build["turns_ms"], strict=True)]
    assert document["speed_up"] == pytest.approx(np.median(quotients))


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--against", "tensorrt"], 2, "unknown engine"),
        (["--seconds", 0], 2, "--seconds"),
        (["--threads", 10**6], 1, "threads asked for"),
        (["--input-shapes", "[1,3,12,12]"], 1, "model.onnx"),
    ],
)
def test_bench_refuses(command: Command, model: Path, options: list[object], code: int, said: str) -> None:
    done = command("bench", model, *options)
    assert done.code == code
    assert said in done.err
