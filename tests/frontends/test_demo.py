"""The demo: its parts, the whole of it in short, and in full."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from jointsparse.frontends import demo
from jointsparse.frontends.cli import views
from jointsparse.frontends.errors import InputError

SHORT = demo.Settings(steps=6, repeat=2, crop=(120, 126))
BUILDS = ["bicubic", "dense, ONNX Runtime", "dense, TVM", "spatial", "Winograd", "auto"]


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a person may set it; and what the demo sets by itself would outlive the test."""
    monkeypatch.setenv("TVM_NUM_THREADS", "1")


def _check(result: demo.DemoResult, folder: Path, height: int, width: int) -> None:
    assert result.shape == (height, width)
    assert result.threads == 1, "TVM_NUM_THREADS is respected"
    assert [row.build for row in result.rows] == BUILDS
    bicubic, onnxruntime, dense, spatial, winograd, auto = result.rows
    assert bicubic.psnr is not None
    assert onnxruntime.psnr == pytest.approx(dense.psnr, abs=1e-3)
    assert dense.psnr is not None
    assert dense.psnr > bicubic.psnr + 0.5
    assert onnxruntime.multiplications == dense.multiplications == 112_480
    for row in (spatial, winograd, auto):
        assert row.file_bytes is not None
        assert dense.file_bytes is not None
        assert row.multiplications is not None
        assert row.file_bytes < dense.file_bytes / 10
        assert row.multiplications < 112_480 / 4
    assert all(row.milliseconds for row in result.rows[1:])
    for name in ("bicubic", "dense", "spatial", "winograd", "original"):
        assert Image.open(folder / f"{name}.png").size == (width, height)
    assert Image.open(folder / "comparison.png").width == 5 * 2 * demo.DETAIL[3] + 4 * 4
    written = json.loads((folder / "results.json").read_text())
    assert [row["build"] for row in written["rows"]] == BUILDS


def test_short(tmp_path: Path, threads: None, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(demo, "DETAIL", (5, 6, 110, 110))
    stages: list[str] = []
    result = demo.run_demo(tmp_path / "new" / "folder", SHORT, stages.append)
    _check(result, tmp_path / "new" / "folder", 120, 126)
    assert stages[0].startswith("fine-tuning")
    assert stages[-1] == "running on a photograph never trained on"
    views.show_demo(result)
    printed = capsys.readouterr().out
    assert all(build in printed for build in BUILDS)


@pytest.mark.slow
def test_in_full(tmp_path: Path, threads: None) -> None:
    result = demo.run_demo(tmp_path)
    _check(result, tmp_path, 510, 510)
    bicubic, _, dense, *sparse = (row.psnr for row in result.rows)
    assert bicubic is not None
    assert dense is not None
    for psnr in sparse:
        assert psnr is not None
        assert psnr > bicubic + 1.3
        assert psnr > dense - 0.8


def test_every_engine_gets_the_threads_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVM_NUM_THREADS", "3")
    assert demo._set_threads() == 3
    for wrong in ("many", "0", "-1", ""):
        monkeypatch.setenv("TVM_NUM_THREADS", wrong)
        with pytest.raises(InputError, match="TVM_NUM_THREADS"):
            demo._set_threads()
    monkeypatch.delenv("TVM_NUM_THREADS")
    assert demo._set_threads() == torch.get_num_threads() == int(os.environ["TVM_NUM_THREADS"])


def test_photographs_ship_with_scikit_image() -> None:
    assert demo.TEST_PHOTO not in demo.TRAINING_PHOTOS
    for name in (demo.TEST_PHOTO, *demo.TRAINING_PHOTOS):
        assert min(demo._photo(name).shape[:2]) > 100
