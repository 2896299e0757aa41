"""Option values with a grammar of their own."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import typer

from ..errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Shape", "overrides", "shapes", "usage"]

Shape = tuple[int, ...]

# One input of tvmc's --input-shapes; the name may be left out.
_SHAPE = re.compile(r"(?:(?P<name>[^\s\[\]]+?)\s*:\s*)?\[(?P<sizes>[\d\s,]+)\]")


@contextmanager
def usage(context: typer.Context) -> Iterator[None]:
    """For checks of the command line itself: an InputError inside is wrong usage, which has an exit code of its own."""
    try:
        yield
    except InputError as error:
        raise typer.BadParameter(str(error), context) from error


def shapes(text: str | None) -> Shape | dict[str, Shape] | None:
    """The value of --input-shapes: a shape without a name, or shapes by name; None for None.

    Raises:
        InputError: if it is not of that form.
    """
    if text is None:
        return None
    found = list(_SHAPE.finditer(text))
    named = {match["name"]: _sizes(match["sizes"]) for match in found if match["name"]}
    if _SHAPE.sub("", text).strip() or not found or len(named) not in (0, len(found)) or (not named and len(found) > 1):
        raise InputError(f"--input-shapes {text!r}: write it as 'NAME:[1,3,224,224]', several with spaces between")
    return named or _sizes(found[0]["sizes"])


def _sizes(text: str) -> Shape:
    return tuple(int(size) for size in re.findall(r"\d+", text))


def overrides(settings: Iterable[str]) -> dict[str, Any]:
    """The values of --set by name, read as TOML; what is no TOML is taken as text.

    Raises:
        InputError: without an equals sign, or a name before it.
    """
    result: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = (part.strip() for part in setting.partition("="))
        if not equals or not name:
            raise InputError(f"--set {setting!r}: write it as NAME=VALUE")
        try:
            result[name] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            result[name] = value
    return result
