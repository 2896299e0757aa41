"""Contents to the bytes of a ``.jsm`` file: canonical, the same contents give the same bytes."""

from __future__ import annotations

import json
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import codec
from .coding import floats, tensors
from .container import (
    CRC,
    DIGEST_BYTES,
    FILE_MOST,
    GRAPH_MOST,
    INDEX_MOST,
    LIBRARIES,
    LIBRARIES_MOST,
    LIST,
    LIST_MOST,
    MAGIC,
    PREFIX,
    SECTION,
    TEXT,
    VERSION,
    Contents,
    Library,
    Record,
    Shared,
    digest,
    text_most,
)
from .errors import InputError
from .quantization import LayerQuantization


def encode(contents: Contents) -> bytes:
    """The bytes of the file.

    Raises:
        InputError: the contents exceed a limit of the format.
    """
    books, book_of = _bind_books(contents.records)
    described = [_describe_book(book) for book in books]
    described += [_describe(record, book_of.get(record.name)) for record in contents.records]
    entries, streams = [], []
    for entry, payload in described:
        if payload:
            coder, stream = _coded(entry, payload)
            entry |= {"coder": coder, "length": len(stream), "crc": zlib.crc32(stream)}
            streams.append(stream)
        entries.append(entry)
    index = {
        "books": entries[: len(books)],
        "tensors": entries[len(books) :],
        "winograd": {k: v.to_json() for k, v in contents.winograd.items()},
    }
    text = json.dumps(index, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    sections = [
        _section(b"INDX", _text(text, INDEX_MOST, "index")),
        _section(b"GRPH", _text(contents.graph.SerializeToString(deterministic=True), GRAPH_MOST, "graph")),
        _section(b"DATA", b"".join(streams)),
    ]
    if contents.libraries:
        sections.append(_section(LIBRARIES, _libraries(contents.libraries)))
    length = PREFIX.size + sum(map(len, sections)) + SECTION.size + DIGEST_BYTES + CRC.size
    if length > FILE_MOST:
        raise InputError(f"the file would have {length} bytes, more than the {FILE_MOST} of the format")
    body = PREFIX.pack(MAGIC, VERSION, 0, length) + b"".join(sections)
    return body + _section(b"END ", digest(body))


Book = dict[int, np.float32]
"""What codes stand for, but 0, which stands for 0."""


def _bind_books(records: tuple[Record, ...]) -> tuple[list[Book], dict[str, int]]:
    """Put the layers' codebooks together into as few as their contradictions allow; which one each record reads."""
    books: list[Book] = []
    book_of: dict[str, int] = {}
    for record in records:
        if isinstance(record.base, LayerQuantization) and record.base.codebook is not None:
            pairs = zip(np.unique(record.base.codes).tolist(), record.base.codebook, strict=True)
            own = {code: value for code, value in pairs if code}
            if not own:
                continue
            fitting = (i for i, book in enumerate(books) if all(book.get(c, v) == v for c, v in own.items()))
            number = next(fitting, len(books))
            if number == len(books):
                books.append({})
            books[number].update(own)
            book_of[record.name] = number
    return books, book_of


def _describe_book(book: Book) -> tuple[dict[str, Any], bytes]:
    codes = sorted(book)
    values = [book[code] for code in codes]
    return {"count": len(codes)}, np.array(codes, "<i4").tobytes() + np.array(values, "<f4").tobytes()


def _coded(entry: dict[str, Any], payload: bytes) -> tuple[int, bytes]:
    if entry.get("kind") == "codes":
        # They come coded.
        return int(entry["coder"]), payload
    return codec.encode(payload, of_floats=entry.get("type") == "float32" or entry.get("kind") == "shared")


def _describe(record: Record, book: int | None) -> tuple[dict[str, Any], bytes]:
    """The index entry of a record, and the bytes to be coded; of codes, those coded."""
    entry: dict[str, Any] = {"name": record.name, "shape": list(record.shape)}
    base, scale = record.base, record.scale
    if isinstance(base, LayerQuantization):
        details, payload = _describe_codes(base, scale)
        entry |= details | ({} if book is None else {"book": book})
    elif isinstance(base, Shared):
        entry |= {"kind": "shared", "of": base.of}
        payload = _bytes(scale)
    else:
        entry |= {"kind": "raw", "type": base.dtype.name}
        payload = np.ascontiguousarray(base, base.dtype.newbyteorder("<")).tobytes() + _bytes(scale)
    if scale is not None:
        entry["scale"] = record.axis
    return entry, payload


def _describe_codes(quantised: LayerQuantization, scale: NDArray[np.float32] | None) -> tuple[dict[str, Any], bytes]:
    entry: dict[str, Any] = {"kind": "codes", "step": float(np.float32(quantised.step))}
    if quantised.dither_seed is not None:
        entry["seed"] = int(quantised.dither_seed)
    codes = np.asarray(quantised.codes)
    if scale is not None and len(scale) <= floats.MOST:
        return entry | {"coder": codec.SCALED_CODES}, tensors.encode(codes, scale)
    return entry | {"coder": codec.CODES}, tensors.encode(codes) + _bytes(scale)


def _bytes(scale: NDArray[np.float32] | None) -> bytes:
    return b"" if scale is None else scale.astype("<f4").tobytes()


def _libraries(libraries: tuple[Library, ...]) -> bytes:
    listed = [{"domain": one.domain, "length": len(one.package), "target": one.target} for one in libraries]
    text = json.dumps(listed, sort_keys=True, separators=(",", ":")).encode()
    if len(text) > LIST_MOST or len(libraries) > LIBRARIES_MOST:
        raise InputError(f"{len(libraries)} libraries: the format holds {LIBRARIES_MOST} of short targets")
    return LIST.pack(len(text)) + text + b"".join(one.package for one in libraries)


def _text(data: bytes, most: int, what: str) -> bytes:
    coder, stream = codec.encode(data)
    if len(data) > min(most, text_most(len(stream))):
        raise InputError(f"the model's {what} has {len(data)} bytes without weights; the format holds {most}")
    return TEXT.pack(coder, len(data)) + stream


def _section(tag: bytes, payload: bytes) -> bytes:
    head = SECTION.pack(tag, len(payload))
    return head + payload + CRC.pack(zlib.crc32(payload, zlib.crc32(tag)))
