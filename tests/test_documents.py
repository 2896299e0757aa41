"""Every command and every Python block of README.md and docs/ runs, in the order in which it is printed."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jointsparse.frontends import shipped
from jointsparse.frontends.recipe import read_recipe
from tests.frontends.onnx_models import two_convolutions, write

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# What the README calls the reader's own.
READERS_OWN = """
import torch
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 1, 3, padding=1))
criterion = torch.nn.functional.mse_loss
batches = [(x, x) for x in torch.rand(3, 4, 1, 12, 12)]
"""


def _blocks(document: Path, language: str) -> list[str]:
    return [body for name, body in BLOCK.findall(document.read_text()) if name == language]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the documents' commands start from."""
    from PIL import Image

    write(two_convolutions(sparsity=0.0), tmp_path / "model.onnx")
    shutil.copy(shipped.weights("ct_srcnn_x3"), tmp_path)
    np.savez(tmp_path / "in.npz", x=np.zeros((1, 4, 12, 12), np.float32))
    noise = np.random.default_rng(0).integers(0, 256, (60, 60), np.uint8)
    for name in ("T91", "Set5", "Set14"):
        (tmp_path / "sr" / name).mkdir(parents=True)
        Image.fromarray(noise).save(tmp_path / "sr" / name / "noise.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_is_something_to_run() -> None:
    assert _blocks(ROOT / "README.md", "python")
    assert all(_blocks(document, "sh") for document in (ROOT / "README.md", ROOT / "docs" / "cli.md"))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the documents compile for x86-64")
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_blocks(document: Path, folder: Path) -> None:
    names: dict[str, object] = {}
    exec(READERS_OWN, names)
    for number, block in enumerate(_blocks(document, "python"), 1):
        exec(compile(block, f"{document.name}, Python block {number}", "exec"), names)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the documents compile for x86-64")
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands(document: Path, folder: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for block in _blocks(document, "sh"):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words[0] == "make":
                # In earnest it would set up an environment; here the target has to exist, with all it depends on.
                words = ["make", "--dry-run", "--directory", str(ROOT), *words[1:]]
            else:
                assert words[0] in ("jointsparse", "tvmc"), line
            done = subprocess.run(words, env={**os.environ, "PATH": path}, capture_output=True, text=True)
            assert done.returncode == 0, f"{line}\n{done.stderr}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_tables_of_recipes(document: Path, tmp_path: Path) -> None:
    """Each may be added to a recipe, and is read."""
    for block in _blocks(document, "toml"):
        recipe = tmp_path / "recipe.toml"
        recipe.write_text(shipped.find_recipe("ct_srcnn_x3").read_text() + block)
        read_recipe(recipe)


def test_files_that_the_documents_point_at_exist() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_demo_picture_is_small() -> None:
    assert (ROOT / "docs" / "demo.png").stat().st_size < 300_000
