"""The bytes of a ``.jsm`` file to its contents, safe on a stranger's file.

Every declared size is checked against fixed limits, and against what its stream can expand to, before anything is
allocated; whatever is wrong is one InputError.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from . import codec, onnx_graph, winograd_spec
from .coding import tensors
from .container import (
    CRC,
    GRAPH_MOST,
    INDEX_MOST,
    LIBRARIES,
    LIBRARIES_MOST,
    LIST,
    LIST_MOST,
    MAGIC,
    PREFIX,
    REQUIRED,
    SECTION,
    TEXT,
    VERSION,
    Contents,
    Library,
    Record,
    Shared,
    Sizes,
    digest,
    text_most,
)
from .container_index import Entry, checked_entries, comes_coded, parse_index
from .container_json import check_keys, is_int, is_name, parse_json, refuse
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
        index = parse_index(_read_text(sections[b"INDX"], INDEX_MOST, "index"))
        books, entries = checked_entries(index, len(sections[b"DATA"]))
        graph = _parse_graph(_read_text(sections[b"GRPH"], GRAPH_MOST, "graph"), entries)
        records = _read_records(books, entries, sections[b"DATA"])
        libraries = _libraries(sections[LIBRARIES]) if LIBRARIES in sections else ()
        shapes = {record.name: record.shape for record in records}
        winograd = winograd_spec.parse(index["winograd"], shapes, "index")
        for record in records:
            if record.name in winograd and record.scale is not None and record.axis != 0:
                raise refuse(record.name, "a Winograd threshold needs a scale of output channels")
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


def _read_records(books: list[Entry], entries: list[Entry], data: memoryview) -> tuple[Record, ...]:
    read_books = [_read_book(book, data) for book in books]
    return tuple(_read_record(entry, data, read_books) for entry in entries)


def _read_payload(entry: Entry, data: memoryview) -> bytes:
    stream = bytes(data[entry.start : entry.start + entry.length])
    if zlib.crc32(stream) != entry.fields.get("crc", 0):
        raise InputError(f"damaged: the checksum of tensor {entry.name!r} is wrong; get the file again")
    if not entry.size:
        return b""
    if comes_coded(entry):
        return stream
    return _decode_stream(entry.fields["coder"], stream, entry.size, f"tensor {entry.name!r}")


def _read_book(entry: Entry, data: memoryview) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    payload = _read_payload(entry, data)
    codes = np.frombuffer(payload, "<i4", entry.count).astype(np.int32)
    if np.any(codes[1:] <= codes[:-1]) or np.any(codes == 0):
        raise refuse(entry.name, "its codes do not ascend, or 0 is among them")
    return codes, _floats(payload[4 * entry.count :], entry.name)


_Books = list[tuple[NDArray[np.int32], NDArray[np.float32]]]


def _read_record(entry: Entry, data: memoryview, books: _Books) -> Record:
    payload = _read_payload(entry, data)
    body, tail = payload[: len(payload) - entry.tail], payload[len(payload) - entry.tail :]
    base: NDArray[Any] | LayerQuantization | Shared
    if entry.kind == "shared":
        base, scale = Shared(entry.fields["of"]), None
    elif entry.kind == "raw":
        base, scale = _read_raw(entry, body), None
    else:
        codes, scale = _decode_codes(entry, body) if comes_coded(entry) else (_join_planes(entry, body), None)
        base = _quantisation(entry, codes, books)
    if scale is not None:
        _check_finite(scale, entry.name)
    elif "scale" in entry.fields:
        scale = _floats(tail, entry.name)
    return Record(entry.name, entry.shape, base, scale, entry.fields.get("scale", 0))


def _read_raw(entry: Entry, payload: bytes) -> NDArray[Any]:
    dtype = np.dtype(entry.fields["type"])
    if dtype == np.bool_ and payload.strip(b"\0\1"):
        raise refuse(entry.name, "a truth value is neither 0 nor 1")
    return np.frombuffer(payload, dtype.newbyteorder("<")).astype(dtype, copy=False).reshape(entry.shape)


def _quantisation(entry: Entry, codes: NDArray[np.int32], books: _Books) -> LayerQuantization:
    step = entry.fields["step"]
    if (max(-int(codes.min()), int(codes.max())) + 1) * step > float(np.finfo(np.float32).max):
        raise refuse(entry.name, "a value exceeds float32")
    codebook = None
    if "book" in entry.fields:
        codebook = _look_up(np.unique(codes), books[entry.fields["book"]], entry.name)
    return LayerQuantization(codes, step, entry.fields.get("seed"), codebook)


def _decode_codes(entry: Entry, stream: bytes) -> tuple[NDArray[np.int32], NDArray[np.float32] | None]:
    try:
        return tensors.decode(
            stream, entry.shape, entry.scales if entry.fields["coder"] == codec.SCALED_CODES else None
        )
    except ValueError as error:
        raise refuse(entry.name, str(error)) from None


def _join_planes(entry: Entry, payload: bytes) -> NDArray[np.int32]:
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
        raise refuse(name, "a code is not in its codebook")
    return np.where(distinct == 0, np.float32(0), values[position])


def _floats(payload: bytes, name: str) -> NDArray[np.float32]:
    values = np.frombuffer(payload, "<f4").astype(np.float32)
    _check_finite(values, name)
    return values


def _check_finite(values: NDArray[np.float32], name: str) -> None:
    if not np.all(np.isfinite(values)):
        raise refuse(name, "a value that must be finite is not")


def _parse_graph(text: bytes, entries: list[Entry]) -> ModelProto:
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
    for fields in parse_json(bytes(payload[LIST.size : start]), "libraries", list):
        check_keys(fields, {"domain", "length", "target"}, set(), "libraries")
        target, domain, length = fields["target"], fields["domain"], fields["length"]
        if not (is_name(target) and is_name(domain) and is_int(length, 0, len(payload) - start)):
            raise InputError("libraries: a target, domain or length is none; do not trust this file")
        if found and (found[-1].target, found[-1].domain) >= (target, domain):
            raise InputError("libraries: they do not ascend by target and domain; do not trust this file")
        found.append(Library(target, domain, bytes(payload[start : start + length])))
        start += length
    if start != len(payload) or len(found) > LIBRARIES_MOST:
        raise InputError("libraries: they are not as long, or not as few, as they must be; do not trust this file")
    return tuple(found)
