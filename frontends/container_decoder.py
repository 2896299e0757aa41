"""The bytes of a ``.jsm`` file to its contents, safe on a stranger's file.

Every declared size is checked against fixed limits, and against what its stream can expand to, before anything is
allocated; whatever is wrong is one InputError.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from . import codec, onnx_graph, winograd_spec
from .coding import floats, tensors
from .container import (
    AXES_MOST,
    CRC,
    GRAPH_MOST,
    INDEX_MOST,
    LIBRARIES,
    LIBRARIES_MOST,
    LIST,
    LIST_MOST,
    MAGIC,
    NAME_MOST,
    PREFIX,
    REQUIRED,
    SECTION,
    TENSORS_MOST,
    TEXT,
    TYPES,
    VERSION,
    WEIGHTS_MOST,
    Contents,
    Library,
    Record,
    Shared,
    Sizes,
    digest,
    text_most,
)
from .errors import InputError
from .quantization import LayerQuantization


def decode(data: bytes, where: str = "the file") -> Contents:
    """The contents of a file.

    Args:
        data: all its bytes. where: the file's name, for messages.

    Raises:
        InputError: it is no such file, is damaged, was made by a newer version, or declares more than the limits.
    """
    try:
        sections = _sections(memoryview(data))
        index = _parse_index(_read_text(sections[b"INDX"], INDEX_MOST, "index"))
        books, entries = _entries(index, len(sections[b"DATA"]))
        graph = _parse_graph(_read_text(sections[b"GRPH"], GRAPH_MOST, "graph"), entries)
        records = _read_records(books, entries, sections[b"DATA"])
        libraries = _libraries(sections[LIBRARIES]) if LIBRARIES in sections else ()
        shapes = {record.name: record.shape for record in records}
        winograd = winograd_spec.parse(index["winograd"], shapes, "index")
        for record in records:
            if record.name in winograd and record.scale is not None and record.axis != 0:
                raise _refuse(record.name, "a Winograd threshold needs a scale of output channels")
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    sizes = Sizes(
        tensors={entry.name: entry.length for entry in entries},
        streams=len(sections[b"DATA"]),
        graph=len(sections[b"GRPH"]),
        index=len(sections[b"INDX"]),
        libraries=SECTION.size + len(sections[LIBRARIES]) + CRC.size if LIBRARIES in sections else 0,
        file=len(data),
    )
    return Contents(graph, records, winograd, libraries, sizes)


@dataclass(frozen=True)
class _Entry:
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


def _sections(data: memoryview) -> dict[bytes, memoryview]:
    """The required sections, all checksums verified."""
    if len(data) < PREFIX.size or bytes(data[: len(MAGIC)]) != MAGIC:
        raise InputError("not a .jsm file; give a file made by jointsparse save or compress")
    _, version, flags, length = PREFIX.unpack_from(data)
    if version != VERSION or flags:
        raise InputError(f"version {version} of the format; this jointsparse reads version {VERSION}; upgrade it")
    if length != len(data):
        kind = "truncated" if length > len(data) else "followed by foreign bytes"
        raise InputError(f"{kind}: it has {len(data)} bytes of {length}; get the file again")
    found: dict[bytes, memoryview] = {}
    end = PREFIX.size
    while b"END " not in found:
        start = end
        tag, payload, end = _read_section(data, start)
        if tag in found:
            raise InputError(f"damaged: two sections {tag.decode()!r}; get the file again")
        if tag in (*REQUIRED, LIBRARIES):
            found[tag] = payload
        elif not 0x61 <= tag[0] <= 0x7A:
            raise InputError(f"needs section {tag!r}, unknown to this version; upgrade jointsparse")
    if end != len(data) or found[b"END "] != digest(data[:start]):
        raise InputError("damaged: the checksum of the whole file is wrong; get the file again")
    for tag in REQUIRED:
        if tag not in found:
            raise InputError(f"damaged: no section {tag.decode()!r}; get the file again")
    return found


def _read_section(data: memoryview, start: int) -> tuple[bytes, memoryview, int]:
    """Tag, payload and end of the section at ``start``."""
    if start + SECTION.size + CRC.size > len(data):
        raise InputError(f"damaged: no room for a section at byte {start}; get the file again")
    tag, length = SECTION.unpack_from(data, start)
    first = start + SECTION.size
    last = first + length
    if last + CRC.size > len(data):
        raise InputError(f"damaged: the section at byte {start} is longer than the file; get the file again")
    payload = data[first:last]
    if zlib.crc32(payload, zlib.crc32(tag)) != CRC.unpack_from(data, last)[0]:
        raise InputError(f"damaged: the checksum of the section at byte {start} is wrong; get the file again")
    return tag, payload, last + CRC.size


def _read_text(payload: memoryview, most: int, what: str) -> bytes:
    if len(payload) < TEXT.size:
        raise InputError(f"damaged: the {what} is too short; get the file again")
    coder, size = TEXT.unpack_from(payload)
    stream = bytes(payload[TEXT.size :])
    if size > min(most, text_most(len(stream))):
        raise InputError(f"the {what} declares {size} bytes, more than the format allows; do not trust this file")
    return _decode_stream(coder, stream, size, what)


def _decode_stream(coder: int, stream: bytes, size: int, what: str) -> bytes:
    try:
        return codec.decode(coder, stream, size)
    except InputError as error:
        raise InputError(f"{what}: {error}") from None


def _parse_index(text: bytes) -> dict[str, Any]:
    index = _parse_json(text, "index", dict)
    _check_keys(index, {"books", "tensors", "winograd"}, set(), "index")
    for key in ("books", "tensors"):
        if not isinstance(index[key], list) or len(index[key]) > TENSORS_MOST:
            raise InputError(f"index: {key} must be a list of at most {TENSORS_MOST}; do not trust this file")
    return index


T = TypeVar("T")


def _parse_json(text: bytes, what: str, kind: type[T]) -> T:
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


def _entries(index: dict[str, Any], data_length: int) -> tuple[list[_Entry], list[_Entry]]:
    """The checked codebooks and tensors. Nothing is decoded before all are known to fit the limits and the section."""
    books: list[_Entry] = []
    tensors: dict[str, _Entry] = {}
    start = total = 0
    for position, fields in enumerate(index["books"] + index["tensors"]):
        is_book = position < len(index["books"])
        entry = _book_entry(fields, position, start) if is_book else _entry(fields, start, tensors, len(books))
        start += entry.length
        total += max(entry.size, 0 if is_book else entry.count * _item_size(entry) + 4 * entry.scales)
        if start > data_length or total > WEIGHTS_MOST:
            raise _refuse(entry.name, "it and those before it are larger than the file or the format allows")
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


def _book_entry(fields: Any, position: int, start: int) -> _Entry:
    name = f"codebook {position}"
    _check_keys(fields, {"count"} | _STREAM_KEYS, set(), name)
    if not _is_int(fields["count"], 1, INDEX_MOST):
        raise _refuse(name, "count must be a positive integer")
    return _with_stream(_Entry(name, (fields["count"],), "book", fields, start, 0, 8 * fields["count"]))


def _with_stream(entry: _Entry) -> _Entry:
    """The entry with the length of its stream, which must be able to hold its size."""
    fields = entry.fields
    if any(not _is_int(fields.get(key, 0), 0, 2**32 - 1) for key in _STREAM_KEYS):
        raise _refuse(entry.name, "coder, length and crc must be unsigned integers")
    if _comes_coded(entry):
        length = fields["length"] - entry.tail
        numbers = entry.count + entry.scales
        if not 0 <= length <= tensors.longest(numbers) or entry.count > tensors.most(length):
            raise _refuse(entry.name, f"{fields['length']} bytes cannot hold the {entry.count} codes declared")
        return replace(entry, length=fields["length"])
    coder = codec.CODERS.get(fields.get("coder", 0))
    length = fields.get("length", 0)
    if coder is None:
        raise _refuse(entry.name, f"coder {fields['coder']} is unknown; a newer jointsparse may know it")
    if entry.size > coder.most(length):
        raise _refuse(entry.name, f"{length} bytes of {coder.name} cannot hold the {entry.size} bytes declared")
    return replace(entry, length=length)


def _entry(fields: Any, start: int, seen: Mapping[str, _Entry], books: int) -> _Entry:
    if not isinstance(fields, dict):
        raise InputError("index: a tensor must be an object; do not trust this file")
    name, kind, shape = str(fields.get("name")), fields.get("kind"), fields.get("shape")
    if not _is_name(fields.get("name")) or name in seen:
        raise InputError(f"index: {name[:40]!r} is no name, or stands twice; do not trust this file")
    if not isinstance(kind, str) or kind not in _KEYS:
        raise _refuse(name, f"kind {str(kind)[:40]!r} is unknown; a newer jointsparse may know it")
    if not isinstance(shape, list) or len(shape) > AXES_MOST or not all(_is_int(n, 1, 2**31 - 1) for n in shape):
        raise _refuse(name, "the shape must be a short list of positive integers")
    needed, optional = _KEYS[kind]
    has_stream = kind != "shared" or "scale" in fields
    streams = _STREAM_KEYS if has_stream else set[str]()
    _check_keys(fields, {"name", "kind", "shape"} | needed | streams, optional | {"scale"}, f"tensor {name!r}")
    _check_fields(name, kind, shape, fields, seen, books)
    entry = _Entry(name, tuple(shape), kind, fields, start, 0, 0)
    return _with_stream(replace(entry, size=_payload_size(entry)))


def _check_fields(
    name: str, kind: str, shape: list[int], fields: Mapping[str, Any], seen: Mapping[str, _Entry], books: int
) -> None:
    """Types and ranges of one entry's fields."""
    if "scale" in fields and not _is_int(fields["scale"], 0, len(shape) - 1):
        raise _refuse(name, "scale must be one of its axes")
    if kind == "raw" and (not isinstance(fields["type"], str) or fields["type"] not in TYPES):
        raise _refuse(name, f"type {str(fields['type'])[:40]!r} is unknown")
    if kind == "raw" and "scale" in fields and fields["type"] != "float32":
        raise _refuse(name, "only float32 tensors have a scale")
    if kind == "codes":
        _check_width(name, shape, fields)
        if type(fields["step"]) is not float or not _is_positive_float32(fields["step"]):
            raise _refuse(name, "step must be a positive float32 number")
        if not _is_int(fields.get("seed", 0), 0, 2**63 - 1):
            raise _refuse(name, "seed must be an integer from 0 to 2^63 - 1")
        if "book" in fields and not _is_int(fields["book"], 0, books - 1):
            raise _refuse(name, "book must be the number of a codebook")
    if kind == "shared":
        other = seen.get(fields["of"]) if isinstance(fields["of"], str) else None
        if other is None or other.kind == "shared" or list(other.shape) != shape or not _is_float32(other):
            raise _refuse(name, "it must share a float32 tensor of its shape that stands before it")


def _check_width(name: str, shape: list[int], fields: Mapping[str, Any]) -> None:
    coder, width = fields["coder"], fields.get("width")
    if coder in _CODES and width is not None:
        raise _refuse(name, f"codes of coder {coder} have no width")
    if coder == codec.SCALED_CODES and not ("scale" in fields and shape[fields["scale"]] <= floats.MOST):
        raise _refuse(name, f"coder {coder} is for codes with a scale of at most {floats.MOST} numbers")
    # Any other value for a coder is refused later.
    if coder in [*codec.CODERS] and not (_is_int(width, 1, 4) and width != 3):
        raise _refuse(name, "width must be 1, 2 or 4")


def _comes_coded(entry: _Entry) -> bool:
    """Whether the stream is of codes rather than of bytes."""
    return entry.kind == "codes" and entry.fields["coder"] in _CODES


def _is_float32(entry: _Entry) -> bool:
    return entry.kind == "codes" or entry.fields.get("type") == "float32"


def _item_size(entry: _Entry) -> int:
    return np.dtype(entry.fields["type"]).itemsize if entry.kind == "raw" else 4


def _payload_size(entry: _Entry) -> int:
    fields = entry.fields
    item = {"raw": _item_size(entry), "codes": fields.get("width", 4), "shared": 0}[entry.kind]
    return entry.count * int(item) + entry.tail


def _read_records(books: list[_Entry], entries: list[_Entry], data: memoryview) -> tuple[Record, ...]:
    read_books = [_read_book(book, data) for book in books]
    return tuple(_read_record(entry, data, read_books) for entry in entries)


def _read_payload(entry: _Entry, data: memoryview) -> bytes:
    stream = bytes(data[entry.start : entry.start + entry.length])
    if zlib.crc32(stream) != entry.fields.get("crc", 0):
        raise InputError(f"damaged: the checksum of tensor {entry.name!r} is wrong; get the file again")
    if not entry.size:
        return b""
    if _comes_coded(entry):
        return stream
    return _decode_stream(entry.fields["coder"], stream, entry.size, f"tensor {entry.name!r}")


def _read_book(entry: _Entry, data: memoryview) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    payload = _read_payload(entry, data)
    codes = np.frombuffer(payload, "<i4", entry.count).astype(np.int32)
    if np.any(codes[1:] <= codes[:-1]) or np.any(codes == 0):
        raise _refuse(entry.name, "its codes do not ascend, or 0 is among them")
    return codes, _floats(payload[4 * entry.count :], entry.name)


_Books = list[tuple[NDArray[np.int32], NDArray[np.float32]]]


def _read_record(entry: _Entry, data: memoryview, books: _Books) -> Record:
    payload = _read_payload(entry, data)
    body, tail = payload[: len(payload) - entry.tail], payload[len(payload) - entry.tail :]
    base: NDArray[Any] | LayerQuantization | Shared
    if entry.kind == "shared":
        base, scale = Shared(entry.fields["of"]), None
    elif entry.kind == "raw":
        base, scale = _read_raw(entry, body), None
    else:
        codes, scale = _decode_codes(entry, body) if _comes_coded(entry) else (_join_planes(entry, body), None)
        base = _quantisation(entry, codes, books)
    if scale is not None:
        _check_finite(scale, entry.name)
    elif "scale" in entry.fields:
        scale = _floats(tail, entry.name)
    return Record(entry.name, entry.shape, base, scale, entry.fields.get("scale", 0))


def _read_raw(entry: _Entry, payload: bytes) -> NDArray[Any]:
    dtype = np.dtype(entry.fields["type"])
    if dtype == np.bool_ and payload.strip(b"\0\1"):
        raise _refuse(entry.name, "a truth value is neither 0 nor 1")
    return np.frombuffer(payload, dtype.newbyteorder("<")).astype(dtype, copy=False).reshape(entry.shape)


def _quantisation(entry: _Entry, codes: NDArray[np.int32], books: _Books) -> LayerQuantization:
    step = entry.fields["step"]
    if (max(-int(codes.min()), int(codes.max())) + 1) * step > float(np.finfo(np.float32).max):
        raise _refuse(entry.name, "a value exceeds float32")
    codebook = None
    if "book" in entry.fields:
        codebook = _look_up(np.unique(codes), books[entry.fields["book"]], entry.name)
    return LayerQuantization(codes, step, entry.fields.get("seed"), codebook)


def _decode_codes(entry: _Entry, stream: bytes) -> tuple[NDArray[np.int32], NDArray[np.float32] | None]:
    try:
        return tensors.decode(
            stream, entry.shape, entry.scales if entry.fields["coder"] == codec.SCALED_CODES else None
        )
    except ValueError as error:
        raise _refuse(entry.name, str(error)) from None


def _join_planes(entry: _Entry, payload: bytes) -> NDArray[np.int32]:
    width = entry.fields["width"]
    planes = np.frombuffer(payload, np.uint8).reshape(width, entry.count)
    return np.ascontiguousarray(planes.T).view(f"<i{width}").astype(np.int32, copy=False).reshape(entry.shape)


def _look_up(
    distinct: NDArray[np.int32], book: tuple[NDArray[np.int32], NDArray[np.float32]], name: str
) -> NDArray[np.float32]:
    """The values of the distinct codes of a layer; 0 stands for 0."""
    codes, values = book
    position = np.minimum(np.searchsorted(codes, distinct), len(codes) - 1)
    if np.any((codes[position] != distinct) & (distinct != 0)):
        raise _refuse(name, "a code is not in its codebook")
    return np.where(distinct == 0, np.float32(0), values[position])


def _floats(payload: bytes, name: str) -> NDArray[np.float32]:
    values = np.frombuffer(payload, "<f4").astype(np.float32)
    _check_finite(values, name)
    return values


def _check_finite(values: NDArray[np.float32], name: str) -> None:
    if not np.all(np.isfinite(values)):
        raise _refuse(name, "a value that must be finite is not")


def _parse_graph(text: bytes, entries: list[_Entry]) -> ModelProto:
    model = ModelProto()
    try:
        model.ParseFromString(text)
    except (DecodeError, ValueError, RecursionError):
        raise InputError("graph: not an ONNX model; do not trust this file") from None
    if model.functions or model.training_info:
        raise InputError("graph: it has functions or training steps; do not trust this file")
    if any(t.data_location != TensorProto.DEFAULT or t.external_data for t in onnx_graph.tensors(model.graph)):
        raise InputError("graph: it refers to tensors in other files; do not trust this file")
    names = [tensor.name for tensor in model.graph.initializer] + [entry.name for entry in entries]
    if len(set(names)) != len(names):
        raise InputError("graph: two tensors of one name; do not trust this file")
    return model


def _libraries(payload: memoryview) -> tuple[Library, ...]:
    size = LIST.unpack_from(payload)[0] if len(payload) >= LIST.size else LIST_MOST + 1
    if size > min(LIST_MOST, len(payload) - LIST.size):
        raise InputError("libraries: their list is too long; do not trust this file")
    start = LIST.size + size
    found: list[Library] = []
    for fields in _parse_json(bytes(payload[LIST.size : start]), "libraries", list):
        _check_keys(fields, {"domain", "length", "target"}, set(), "libraries")
        target, domain, length = fields["target"], fields["domain"], fields["length"]
        if not (_is_name(target) and _is_name(domain) and _is_int(length, 0, len(payload) - start)):
            raise InputError("libraries: a target, domain or length is none; do not trust this file")
        if found and (found[-1].target, found[-1].domain) >= (target, domain):
            raise InputError("libraries: they do not ascend by target and domain; do not trust this file")
        found.append(Library(target, domain, bytes(payload[start : start + length])))
        start += length
    if start != len(payload) or len(found) > LIBRARIES_MOST:
        raise InputError("libraries: they are not as long, or not as few, as they must be; do not trust this file")
    return tuple(found)


def _check_keys(fields: Any, needed: set[str], optional: set[str], what: str) -> None:
    """Every key known or optional by its name; the needed ones there."""
    if not isinstance(fields, dict):
        raise InputError(f"{what}: must be an object; do not trust this file")
    missing = needed - fields.keys()
    unknown = {key for key in fields.keys() - needed - optional if not key.startswith("x-")}
    if missing or unknown:
        problem = f"lacks {min(missing)!r}" if missing else f"needs {min(unknown)[:40]!r}, unknown to this version"
        raise InputError(f"{what}: {problem}; upgrade jointsparse, or do not trust this file")


def _is_name(name: Any) -> bool:
    if not isinstance(name, str) or not 0 < len(name) <= NAME_MOST:
        return False
    # A lone surrogate can stand in JSON but in no protobuf string.
    return not any(0xD800 <= ord(c) <= 0xDFFF for c in name)


def _is_int(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _is_positive_float32(value: float) -> bool:
    return 0 < value <= float(np.finfo(np.float32).max) and float(np.float32(value)) == value


def _refuse(name: str, why: str) -> InputError:
    return InputError(f"tensor {name[:80]!r}: {why}; do not trust this file")
