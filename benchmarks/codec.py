"""Codecs side by side on the quantised tensors of .jsm files.

    python -m benchmarks.codec FILE.jsm ... [--repeat N]

Each codec gets the same codes tensor by tensor, as a file has them, so that each could be read alone; general ones get
them in the fewest bytes, in planes (the lowest bytes of all codes, then the next). Bytes are of the streams alone. The
entropy is of each tensor's codes by themselves: what a coder without contexts could reach if it knew their frequencies
for nothing. NNCodec is its DeepCABAC, parameters optimised, rows in order. Speeds are of one core, the best of N.
Codecs that are not installed are left out: ``pip install zstandard nncodec``.
"""

from __future__ import annotations

import argparse
import bz2
import importlib.util
import lzma
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from jointsparse.frontends import model_file
from jointsparse.frontends.coding import tensors
from jointsparse.frontends.errors import InputError
from jointsparse.frontends.quantization import LayerQuantization, entropy

Codes = NDArray[np.int32]

_UNARY = 10


@dataclass(frozen=True)
class Codec:
    """How a tensor becomes a stream, and how the stream becomes something again."""

    encode: Callable[[Codes], bytes]
    decode: Callable[[bytes, Codes], Any]


def planes(codes: Codes) -> bytes:
    """Of the fewest bytes."""
    largest = int(np.abs(codes.astype(np.int64)).max(initial=0))
    width = next(width for width in (1, 2, 4) if largest < 2 ** (8 * width - 1))
    return codes.astype(f"<i{width}").reshape(-1, 1).view(np.uint8).T.tobytes()


def codecs() -> dict[str, Codec]:
    """Those that there are, by name."""
    found = {
        "jointsparse": Codec(tensors.encode, lambda data, codes: tensors.decode(data, codes.shape)[0]),
        "bzip2 -9": Codec(lambda codes: bz2.compress(planes(codes), 9), lambda data, _: bz2.decompress(data)),
        "xz -9": Codec(lambda codes: lzma.compress(planes(codes), preset=9), lambda data, _: lzma.decompress(data)),
    }
    if importlib.util.find_spec("zstandard"):
        import zstandard

        found["zstd -19"] = Codec(
            lambda codes: zstandard.ZstdCompressor(level=19).compress(planes(codes)),
            lambda data, _: zstandard.ZstdDecompressor().decompress(data),
        )
    cabac = _deep_cabac()
    if cabac is not None:
        found["NNCodec"] = Codec(
            lambda codes: _cabac_encode(cabac, codes),
            lambda data, codes: _cabac_decode(cabac, data, codes),
        )
    return found


def _deep_cabac() -> ModuleType | None:
    """NNCodec's extension alone: the package imports what a comparison does not need."""
    package = importlib.util.find_spec("nncodec")
    if package is None or not package.submodule_search_locations:
        return None
    files = [*Path(package.submodule_search_locations[0], "extensions").glob("deepCABAC*.so")]
    spec = importlib.util.spec_from_file_location("deepCABAC", files[0]) if files else None
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _cabac_encode(cabac: ModuleType, codes: Codes) -> bytes:
    tensor = np.ascontiguousarray(codes, np.int32)
    skipped = np.array([not filter_.any() for filter_ in tensor], np.int32)
    encoder = cabac.Encoder()
    encoder.initCtxModels(_UNARY, 1)
    off = (cabac.HdspMode.AlwaysOff, np.zeros(2, np.int8))
    encoder.encodeLayer(tensor, 0, 0, 1, 0, int(skipped.any()), skipped, *off, 0, 0)
    return bytes(encoder.finish())


def _cabac_decode(cabac: ModuleType, data: bytes, codes: Codes) -> Codes:
    decoder, result = cabac.Decoder(), np.zeros(codes.shape, np.int32)
    decoder.setStream(np.frombuffer(data, np.uint8))
    decoder.initCtxModels(_UNARY)
    off = (cabac.HdspMode.AlwaysOff, np.zeros(2, np.int8))
    decoder.decodeLayer(result, 0, 0, 1, 0, *off, 0, 0)
    return result


@dataclass(frozen=True)
class Row:
    """bytes: of all streams. encode, decode: millions of weights a second."""

    codec: str
    bytes: int
    encode: float
    decode: float


def measure(layers: Mapping[str, Codes], name: str, codec: Codec, repeat: int) -> Row:
    """One codec on the tensors of a file.

    Raises:
        ValueError: it does not give back what it got.
    """
    weights = sum(codes.size for codes in layers.values())
    encoding, streams = _best(lambda: [codec.encode(codes) for codes in layers.values()], repeat)
    pairs = [*zip(streams, layers.values(), strict=True)]
    decoding, decoded = _best(lambda: [codec.decode(data, codes) for data, codes in pairs], repeat)
    for result, codes in zip(decoded, layers.values(), strict=True):
        if not (result == planes(codes) if isinstance(result, bytes) else np.array_equal(result, codes)):
            raise ValueError(f"{name} does not decode to what it encoded")
    return Row(name, sum(map(len, streams)), weights / encoding / 1e6, weights / decoding / 1e6)


def _best(run: Callable[[], list[Any]], repeat: int) -> tuple[float, list[Any]]:
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        result = run()
        times.append(time.perf_counter() - start)
    return min(times), result


def read(path: Path) -> dict[str, Codes]:
    """Codes of a file, by tensor."""
    records = model_file.read(path).records
    return {record.name: record.base.codes for record in records if isinstance(record.base, LayerQuantization)}


def show(path: Path, layers: Mapping[str, Codes], rows: list[Row]) -> None:
    """A table."""
    weights = sum(codes.size for codes in layers.values())
    nonzeros = sum(int(np.count_nonzero(codes)) for codes in layers.values())
    bits = sum(codes.size * entropy(codes) for codes in layers.values())
    table = Table(title=f"{path.name}: {weights:,} weights, {nonzeros / weights:.1%} not zero")
    for title in ("codec", "bytes", "bits / weight", "bits / non-zero", "to entropy", "encode, M/s", "decode, M/s"):
        table.add_column(title, justify="left" if title == "codec" else "right")
    for row in [Row("entropy", round(bits / 8), 0, 0), *rows]:
        per_weight, per_nonzero = 8 * row.bytes / weights, 8 * row.bytes / max(1, nonzeros)
        speeds = [f"{speed:.1f}" if speed else "" for speed in (row.encode, row.decode)]
        share = f"{8 * row.bytes / bits:.3f}" if bits else ""
        table.add_row(row.codec, f"{row.bytes:,}", f"{per_weight:.3f}", f"{per_nonzero:.2f}", share, *speeds)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.jsm")
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    try:
        for path in arguments.files:
            layers = read(path)
            if not layers:
                raise InputError(f"{path}: no quantised tensor")
            show(path, layers, [measure(layers, name, codec, arguments.repeat) for name, codec in codecs().items()])
    except InputError as error:
        sys.exit(f"codec: {error}")


if __name__ == "__main__":
    main()
