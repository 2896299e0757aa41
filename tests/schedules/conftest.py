"""For tests that say how many threads compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import tvm


@pytest.fixture(scope="module")
def use_threads() -> Iterator[Callable[[int], None]]:
    """Sets how many threads kernels run on, until the last test of a module that asks for it is done."""
    configure = tvm.get_global_func("runtime.config_threadpool")
    yield lambda count: configure(0, count)
    configure(0, 0)
