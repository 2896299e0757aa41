"""The index of a ``.jsm`` file: what each tensor is, and where its stream lies, checked before anything is decoded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from . import codec
from .coding import floats, tensors
from .container import AXES_MOST, INDEX_MOST, TENSORS_MOST, TYPES, WEIGHTS_MOST
from .container_json import check_keys, is_int, is_name, is_positive_float32, parse_json, refuse
from .errors import InputError

__all__ = ["Entry", "checked_entries", "comes_coded", "item_size", "parse_index"]


@dataclass(frozen=True)
class Entry:
    """A checked index entry; the stream lies at ``start`` in the DATA section."""

    name: str
    shape: tuple[int, ...]
    kind: str
    fields: Mapping[str, Any]
    start: int
    length: int
    size: int

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def scales(self) -> int:
        """Numbers of the scale."""
        return self.shape[self.fields["scale"]] if "scale" in self.fields else 0

    @property
    def tail(self) -> int:
        """Bytes of the scale as it is, at the end of the stream or of what comes out of it."""
        return 0 if self.fields.get("coder") == codec.SCALED_CODES else 4 * self.scales


def parse_index(text: bytes) -> dict[str, Any]:
    index = parse_json(text, "index", dict)
    check_keys(index, {"books", "tensors", "winograd"}, set(), "index")
    for key in ("books", "tensors"):
        if not isinstance(index[key], list) or len(index[key]) > TENSORS_MOST:
            raise InputError(f"index: {key} must be a list of at most {TENSORS_MOST}; do not trust this file")
    return index


def checked_entries(index: dict[str, Any], data_length: int) -> tuple[list[Entry], list[Entry]]:
    """The checked codebooks and tensors. Nothing is decoded before all are known to fit the limits and the section."""
    books: list[Entry] = []
    tensors: dict[str, Entry] = {}
    start = total = 0
    for position, fields in enumerate(index["books"] + index["tensors"]):
        is_book = position < len(index["books"])
        entry = _book_entry(fields, position, start) if is_book else _entry(fields, start, tensors, len(books))
        start += entry.length
        total += max(entry.size, 0 if is_book else entry.count * item_size(entry) + 4 * entry.scales)
        if start > data_length or total > WEIGHTS_MOST:
            raise refuse(entry.name, "it and those before it are larger than the file or the format allows")
        if is_book:
            books.append(entry)
        else:
            tensors[entry.name] = entry
    if start != data_length:
        raise InputError(f"index: the streams have {start} bytes, not the {data_length} there; do not trust this file")
    return books, list(tensors.values())


_KEYS = {
    "raw": ({"type"}, set[str]()),
    "codes": ({"step"}, {"width", "seed", "book"}),
    "shared": ({"of"}, set[str]()),
}
_STREAM_KEYS = {"coder", "length", "crc"}
_CODES = (codec.CODES, codec.SCALED_CODES)


def _book_entry(fields: Any, position: int, start: int) -> Entry:
    name = f"codebook {position}"
    check_keys(fields, {"count"} | _STREAM_KEYS, set(), name)
    if not is_int(fields["count"], 1, INDEX_MOST):
        raise refuse(name, "count must be a positive integer")
    return _with_stream(Entry(name, (fields["count"],), "book", fields, start, 0, 8 * fields["count"]))


def _with_stream(entry: Entry) -> Entry:
    """The entry with the length of its stream, which must be able to hold its size."""
    fields = entry.fields
    if any(not is_int(fields.get(key, 0), 0, 2**32 - 1) for key in _STREAM_KEYS):
        raise refuse(entry.name, "coder, length and crc must be unsigned integers")
    if comes_coded(entry):
        length = fields["length"] - entry.tail
        numbers = entry.count + entry.scales
        if not 0 <= length <= tensors.longest(numbers) or entry.count > tensors.most(length):
            raise refuse(entry.name, f"{fields['length']} bytes cannot hold the {entry.count} codes declared")
        return replace(entry, length=fields["length"])
    coder = codec.CODERS.get(fields.get("coder", 0))
    length = fields.get("length", 0)
    if coder is None:
        raise refuse(entry.name, f"coder {fields['coder']} is unknown; a newer jointsparse may know it")
    if entry.size > coder.most(length):
        raise refuse(entry.name, f"{length} bytes of {coder.name} cannot hold the {entry.size} bytes declared")
    return replace(entry, length=length)


def _entry(fields: Any, start: int, seen: Mapping[str, Entry], books: int) -> Entry:
    if not isinstance(fields, dict):
        raise InputError("index: a tensor must be an object; do not trust this file")
    name, kind, shape = str(fields.get("name")), fields.get("kind"), fields.get("shape")
    if not is_name(fields.get("name")) or name in seen:
        raise InputError(f"index: {name[:40]!r} is no name, or stands twice; do not trust this file")
    if not isinstance(kind, str) or kind not in _KEYS:
        raise refuse(name, f"kind {str(kind)[:40]!r} is unknown; a newer jointsparse may know it")
    if not isinstance(shape, list) or len(shape) > AXES_MOST or not all(is_int(n, 1, 2**31 - 1) for n in shape):
        raise refuse(name, "the shape must be a short list of positive integers")
    needed, optional = _KEYS[kind]
    has_stream = kind != "shared" or "scale" in fields
    streams = _STREAM_KEYS if has_stream else set[str]()
    check_keys(fields, {"name", "kind", "shape"} | needed | streams, optional | {"scale"}, f"tensor {name!r}")
    _check_fields(name, kind, shape, fields, seen, books)
    entry = Entry(name, tuple(shape), kind, fields, start, 0, 0)
    return _with_stream(replace(entry, size=_payload_size(entry)))


def _check_fields(
    name: str, kind: str, shape: list[int], fields: Mapping[str, Any], seen: Mapping[str, Entry], books: int
) -> None:
    """Types and ranges of one entry's fields."""
    if "scale" in fields and not is_int(fields["scale"], 0, len(shape) - 1):
        raise refuse(name, "scale must be one of its axes")
    if kind == "raw" and (not isinstance(fields["type"], str) or fields["type"] not in TYPES):
        raise refuse(name, f"type {str(fields['type'])[:40]!r} is unknown")
    if kind == "raw" and "scale" in fields and fields["type"] != "float32":
        raise refuse(name, "only float32 tensors have a scale")
    if kind == "codes":
        _check_width(name, shape, fields)
        if type(fields["step"]) is not float or not is_positive_float32(fields["step"]):
            raise refuse(name, "step must be a positive float32 number")
        if not is_int(fields.get("seed", 0), 0, 2**63 - 1):
            raise refuse(name, "seed must be an integer from 0 to 2^63 - 1")
        if "book" in fields and not is_int(fields["book"], 0, books - 1):
            raise refuse(name, "book must be the number of a codebook")
    if kind == "shared":
        other = seen.get(fields["of"]) if isinstance(fields["of"], str) else None
        if other is None or other.kind == "shared" or list(other.shape) != shape or not _is_float32(other):
            raise refuse(name, "it must share a float32 tensor of its shape that stands before it")


def _check_width(name: str, shape: list[int], fields: Mapping[str, Any]) -> None:
    coder, width = fields["coder"], fields.get("width")
    if coder in _CODES and width is not None:
        raise refuse(name, f"codes of coder {coder} have no width")
    if coder == codec.SCALED_CODES and not ("scale" in fields and shape[fields["scale"]] <= floats.MOST):
        raise refuse(name, f"coder {coder} is for codes with a scale of at most {floats.MOST} numbers")
    # Any other value for a coder is refused later.
    if coder in [*codec.CODERS] and not (is_int(width, 1, 4) and width != 3):
        raise refuse(name, "width must be 1, 2 or 4")


def comes_coded(entry: Entry) -> bool:
    """Whether the stream is of codes rather than of bytes."""
    return entry.kind == "codes" and entry.fields["coder"] in _CODES


def _is_float32(entry: Entry) -> bool:
    return entry.kind == "codes" or entry.fields.get("type") == "float32"


def item_size(entry: Entry) -> int:
    return np.dtype(entry.fields["type"]).itemsize if entry.kind == "raw" else 4


def _payload_size(entry: Entry) -> int:
    fields = entry.fields
    item = {"raw": item_size(entry), "codes": fields.get("width", 4), "shared": 0}[entry.kind]
    return entry.count * int(item) + entry.tail
