"""Files that ship inside the package: recipes and weights."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from .errors import InputError


def find_recipe(name: str) -> Path:
    """The recipe at a path, or the shipped one of that name (with or without .toml).

    Raises:
        InputError: if there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = {path.stem: path for path in sorted(_folder("recipes").glob("*.toml"))}
    if Path(name).name == name and name.removesuffix(".toml") in shipped:
        return shipped[name.removesuffix(".toml")]
    raise InputError(f"{name}: there is no such recipe file; these ship with the package: {', '.join(shipped)}")


def weights(name: str) -> Path:
    """The shipped safetensors file of this name."""
    return _folder("weights") / f"{name}.safetensors"


def _folder(name: str) -> Path:
    # The package is always unpacked on disk: torch and TVM could not be imported from a zip either.
    return Path(str(files(__package__))) / name
