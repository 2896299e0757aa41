"""What a ``.jsm`` file, version 1, is made of: limits, layouts, and the contents as objects.

docs/format.md is the specification; ``container_encoder`` and ``container_decoder`` turn contents into bytes and back.
Neither TVM nor torch is needed.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from . import winograd_spec
from .quantization import LayerQuantization

MAGIC = b"\x89JSM\r\n\x1a\n"
VERSION = 1

FILE_MOST = 2**31 - 1
"""Bytes of a file."""
WEIGHTS_MOST = 2**31 - 2**26
"""Bytes of all decoded tensors together: an ONNX model must stay below 2 GiB."""
GRAPH_MOST = 8 * 2**20
"""Bytes of the decoded graph."""
INDEX_MOST = 4 * 2**20
"""Bytes of the decoded index."""
TENSORS_MOST = 65_536
NAME_MOST = 1024
AXES_MOST = 16

# Graph and index are parsed into objects many times their size, so a short stream may not stand for a long text.
TEXT_FREE = 2**20
TEXT_RATIO = 100

PREFIX = struct.Struct("<8sHHQ")
SECTION = struct.Struct("<4sI")
TEXT = struct.Struct("<BI")
CRC = struct.Struct("<I")
LIST = struct.Struct("<I")
DIGEST_BYTES = 8
REQUIRED = (b"INDX", b"GRPH", b"DATA", b"END ")
LIBRARIES = b"libs"
"""Tag of the optional section with built libraries."""
LIBRARIES_MOST = 256
LIST_MOST = 2**16
"""Bytes of the list of libraries."""

# Element types that a raw record can have.
TYPES = (
    "float32",
    "float64",
    "float16",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "bool",
)


@dataclass(frozen=True)
class Shared:
    """The tensor has the unscaled values of another one."""

    of: str


@dataclass(frozen=True)
class Record:
    """One tensor of the file.

    Attributes:
        name: of the initializer. shape: of the tensor.
        base: its unscaled values: an array as it is, quantised codes, or those of another record.
        scale: None, or float32, one factor for each index along ``axis``.
        axis: the axis of ``scale``.
    """

    name: str
    shape: tuple[int, ...]
    base: NDArray[Any] | LayerQuantization | Shared
    scale: NDArray[np.float32] | None = None
    axis: int = 0


@dataclass(frozen=True)
class Library:
    """A package of compiled code beside the weights: native code, for whoever trusts the file.

    Attributes:
        target: TVM's, as a string. domain: it was compiled for. package: the bytes of PACKAGE.tar.
    """

    target: str
    domain: str
    package: bytes


@dataclass(frozen=True)
class Sizes:
    """Where the bytes of a file go: tensors' streams by name, all streams, the graph, the index, the libraries, and the
    whole."""

    tensors: Mapping[str, int]
    streams: int
    graph: int
    index: int
    libraries: int
    file: int


@dataclass(frozen=True)
class Contents:
    """What a file holds.

    Attributes:
        graph: the ONNX model without the tensors in ``records``.
        records: the tensors, in order.
        winograd: pruning of the unscaled weights in the Winograd domain, by record.
        libraries: built from them, by target and domain, ascending.
        sizes: set by ``decode``.
    """

    graph: ModelProto
    records: tuple[Record, ...]
    winograd: winograd_spec.Spec = field(default_factory=dict)
    libraries: tuple[Library, ...] = ()
    sizes: Sizes | None = None


def can_hold(array: NDArray[Any]) -> bool:
    """Whether a raw record can have this array's element type."""
    return array.dtype.name in TYPES


def text_most(length: int) -> int:
    """The longest text that a stream of ``length`` bytes may stand for."""
    return TEXT_FREE + TEXT_RATIO * length


def digest(body: bytes | memoryview) -> bytes:
    """The checksum of all bytes before the END section."""
    return hashlib.blake2b(body, digest_size=DIGEST_BYTES).digest()
