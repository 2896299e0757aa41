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
        InputError: if `path` is a directory, or its folder is missing or closed to writing.
    """
    if path.is_dir():
        raise InputError(f"{path}: is a directory; name a file to write")
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path}: the folder {path.parent} is not writable; choose another")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, renamed to it when the block ends well and removed when it does not.

    Raises:
        InputError: as check_output.
    """
    check_output(path)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        # The suffix stays: numpy and TVM choose formats by it.
        temporary = Path(folder, path.name)
        yield temporary
        os.replace(temporary, path)
