"""Files from strangers: damaged and hostile ``.jsm`` files must be read, or refused in one line, in bounded time and
memory.

    python -m tests.frontends.fuzz [--seconds S] [--seed N] [--guided FOLDER] [FILE.jsm ...]

Files are taken apart, changed in their index, graph, streams or sections, and put together with the right checksums,
so that what lies behind these is reached. --guided lets atheris (``pip install atheris``) choose what to change
further by the code it reaches; it keeps its corpus in FOLDER. An input that breaks a rule is written to
``fuzz-failure.jsm`` and ends the run.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import struct
import sys
import time
import tracemalloc
import types
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from jointsparse.frontends import container_decoder, inspection, model_file, onnx_graph
from jointsparse.frontends.errors import InputError
from tests.frontends.graphs import put_together, read_index, stored, take_apart

SEEDS = sorted(Path(__file__).parent.glob("golden_v1*.jsm"))

SECONDS, SECONDS_PER_MB = 2.0, 1.0
"""For an input. MB: of the file, or of what it declares."""

MEMORY, TIMES_DECLARED = 32e6, 4
"""Bytes beyond so many times those that a file declares."""

_SMALL = (0, 1, 2, 3, 4, 7, 8, 9, 16, 64, 255, 256, 1000, 65535, 65536, 2**24, 2**31 - 1)
_NUMBERS = (*_SMALL, 2**31, 2**32 - 1, 2**40, 2**63)
_WORDS = ("", "a", "x", "golden", "Conv", "float32", "int8", "codes", "raw", "shared", "\0")
_VALUES: tuple[Any, ...] = (None, True, [], {}, -1, 0.5, -0.0, 1e-45, 1e39, *_WORDS, *_NUMBERS)


def target(data: bytes) -> str:
    """Read a file in every way but import to TVM; what became of it.

    Raises:
        AssertionError: it took too long, or too much memory. Whatever else it is that it must not raise.
    """
    declared, complaint = _declared(data), ""
    start = time.perf_counter()
    tracemalloc.start()
    try:
        contents = container_decoder.decode(data, "fuzzed")
        model = model_file.unpack(contents)
        onnx_graph.check(model, "fuzzed")
        str(inspection.inspect_contents(contents, "fuzzed"))
        outcome = "read"
    except InputError as error:
        outcome, complaint = "refused", str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    seconds = time.perf_counter() - start
    size = max(len(data), declared) / 1e6
    assert "\n" not in complaint, complaint
    assert seconds < SECONDS + SECONDS_PER_MB * size, f"{seconds:.1f} s for {size:.2f} MB"
    assert peak < MEMORY + TIMES_DECLARED * declared, f"{peak / 1e6:.0f} MB for {declared / 1e6:.2f} MB declared"
    return outcome


def _declared(data: bytes) -> int:
    """Bytes of the tensors that an index speaks of, as far as it can be read."""
    try:
        entries = read_index(take_apart(data))["tensors"]
        sizes = (math.prod(entry["shape"]) * np.dtype(entry.get("type", "float32")).itemsize for entry in entries)
        return sum(size for size in sizes if size < 2**31)
    except Exception:
        return 0


def mutate(data: bytes, draw: random.Random) -> bytes:
    """Another file: one or more changes, checksums right but for one in twenty."""
    changed = data
    while changed == data:
        sections = take_apart(data)
        for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
            try:
                draw.choices(list(_CHANGES), list(_CHANGES.values()))[0](sections, draw)
            except Exception:  # of what an earlier change broke; that is kept
                break
        changed = put_together(sections)
        if draw.random() < 0.05:
            changed = _noisy(changed, draw)
    return changed


def _change_index(sections: dict[bytes, bytes], draw: random.Random) -> None:
    index = read_index(sections)
    _change_json(index, draw)
    sections[b"INDX"] = stored(json.dumps(index).encode())


def _change_json(value: Any, draw: random.Random) -> None:
    """One place of it."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = draw.choice(keys)
        if isinstance(value[key], dict | list) and value[key] and draw.random() < 0.9:
            value = value[key]
            continue
        how = draw.random()
        if how < 0.1:
            del value[key]
        elif how < 0.2 and isinstance(value, list):
            value.insert(draw.randrange(len(value) + 1), value[key])
        elif how < 0.3 and isinstance(value, dict):
            value[draw.choice(("scale", "seed", "book", "width", "of", "x-a", "new"))] = draw.choice((0, 1, 4, "tuned"))
        elif isinstance(value[key], int | float) and not isinstance(value[key], bool) and how < 0.9:
            value[key] = draw.choice((value[key] + 1, value[key] - 1, -value[key], draw.choice(_NUMBERS)))
        else:
            value[key] = draw.choice(_VALUES)
        return


def _change_graph(sections: dict[bytes, bytes], draw: random.Random) -> None:
    """Bytes of the serialised model, as far as it stays one; or one of its numbers and names."""
    graph = _graph(sections)
    if draw.random() < 0.5:
        text = _noisy(graph.SerializeToString(), draw)
    else:
        _change_message(graph, draw)
        text = graph.SerializeToString()
    sections[b"GRPH"] = stored(text)


def _graph(sections: dict[bytes, bytes]) -> ModelProto:
    graph = ModelProto()
    graph.CopyFrom(container_decoder.decode(put_together(sections)).graph)
    return graph


def _change_message(message: Any, draw: random.Random) -> None:
    while fields := message.ListFields():
        field, value = draw.choice(fields)
        is_list = not hasattr(value, "ListFields") and not isinstance(value, int | float | str | bytes)
        item = draw.choice(list(value)) if is_list and len(value) else value
        if hasattr(item, "ListFields"):
            if draw.random() < 0.1 and is_list:
                value.add().CopyFrom(item)
                return
            message = item
            continue
        new: Any = draw.choice(_SMALL if isinstance(item, int) else _WORDS)
        try:
            if is_list:
                value.append(new)
            else:
                setattr(message, field.name, new)
        except (TypeError, ValueError):
            message.ClearField(field.name)
        return


def _change_streams(sections: dict[bytes, bytes], draw: random.Random) -> None:
    """Bytes of a stream, its checksum and length right."""
    index = read_index(sections)
    entries = [entry for entry in index["books"] + index["tensors"] if "length" in entry]
    streams, start = [], 0
    for entry in entries:
        streams.append(sections[b"DATA"][start : start + entry["length"]])
        start += entry["length"]
    at = draw.randrange(len(entries))
    how = draw.random()
    if how < 0.2:
        streams[at] = draw.choice(streams)
    elif how < 0.3:
        entries[at]["coder"] = draw.randrange(6)
    elif how < 0.4:
        streams[at] = streams[at][: draw.randrange(len(streams[at]) + 1)]
    elif how < 0.5:
        streams[at] += draw.randbytes(draw.choice((1, 4, 64)))
    else:
        streams[at] = _noisy(streams[at], draw)
    for entry, stream in zip(entries, streams, strict=True):
        entry["length"], entry["crc"] = len(stream), zlib.crc32(stream)
    sections[b"DATA"] = b"".join(streams)
    sections[b"INDX"] = stored(json.dumps(index).encode())


def _change_text(sections: dict[bytes, bytes], draw: random.Random) -> None:
    """The coder, the size or the coded bytes of a text."""
    tag = draw.choice((b"INDX", b"GRPH"))
    coder, size = struct.unpack_from("<BI", sections[tag])
    body = sections[tag][5:]
    if draw.random() < 0.3:
        coder = draw.randrange(6)
    if draw.random() < 0.3:
        size = draw.choice((size + 1, max(size - 1, 0), *_SMALL))
    if draw.random() < 0.7:
        body = _noisy(body, draw)
    sections[tag] = struct.pack("<BI", coder, size % 2**32) + body


def _change_sections(sections: dict[bytes, bytes], draw: random.Random) -> None:
    tags = list(sections)
    how = draw.randrange(4)
    if how == 0:
        del sections[draw.choice(tags)]
    elif how == 1:
        sections[draw.choice((b"abcd", b"ABCD", b"zzzz", b"\0\0\0\0"))] = draw.randbytes(9)
    elif how == 2:
        first, second = draw.choice(tags), draw.choice(tags)
        sections[first], sections[second] = sections[second], sections[first]
    else:
        tag = draw.choice(tags)
        sections[tag] = sections[tag][: draw.randrange(len(sections[tag]) + 1)]


_CHANGES: dict[Callable[[dict[bytes, bytes], random.Random], None], float] = {
    _change_index: 4,
    _change_graph: 3,
    _change_streams: 4,
    _change_text: 1,
    _change_sections: 0.3,
}


def _noisy(data: bytes, draw: random.Random) -> bytes:
    """A few bytes changed, taken out, put in or repeated."""
    noisy = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        at = draw.randrange(len(noisy) + 1)
        how = draw.randrange(5)
        if how == 0:
            del noisy[at : at + draw.choice((1, 2, 8))]
        elif how == 1:
            noisy[at:at] = draw.randbytes(draw.choice((1, 2, 8)))
        elif how == 2:
            noisy[at:at] = noisy[at : at + draw.choice((1, 8, 64))]
        elif at < len(noisy):
            noisy[at] = draw.choice((0, 255, noisy[at] ^ 1 << draw.randrange(8), draw.randrange(256)))
    return bytes(noisy)


def fuzz(seeds: Sequence[bytes], draw: random.Random, enough: Callable[[int], bool]) -> Counter[str]:
    """Change files, and what came of them, until it is enough; how many were read and refused."""
    found: Counter[str] = Counter()
    pool = list(seeds)
    while not enough(found.total()):
        data = mutate(draw.choice(pool), draw)
        outcome = _checked(data)
        found[outcome] += 1
        # What could be read is a good start for more.
        if outcome == "read" and len(data) < 50_000:
            pool.append(data)
            del pool[len(seeds) : max(len(seeds), len(pool) - 200)]
        if found.total() % 1000 == 0:
            gc.collect()
    return found


def _checked(data: bytes) -> str:
    try:
        return target(data)
    except BaseException:
        Path("fuzz-failure.jsm").write_bytes(data)
        raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=SEEDS, metavar="FILE.jsm")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guided", type=Path, metavar="FOLDER", help="by atheris, its corpus in FOLDER")
    arguments = parser.parse_args()
    seeds = [path.read_bytes() for path in arguments.files]
    if arguments.guided:
        _guided(seeds, arguments)
        return
    end = time.monotonic() + arguments.seconds
    found = fuzz(seeds, random.Random(arguments.seed), lambda count: time.monotonic() > end)
    print(f"{found.total()} files in {arguments.seconds:.0f} s: {found['read']} read, {found['refused']} refused")


def _guided(seeds: list[bytes], arguments: argparse.Namespace) -> None:
    import atheris

    for name, module in list(sys.modules.items()):
        if name.startswith("jointsparse.frontends"):
            _instrument(module, name, atheris.instrument_func)
    arguments.guided.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds):
        (arguments.guided / f"seed{number}").write_bytes(seed)

    def custom(data: bytes, most: int, seed: int) -> bytes:
        return mutate(data, random.Random(seed))[:most]

    options = [f"-max_total_time={arguments.seconds:.0f}", f"-seed={arguments.seed + 1}", "-max_len=100000"]
    atheris.Setup([sys.argv[0], *options, str(arguments.guided)], _checked, custom_mutator=custom)
    atheris.Fuzz()


def _instrument(owner: Any, module: str, instrument: Callable[[Any], Any]) -> None:
    """The functions of a module or class, imported before atheris was."""
    for key, value in list(vars(owner).items()):
        if getattr(value, "__module__", None) != module:
            continue
        if isinstance(value, type):
            _instrument(value, module, instrument)
        elif isinstance(value, types.FunctionType):
            setattr(owner, key, instrument(value))


if __name__ == "__main__":
    main()
