"""JSON from a stranger: every key, type and range checked, one InputError for whatever is wrong."""

from __future__ import annotations

import json
from typing import Any, TypeVar

import numpy as np

from .container import NAME_MOST
from .errors import InputError

__all__ = ["check_keys", "is_int", "is_name", "is_positive_float32", "parse_json", "refuse"]

T = TypeVar("T")


def parse_json(text: bytes, what: str, kind: type[T]) -> T:
    """An object or list; a key twice, and numbers that are none, are refused."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("a key stands twice")
        return dict(pairs)

    def no_constant(name: str) -> float:
        raise ValueError(f"{name} is no number")

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what}: not valid JSON ({error}); do not trust this file") from None
    if not isinstance(value, kind):
        raise InputError(f"{what}: must be {_JSON_NAMES[kind]}; do not trust this file")
    return value


_JSON_NAMES: dict[type, str] = {dict: "an object", list: "a list"}


def check_keys(fields: Any, needed: set[str], optional: set[str], what: str) -> None:
    """Every key known or optional by its name; the needed ones there."""
    if not isinstance(fields, dict):
        raise InputError(f"{what}: must be an object; do not trust this file")
    missing = needed - fields.keys()
    unknown = {key for key in fields.keys() - needed - optional if not key.startswith("x-")}
    if missing or unknown:
        problem = f"lacks {min(missing)!r}" if missing else f"needs {min(unknown)[:40]!r}, unknown to this version"
        raise InputError(f"{what}: {problem}; upgrade jointsparse, or do not trust this file")


def is_name(name: Any) -> bool:
    if not isinstance(name, str) or not 0 < len(name) <= NAME_MOST:
        return False
    # A lone surrogate can stand in JSON but in no protobuf string.
    return not any(0xD800 <= ord(c) <= 0xDFFF for c in name)


def is_int(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def is_positive_float32(value: float) -> bool:
    return 0 < value <= float(np.finfo(np.float32).max) and float(np.float32(value)) == value


def refuse(name: str, why: str) -> InputError:
    return InputError(f"tensor {name[:80]!r}: {why}; do not trust this file")
