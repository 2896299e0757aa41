"""The names that a room offers: loaded when used, and known before to type checkers and editors."""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

ROOMS = pytest.mark.parametrize("room", ["frontends", "passes", "schedules"])


def imported_for_type_checkers(package: ModuleType) -> dict[str, str]:
    """Home by name, of the imports under ``if TYPE_CHECKING``."""
    tree = ast.parse(Path(str(package.__file__)).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    return {name.name: str(line.module) for line in block.body for name in line.names}  # type: ignore[attr-defined]


@ROOMS
def test_type_checkers_see_what_is_loaded_on_first_use(room: str) -> None:
    package = import_module(f"jointsparse.{room}")
    homes = imported_for_type_checkers(package)
    assert sorted(homes) == sorted(package.__all__)
    assert homes.keys() <= set(dir(package))
    for name, home in homes.items():
        assert getattr(package, name) is getattr(import_module(f"jointsparse.{room}.{home}"), name)


@ROOMS
def test_other_names_are_not_there(room: str) -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        import_module(f"jointsparse.{room}").nothing  # noqa: B018
