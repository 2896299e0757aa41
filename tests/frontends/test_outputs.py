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


def test_pipe_is_refused_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(InputError, match="pipe: not a regular file"):
        check_output(path)
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(InputError, match="link: not a regular file"), replacing(link):
        pass
    assert path.is_fifo()
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]


@pytest.mark.parametrize("exists", [True, False])
def test_link_stays_and_its_end_is_replaced(tmp_path: Path, exists: bool) -> None:
    end, link = tmp_path / "folder" / "end", tmp_path / "link.npz"
    end.parent.mkdir()
    if exists:
        end.write_text("old")
    link.symlink_to(Path("folder", "end"))
    with replacing(link) as temporary:
        assert temporary.suffix == ".npz"
        temporary.write_text("new")
    assert link.is_symlink()
    assert end.read_text() == "new"
    assert os.listdir(end.parent) == ["end"]


def test_link_into_a_missing_folder(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "missing" / "end")
    with pytest.raises(InputError, match=r"no folder .*missing"):
        check_output(link)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_closed_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="not writable"):
        check_output(tmp_path / "file")
