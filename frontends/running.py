"""Run a package on this machine, as ``tvmc run`` does, with faults found before TVM meets them."""

from __future__ import annotations

import tarfile
import tempfile
import zlib
from collections.abc import Mapping
from lzma import LZMAError
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import model_file
from .container import Library
from .errors import InputError, printable
from .outputs import replacing

if TYPE_CHECKING:
    from tvm.driver.tvmc.model import TVMCPackage, TVMCResult

InputTypes = dict[str, tuple[tuple[int, ...], str]]


def run_package(
    package: Path,
    inputs: Mapping[str, NDArray[Any]] | None = None,
    *,
    target: str | None = None,
    fill_mode: str = "random",
    time: bool = False,
    repeat: int = 1,
    number: int = 1,
) -> TVMCResult:
    """Run a compiled package once, or 1 + repeat * number times to time it.

    Args:
        package: what ``compile_model`` or tvmc wrote: a PACKAGE.tar, or a .jsm file with a library in it, which is
            native code like any other.
        inputs: arrays by input name; those missing are filled: random, zeros or ones.
        target: part of the target, or the domain, of the library to take from a .jsm file with several.
        time: measure. repeat, number: as in TVM's time evaluator: `repeat` means of `number` runs each.

    Returns:
        TVM's result: ``outputs``, arrays by name, and ``times`` in seconds (empty if not timed).

    Raises:
        InputError: if the package cannot be run here or an input does not fit it.
    """
    from tvm.driver.tvmc.runner import run_module

    opened, expected = _open(package, target)
    given = dict(inputs or {})
    _check_inputs(package, expected, given)
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


def package_inputs(package: Path) -> InputTypes:
    """Shape and data type of every input of a package, by name.

    Raises:
        InputError: if it is no package.
    """
    return _open(package)[1]


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
    except Exception as error:  # at a damaged file, numpy and zipfile pass on what their parsers raise
        raise InputError(f"{path}: not a readable .npz file; make one with numpy.savez") from error


def _open(path: Path, target: str | None = None) -> tuple[TVMCPackage, InputTypes]:
    """The package, and shape and data type of every input, which reads its graph and parameters once."""
    if not path.is_file():
        raise InputError(f"{path}: there is no such file")
    if path.suffix.lower() != ".jsm":
        return _unpacked(path, path)
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder, "package.tar")
        package.write_bytes(_embedded(path, target).package)
        return _unpacked(package, path)


def _embedded(path: Path, target: str | None) -> Library:
    """The one library of a .jsm file, or the one that is asked for."""
    libraries = model_file.read(path).libraries
    if not libraries:
        raise InputError(f"{path}: has no library in it; compile it, with --embed-library or into a package")
    fitting = [one for one in libraries if not target or target in one.target or target == one.domain]
    if len(fitting) != 1:
        names = "; ".join(f"{one.domain} for {one.target}" for one in libraries)
        raise InputError(f"{path}: {len(fitting)} libraries fit; choose one by --target: {printable(names)}")
    return fitting[0]


def _unpacked(package: Path, path: Path) -> tuple[TVMCPackage, InputTypes]:
    """Of a package in its own file; messages name the one it came from."""
    from tvm.driver.tvmc import TVMCException
    from tvm.driver.tvmc.model import TVMCPackage

    try:
        _check_members(package, path)
        opened = TVMCPackage(str(package))
    except (tarfile.TarError, TVMCException, OSError, EOFError, UnicodeDecodeError, zlib.error, LZMAError) as error:
        raise InputError(f"{path}: not a package of compiled code; make one with jointsparse compile") from error
    if opened.type != "classic":
        raise InputError(f"{path}: made for TVM's {opened.type} executor; compile it for the graph executor")
    return opened, _input_types(path, opened)


def _check_members(package: Path, path: Path) -> None:
    """Refuse what would land outside the folder that TVM unpacks to: TVM extracts every member as it is."""
    with tarfile.open(package) as archive:
        for member in archive:
            name = PurePosixPath(member.name)
            if name.is_absolute() or ".." in name.parts or not (member.isfile() or member.isdir()):
                raise InputError(
                    f"{path}: not a package of compiled code: {member.name!r} in it is no plain file; do not trust it"
                )


def _input_types(path: Path, package: TVMCPackage) -> InputTypes:
    from tvm.driver.tvmc.runner import get_input_info

    try:
        shapes, types = get_input_info(package.graph, package.params)
        return {name: (tuple(shapes[name]), types[name]) for name in shapes}
    except Exception as error:  # TVM's reader of parameters and a graph of another form raise many kinds
        raise InputError(f"{path}: its graph or parameters are damaged; compile the model again") from error


def _check_inputs(path: Path, expected: InputTypes, inputs: Mapping[str, NDArray[Any]]) -> None:
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
