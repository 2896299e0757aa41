"""Output files: refused early where they cannot be written, and never seen half written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import InputError


def check_output(path: Path) -> None:
    """Refuse an output file that cannot be written, before the work that would fill it.

    Raises:
        InputError: if `path` is a directory, a device or a pipe, or its folder is missing or closed to writing. Of a
            symbolic link its end counts.
    """
    folder = _followed(path).parent
    if path.is_dir():
        raise InputError(f"{path}: is a directory; name a file to write")
    if path.exists() and not path.is_file():
        # A rename would put a file in its place: fatal for /dev/null.
        raise InputError(f"{path}: not a regular file; name a file to write")
    if not folder.is_dir():
        raise InputError(f"{path}: there is no folder {folder}; make it first")
    if not os.access(folder, os.W_OK):
        raise InputError(f"{path}: the folder {folder} is not writable; choose another")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, renamed to it when the block ends well and removed when it does not.

    A symbolic link stays, and the file that it leads to is replaced.

    Raises:
        InputError: as check_output.
    """
    check_output(path)
    end = _followed(path)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=end.parent) as folder:
        # The suffix stays: numpy and TVM choose formats by it.
        temporary = Path(folder, path.name)
        yield temporary
        os.replace(temporary, end)


def _followed(path: Path) -> Path:
    """Where a symbolic link leads, which need not exist; any other path as it is, so that messages can show it."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path
