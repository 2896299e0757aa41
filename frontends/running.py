"""Run a package on this machine, as ``tvmc run`` does, with faults found before TVM meets them."""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .outputs import replacing

if TYPE_CHECKING:
    from tvm.driver.tvmc.model import TVMCPackage, TVMCResult


def run_package(
    package: Path,
    inputs: Mapping[str, NDArray[Any]] | None = None,
    *,
    fill_mode: str = "random",
    time: bool = False,
    repeat: int = 1,
    number: int = 1,
) -> TVMCResult:
    """Run a compiled package once, or 1 + repeat * number times to time it.

    Args:
        package: what ``compile_model`` or tvmc wrote.
        inputs: arrays by input name; those missing are filled: random, zeros or ones.
        time: measure. repeat, number: as in TVM's time evaluator: `repeat` means of `number` runs each.

    Returns:
        TVM's result: ``outputs``, arrays by name, and ``times`` in seconds (empty if not timed).

    Raises:
        InputError: if the package cannot be run here or an input does not fit it.
    """
    from tvm.driver.tvmc.runner import run_module

    opened = _open(package)
    given = dict(inputs or {})
    _check_inputs(package, opened, given)
    try:
        return run_module(
            opened, "cpu", inputs=given, fill_mode=fill_mode, benchmark=time, repeat=repeat, number=number
        )
    except Exception as error:
        if "cannot open shared object" in str(error) or "Failed to load dynamic" in str(error):
            raise InputError(
                f"{package}: its library does not load here; was it compiled for another machine?"
            ) from error
        raise


def threads() -> int:
    """Threads that TVM runs a package with in this process."""
    import tvm

    return int(tvm.runtime.num_threads())


def package_inputs(package: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and data type of every input of a package, by name.

    Raises:
        InputError: if it is no package.
    """
    return _input_types(_open(package))


def read_inputs(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz file.

    Raises:
        InputError: if it is none.
    """
    try:
        archive = np.load(path)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise InputError(f"{path}: one bare array; save inputs by name, numpy.savez({path.stem!r}, NAME=array)")
        with archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such file") from error
    except InputError:
        raise
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not a readable .npz file; make one with numpy.savez") from error


def _open(path: Path) -> TVMCPackage:
    from tvm.driver.tvmc import TVMCException
    from tvm.driver.tvmc.model import TVMCPackage

    if not path.is_file():
        raise InputError(f"{path}: there is no such file")
    try:
        package = TVMCPackage(str(path))
    except (tarfile.TarError, TVMCException, OSError, EOFError) as error:
        raise InputError(f"{path}: not a package of compiled code; make one with jointsparse compile") from error
    if package.type != "classic":
        raise InputError(f"{path}: made for TVM's {package.type} executor; compile it for the graph executor")
    return package


def _input_types(package: TVMCPackage) -> dict[str, tuple[tuple[int, ...], str]]:
    from tvm.driver.tvmc.runner import get_input_info

    shapes, types = get_input_info(package.graph, package.params)
    return {name: (tuple(shapes[name]), types[name]) for name in shapes}


def _check_inputs(path: Path, package: TVMCPackage, inputs: Mapping[str, NDArray[Any]]) -> None:
    expected = _input_types(package)
    for name, array in inputs.items():
        if name not in expected:
            raise InputError(f"input {name!r}: {path} has none of this name, but {', '.join(expected)}")
        shape, dtype = expected[name]
        if array.shape != shape or array.dtype != np.dtype(dtype):
            found = f"{array.dtype} {list(array.shape)}"
            raise InputError(f"input {name!r}: {path} takes {dtype} {list(shape)}, not {found}")


def write_outputs(outputs: Mapping[str, NDArray[Any]], path: Path) -> None:
    """Write output arrays by name to an .npz file.

    Raises:
        InputError: if it cannot be written.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **outputs)  # type: ignore[arg-type]  # its stub takes every array for allow_pickle
