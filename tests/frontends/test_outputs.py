"""Output files: refused early, replaced whole, left alone when the work fails."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jointsparse.frontends.errors import InputError
from jointsparse.frontends.outputs import check_output, replacing


def test_replaces_whole_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "out.npz"
    path.write_text("old")
    with replacing(path) as temporary:
        assert temporary.name == "out.npz"
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["out.npz"]


def test_failure_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a directory"):
        check_output(tmp_path)
    with pytest.raises(InputError, match="no folder"):
        check_output(tmp_path / "missing" / "file")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="no folder"):
        check_output(tmp_path / "file" / "below")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_closed_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="not writable"):
        check_output(tmp_path / "file")
