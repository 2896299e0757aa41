"""What is installed: the wheel's contents, and that each half of the package works without the other's libraries."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.frontends.onnx_models import two_convolutions, write

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("frontends", "passes", "schedules", "tuning_logs")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tree, so that nothing is left in the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for room in ROOMS:
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_wheel_holds_every_module_and_data_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"jointsparse/{path.relative_to(ROOT)}"
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "jointsparse/frontends/py.typed" in expected
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size < 1_500_000


WITHOUT = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None  # any import of it fails
"""


def _python(code: str, blocked: tuple[str, ...], folder: Path) -> str:
    """Run code in a new interpreter in which some modules cannot be imported."""
    program = WITHOUT.format(blocked=blocked) + code
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_light_imports(tmp_path: Path) -> None:
    code = """
import jointsparse.frontends, jointsparse.passes, jointsparse.schedules
import jointsparse.frontends.cli, jointsparse.frontends.engines.measuring
from jointsparse.schedules import formats, geometry, winograd
"""
    _python(code, ("torch", "tvm", "lightning", "onnxruntime", "openvino", "skimage"), tmp_path)


def test_training_works_without_tvm(tmp_path: Path) -> None:
    code = """
import torch
from torch import nn
from jointsparse import frontends

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 3, padding=1))
objective = frontends.JointSparsity(model, spatial=0.5, winograd=0.5, tile=2)
optimiser = torch.optim.Adam([*model.parameters(), *objective.parameters()], lr=1e-3)
x = torch.rand(2, 1, 8, 8)
for _ in range(3):
    loss = nn.functional.mse_loss(model(x), x)
    optimiser.zero_grad()
    (loss + objective(loss)).backward()
    optimiser.step()
objective.prune_("spatial")
frontends.quantize_(model, step=0.01)
frontends.save(model, x[:1], "m.jsm", objective=objective)
print(frontends.inspect("m.jsm").spatial_sparsity)
"""
    assert float(_python(code, ("tvm",), tmp_path)) >= 0.5


def test_compiling_and_running_work_without_torch(tmp_path: Path) -> None:
    write(two_convolutions(), tmp_path / "model.onnx")
    main = "import sys; sys.argv[1:] = {!r}; from jointsparse.frontends.cli import main; main()"
    blocked = ("torch", "lightning", "safetensors", "onnxscript", "PIL", "skimage", "onnxruntime")
    for arguments in (
        ["compress", "model.onnx", "--spatial-sparsity", "0.5", "-o", "m.jsm"],
        ["compile", "m.jsm", "--target", "llvm", "-o", "m.tar"],
        ["run", "m.tar", "-o", "out.npz"],
    ):
        _python(main.format(arguments), blocked, tmp_path)
    assert (tmp_path / "out.npz").is_file()


@pytest.mark.parametrize(
    ("arguments", "blocked", "said"),
    [
        (["compile", "m.onnx", "--target", "llvm", "-o", "m.tar"], "tvm", "needs Apache TVM 0.19"),
        (["run", "m.tar"], "tvm", "needs Apache TVM 0.19"),
        (["bench", "m.onnx"], "tvm", "needs Apache TVM 0.19"),
        (["train", "ct_srcnn_x3"], "lightning", "jointsparse[train]"),
        (["demo"], "torch", "jointsparse[train]"),
    ],
)
def test_what_is_missing_is_named(arguments: list[str], blocked: str, said: str, tmp_path: Path) -> None:
    write(two_convolutions(), tmp_path / "m.onnx")
    (tmp_path / "m.tar").write_bytes(b"")
    code = f"import sys; sys.argv[1:] = {arguments!r}; from jointsparse.frontends.cli import main; main()"
    program = WITHOUT.format(blocked=(blocked,)) + code
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_wheel_in_a_new_environment_compiles_and_runs(wheel: Path, tmp_path: Path) -> None:
    """No extras: TVM, no torch. About a minute, and some hundred megabytes from the package index."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    pins = ROOT / "constraints" / f"{sys.version_info.major}.{sys.version_info.minor}.txt"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "-c", pins, wheel], check=True)
    assert subprocess.run([python, "-c", "import torch"], capture_output=True).returncode != 0
    write(two_convolutions(), tmp_path / "model.onnx")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    for arguments in (
        ["compress", "model.onnx", "-o", "m.jsm"],
        ["compile", "m.jsm", "--target", "llvm", "-o", "m.tar"],
        ["run", "m.tar", "-o", "out.npz"],
    ):
        script = tmp_path / "venv" / "bin" / "jointsparse"
        subprocess.run([script, *arguments], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "out.npz").is_file()
