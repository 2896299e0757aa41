"""Which sources are running."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

_ROOMS = ("frontends", "passes", "schedules")


@cache
def digest() -> str:
    """Eight hexadecimal digits of all Python sources that shape a compiled library: another kernel, other digits.

    Those of the measurement itself do not count.
    """
    here = Path(__file__).resolve().parent
    root = here.parent.parent
    total = hashlib.sha256()
    for path in sorted(path for room in _ROOMS for path in (root / room).rglob("*.py")):
        if here not in path.parents and "cli" not in path.parts:
            total.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:8]
