"""The bytes of a file: exact, canonical, and one clear error for everything that is not one."""

from __future__ import annotations

import contextlib
import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from jointsparse.frontends import codec, container, inspection, model_file
from jointsparse.frontends.container import Contents, Library, Record, Shared
from jointsparse.frontends.container_decoder import decode
from jointsparse.frontends.container_encoder import encode
from jointsparse.frontends.errors import InputError
from jointsparse.frontends.quantization import LayerQuantization, quantize_array
from jointsparse.schedules.winograd_pruning import WinogradPruning
from tests.frontends.graphs import floats, model, put_together, read_index, stored, take_apart


def _graph() -> ModelProto:
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["p"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["p", "b"], ["q"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["q", "c"], ["y"], pads=[1, 1, 1, 1]),
    ]
    return model(nodes, {"x": (1, 4, 8, 8)}, {name: floats(4, 4, 3, 3) for name in "abc"})


def _contents() -> Contents:
    """Every kind of record: codes with dither and a codebook, codes in two bytes, shared, raw; scales, thresholds."""
    graph = _graph()
    del graph.graph.initializer[:]
    plain = quantize_array(floats(4, 4, 3, 3), 0.01)
    dithered = quantize_array(floats(4, 4, 3, 3, seed=1), 0.25, dither_seed=7)
    values = (np.unique(dithered.codes) * 0.26).astype(np.float32)
    tuned = LayerQuantization(dithered.codes, dithered.step, 7, values)
    scale = np.array([1, -2, 0.5, 3], np.float32)
    records = (
        Record("a", (4, 4, 3, 3), tuned, scale, 0),
        Record("b", (4, 4, 3, 3), plain),
        Record("c", (4, 4, 3, 3), Shared("a"), scale[::-1].copy(), 1),
        Record("d", (5, 3), floats(5, 3)),
        Record("e", (3,), np.array([2**40, -1, 0])),
        Record("f \N{SNOWMAN}\n[bold]/../", (4,), np.array([True, False, True, True])),
    )
    spec = {"a": WinogradPruning(4, 0.125, True), "b": WinogradPruning(2, 0.1, False)}
    return Contents(graph, records, spec)


@pytest.fixture(scope="module")
def data() -> bytes:
    return encode(_contents())


def test_round_trip(data: bytes) -> None:
    before, after = _contents(), decode(data)
    assert after.winograd == before.winograd
    assert after.graph == before.graph
    assert [(r.name, r.shape, r.axis) for r in after.records] == [(r.name, r.shape, r.axis) for r in before.records]
    expected = model_file.unpack(before)
    assert model_file.unpack(after).SerializeToString() == expected.SerializeToString()
    scaled = before.records[0].base.dequantize() * np.array([1, -2, 0.5, 3], np.float32).reshape(-1, 1, 1, 1)
    np.testing.assert_array_equal(numpy_helper.to_array(expected.graph.initializer[0]), scaled)


def test_canonical(data: bytes) -> None:
    assert encode(_contents()) == data
    assert encode(decode(data)) == data


def test_sizes_count_every_byte(data: bytes) -> None:
    sizes = decode(data).sizes
    assert sizes is not None
    sections = take_apart(data)
    assert (sizes.graph, sizes.index, sizes.streams) == tuple(len(sections[t]) for t in (b"GRPH", b"INDX", b"DATA"))
    assert sizes.file == len(data) == 20 + sum(12 + len(payload) for payload in sections.values())


def test_layers_tuned_together_share_one_codebook() -> None:
    codes = [np.random.default_rng(i).integers(-3, 4, (8, 8), np.int32) for i in range(3)]
    table = {code: np.float32(code * 0.1 + 0.01 * (code != 0)) for code in range(-3, 4)}
    contradiction = LayerQuantization(codes[0], 0.5, None, np.unique(codes[0]).astype(np.float32))
    layers = [LayerQuantization(c, 0.1, None, np.array([table[v] for v in np.unique(c)])) for c in codes]
    records = tuple(Record(str(i), (8, 8), layer) for i, layer in enumerate([*layers, contradiction]))
    data = encode(Contents(ModelProto(), records))
    assert len(read_index(take_apart(data))["books"]) == 2
    for before, after in zip(records, decode(data).records, strict=True):
        np.testing.assert_array_equal(model_file.base_values(after, {}), model_file.base_values(before, {}))


@settings(deadline=None)
@given(
    codes=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=20),
    seed=st.none() | st.integers(0, 2**63 - 1),
)
def test_any_code_in_any_width(codes: list[int], seed: int | None) -> None:
    layer = LayerQuantization(np.array(codes, np.int32), 0.5, seed)
    data = encode(Contents(ModelProto(), (Record("w", (len(codes),), layer),)))
    base = decode(data).records[0].base
    assert isinstance(base, LayerQuantization)
    np.testing.assert_array_equal(base.codes, layer.codes)
    np.testing.assert_array_equal(base.dequantize(), layer.dequantize())


# --- damage ----------------------------------------------------------------------------------------------------------


def _refused(data: bytes, match: str = ".") -> str:
    with pytest.raises(InputError, match=match) as caught:
        decode(data, "m.jsm")
    message = str(caught.value)
    assert message.startswith("m.jsm: ")
    assert "\n" not in message
    assert len(message) < 400
    return message


@settings(max_examples=400, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_every_flipped_bit_is_found(data: bytes, place: float, bit: int) -> None:
    broken = bytearray(data)
    broken[int(place * len(data))] ^= 1 << bit
    _refused(bytes(broken))


@settings(max_examples=200, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True))
def test_every_truncation_is_found(data: bytes, place: float) -> None:
    _refused(data[: int(place * len(data))])


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_foreign_bytes_are_refused(data: bytes) -> None:
    _refused(data, "not a .jsm file")


@settings(max_examples=300, deadline=None)
@given(changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=4)), min_size=1, max_size=3))
def test_damage_under_right_checksums_is_refused_or_harmless(data: bytes, changes: Any) -> None:
    """Sections changed at random, checksums made right: an InputError, or contents that still add up."""
    sections = take_apart(data)
    for place, replacement in changes:
        tag = [b"INDX", b"GRPH", b"DATA"][int(place * 1000) % 3]
        text = bytearray(_uncoded(sections, tag))
        start = int(place * len(text))
        text[start : start + len(replacement)] = replacement
        sections[tag] = bytes(text) if tag == b"DATA" else stored(bytes(text))
    sections[b"INDX"] = _with_right_checksums(sections)
    with contextlib.suppress(InputError):
        model_file.unpack(decode(put_together(sections)))


def _with_right_checksums(sections: dict[bytes, bytes]) -> bytes:
    """The index with the checksums of the streams as they are now, or unchanged if it is beyond that."""
    try:
        index = read_index(sections)
        start = 0
        for entry in (*index["books"], *index["tensors"]):
            stream = sections[b"DATA"][start : start + entry["length"]]
            start += entry["length"]
            entry["crc"] = zlib.crc32(stream)
    except (AssertionError, KeyError, TypeError, ValueError, AttributeError):
        return sections[b"INDX"]
    return stored(json.dumps(index).encode())


def _uncoded(sections: dict[bytes, bytes], tag: bytes) -> bytes:
    payload = sections[tag]
    if tag == b"DATA":
        return payload
    size = int.from_bytes(payload[1:5], "little")
    return codec.decode(payload[0], payload[5:], size)


def test_appended_bytes_are_refused(data: bytes) -> None:
    _refused(data + b"x", "foreign bytes")


def test_newer_version_is_refused(data: bytes) -> None:
    assert "upgrade" in _refused(put_together(take_apart(data), version=2), "version 2")


def test_unknown_optional_section_is_skipped_and_a_required_one_refused(data: bytes) -> None:
    sections = take_apart(data)
    same = decode(put_together({b"note": b"made by hand", **sections}))
    assert model_file.unpack(same) == model_file.unpack(decode(data))
    assert "upgrade" in _refused(put_together({b"MORE": b"", **sections}), "MORE")


@pytest.mark.parametrize("tag", [b"INDX", b"GRPH", b"DATA"])
def test_missing_section_is_refused(data: bytes, tag: bytes) -> None:
    sections = take_apart(data)
    del sections[tag]
    _refused(put_together(sections), tag.decode())


# --- hostile files, all checksums right ------------------------------------------------------------------------------


def _with_index(data: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    sections = take_apart(data)
    index = read_index(sections)
    changed = change(index)
    text = changed if isinstance(changed, bytes) else json.dumps(index).encode()
    return put_together({**sections, b"INDX": stored(text)})


def _set(position: int, **fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda index: index["tensors"][position].update(fields)


HOSTILE = {
    "negative axis": (_set(1, shape=[-4, 4, 3, 3]), "shape"),
    "zero axis": (_set(1, shape=[0, 4, 3, 3]), "shape"),
    "product overflows 64 bits": (_set(1, shape=[2**31 - 1] * 16), "larger than|cannot hold"),
    "product wraps to the right size": (_set(1, shape=[2**31, 2**31, 4, 1]), "shape"),
    "terabyte": (_set(1, shape=[2**20, 2**20]), "larger than|cannot hold"),
    "too many axes": (_set(1, shape=[1] * 17), "shape"),
    "float axis": (_set(1, shape=[4.0, 4, 3, 3]), "shape"),
    "boolean axis": (_set(1, shape=[True, 144]), "shape"),
    "other size than the stream": (_set(1, shape=[4, 4, 3, 3, 4]), "stream|codes"),
    "stream shorter than its scale": (_set(0, length=12), "streams have"),
    "scale beyond its coder": (_set(0, coder=4, shape=[2**17, 4, 3, 3]), "at most 65536|cannot hold"),
    "stream far longer than its codes": (_set(1, shape=[1, 1, 3, 3]), "cannot hold"),
    "more codes than the stream can hold": (_set(1, shape=[4, 4, 3, 3, 10_000]), "cannot hold"),
    "two tensors of one name": (_set(1, name="a"), "stands twice"),
    "empty name": (_set(1, name=""), "no name"),
    "endless name": (_set(1, name="x" * 5000), "no name"),
    "lone surrogate": (_set(1, name="\ud800"), "no name"),
    "name is a number": (_set(1, name=3), "no name"),
    "unknown kind": (_set(1, kind="quantum"), "kind"),
    "unknown coder": (_set(1, coder=99), "coder 99"),
    "negative length": (_set(1, length=-1), "unsigned"),
    "length beyond the file": (_set(1, length=1200), "larger than"),
    "endless length": (_set(1, length=2**31), "cannot hold"),
    "wrong checksum": (_set(1, crc=0), "checksum"),
    "unknown width": (_set(1, width=3), "width"),
    "width true": (_set(1, width=True), "width"),
    "step of zero": (_set(1, step=0.0), "step"),
    "step no float32": (_set(1, step=0.1), "step"),
    "step not finite": (lambda i: json.dumps(i).replace('"step": ', '"step": 1e999, "x-": ').encode(), "step"),
    "step NaN": (lambda i: json.dumps(i).replace('"step": ', '"step": NaN, "x-": ').encode(), "JSON"),
    "values beyond float32": (_set(1, step=float(np.float32(3e38))), "float32"),
    "seed too large": (_set(0, seed=2**64), "seed"),
    "no such book": (_set(0, book=1), "book"),
    "book of another layer": (_set(1, book=0), "codebook"),
    "scale along no axis": (_set(0, scale=4), "axes"),
    "shares with itself": (_set(2, of="c"), "share"),
    "shares with one behind": (_set(2, of="d"), "share"),
    "shares with another shape": (_set(2, shape=[4, 4, 1, 9]), "share"),
    "unknown type": (_set(3, type="object"), "type"),
    "raw of another type": (_set(3, type="float64"), "hold|bytes|end"),
    "unknown required key": (_set(1, sparse_layout=1), "upgrade"),
    "missing key": (lambda i: i["tensors"][1].pop("step") and None, "lacks"),
    "not an object": (lambda i: b"[]", "object"),
    "not JSON": (lambda i: b"{", "JSON"),
    "not UTF-8": (lambda i: b'"\xff"', "JSON"),
    "too deep": (lambda i: b"[" * 200_000, "JSON|object"),
    "endless integer": (lambda i: b"1" * 10_000, "JSON|object"),
    "key twice": (lambda i: b'{"tensors": [], "tensors": []}', "twice"),
    "threshold of no tensor": (lambda i: i["winograd"].update(z=i["winograd"]["a"]), "no weight"),
    "grid elsewhere": (lambda i: i["winograd"]["a"].update(origin=[1, 0]), "grid"),
    "tile not offered": (lambda i: i["winograd"]["a"].update(tile=6), "tile"),
    "threshold negative": (lambda i: i["winograd"]["a"].update(threshold=-1.0), "threshold"),
    "thresholds too few": (lambda i: i["winograd"]["a"].update(threshold=[1.0]), "threshold"),
    "threshold across the scale": (lambda i: i["winograd"].update(c=i["winograd"]["a"]), "output channels"),
    "threshold of a matrix": (lambda i: i["winograd"].update(d=i["winograd"]["a"]), "no Winograd form"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_index(data: bytes, case: str) -> None:
    change, match = HOSTILE[case]
    _refused(_with_index(data, change), match)


def test_unknown_optional_key_is_skipped(data: bytes) -> None:
    same = decode(_with_index(data, _set(1, **{"x-author": "me"})))
    assert model_file.unpack(same) == model_file.unpack(decode(data))


def _with_graph(data: bytes, change: Callable[[ModelProto], Any]) -> bytes:
    sections = take_apart(data)
    graph = ModelProto()
    graph.CopyFrom(decode(data).graph)
    change(graph)
    return put_together({**sections, b"GRPH": stored(graph.SerializeToString())})


def _external(graph: ModelProto) -> None:
    tensor = graph.graph.initializer.add(name="secret", dims=[4], data_type=TensorProto.UINT8)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")


def _external_attribute(graph: ModelProto) -> None:
    holder = ModelProto()
    _external(holder)
    node = helper.make_node("Constant", [], ["s"], value=holder.graph.initializer[0])
    inner = helper.make_graph([node], "inner", [], [])
    graph.graph.node.append(helper.make_node("If", ["x"], ["z"], then_branch=inner, else_branch=inner))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_external, "other files"),
        (_external_attribute, "other files"),
        (lambda g: g.graph.initializer.append(numpy_helper.from_array(floats(2), "a")), "one name"),
        (lambda g: g.functions.add(name="f"), "functions"),
    ],
)
def test_hostile_graph(data: bytes, change: Callable[[ModelProto], Any], match: str) -> None:
    _refused(_with_graph(data, change), match)


def test_graph_that_is_no_protobuf(data: bytes) -> None:
    _refused(put_together({**take_apart(data), b"GRPH": stored(b"\xff" * 50)}), "graph")


def test_graph_that_is_no_valid_model(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.jsm"
    path.write_bytes(_with_graph(data, lambda g: g.graph.node.add(op_type="Conv")))
    with pytest.raises(InputError, match=r"m\.jsm: not a valid ONNX model") as caught:
        model_file.read_model(path)
    assert "\n" not in str(caught.value)


def _bomb(kind: str) -> bytes:
    """Files of a few hundred bytes that claim, or are, a hundred megabytes."""
    coder, zeros = 1, codec.CODERS[1].encode(bytes(100_000_000))
    data = encode(_contents())
    sections = take_apart(data)
    index = read_index(sections)
    if kind == "stream":
        entry = index["tensors"][1]
        start = sum(x.get("length", 0) for x in (*index["books"], index["tensors"][0]))
        old = entry["length"]
        entry.update(length=len(zeros), crc=zlib.crc32(zeros), coder=coder)
        block = sections[b"DATA"]
        sections[b"DATA"] = block[:start] + zeros + block[start + old :]
        sections[b"INDX"] = stored(json.dumps(index).encode())
    elif kind == "graph":
        sections[b"GRPH"] = bytes([coder]) + (100_000_000).to_bytes(4, "little") + zeros
    elif kind == "graph of empty nodes":
        nodes = codec.CODERS[1].encode(b"\x3a\x80\x80\x80\x04" + b"\x0a\x00" * 2**22)
        sections[b"GRPH"] = bytes([coder]) + (5 + 2**23).to_bytes(4, "little") + nodes
    elif kind == "index":
        sections[b"INDX"] = bytes([coder]) + (100_000_000).to_bytes(4, "little") + zeros
    return put_together(sections)


_DECODE = """
import resource, sys
from jointsparse.frontends.container_decoder import decode
from jointsparse.frontends.errors import InputError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    decode(sys.stdin.buffer.read())
except InputError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units")
@pytest.mark.parametrize("kind", ["stream", "graph", "graph of empty nodes", "index"])
def test_bombs_stay_within_bounded_memory(kind: str) -> None:
    bomb = _bomb(kind)
    assert len(bomb) < 5000
    done = subprocess.run([sys.executable, "-c", _DECODE], input=bomb, capture_output=True, check=True)
    message, megabytes = done.stdout.decode().splitlines()
    assert "trust" in message or "declared" in message
    assert int(megabytes) < 40


_INSPECT = """
import resource, sys
from jointsparse.frontends import inspect
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(inspect(sys.argv[1]).parameters)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def _much_in_little(path: Path, threshold: float | tuple[float, ...] | None) -> int:
    """Write a sound file of a few thousand bytes that stands for 82 MiB of weights; their number."""
    shape = (8, 300_000, 3, 3)
    conv = helper.make_node("Conv", ["x", "w"], ["y"])
    graph = model([conv], {"x": (1, 300_000, 3, 3)}, {"w": np.zeros(shape, np.float32)})
    del graph.graph.initializer[:]
    codes = LayerQuantization(np.zeros(shape, np.int32), 0.5)
    spec = {} if threshold is None else {"w": WinogradPruning(4, threshold, True)}
    path.write_bytes(encode(Contents(graph, (Record("w", shape, codes),), spec)))
    assert path.stat().st_size < 8000
    return codes.codes.size


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units")
@pytest.mark.parametrize("threshold", [None, 0.0, (0.0,) * 8])
def test_inspecting_costs_little_more_than_what_is_declared(tmp_path: Path, threshold: Any) -> None:
    path = tmp_path / "m.jsm"
    weights = _much_in_little(path, threshold)
    done = subprocess.run([sys.executable, "-c", _INSPECT, path], capture_output=True, check=True)
    parameters, megabytes = map(int, done.stdout.split())
    assert parameters == weights
    assert megabytes < 3.5 * 4 * weights / 2**20


_READ = """
import resource, sys
from jointsparse.frontends import decompress, load
if sys.argv[2:]:
    action = decompress
else:
    import tvm
    action = load
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
action(*sys.argv[1:])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units")
@pytest.mark.parametrize("more", [[], ["m.onnx"]], ids=["load", "decompress"])
def test_reading_costs_a_few_times_what_is_declared(tmp_path: Path, more: list[str]) -> None:
    """As docs/format.md says: that the number of copies does not grow with the file, and what they are copies of is
    limited."""
    weights = _much_in_little(tmp_path / "m.jsm", 0.0)
    program = [sys.executable, "-c", _READ, "m.jsm", *more]
    done = subprocess.run(program, capture_output=True, check=True, cwd=tmp_path)
    assert int(done.stdout) < 7 * 4 * weights / 2**20


def test_winograd_sparsity_in_pieces_is_that_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = floats(7, 5, 3, 3)
    graph = model([helper.make_node("Conv", ["x", "w"], ["y"])], {"x": (1, 5, 6, 6)}, {"w": weight})
    del graph.graph.initializer[:]
    path = tmp_path / "m.jsm"
    for threshold in (0.4, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)):
        pruning = WinogradPruning(2, threshold, True)
        path.write_bytes(encode(Contents(graph, (Record("w", weight.shape, weight),), {"w": pruning})))
        for piece in (1, 3, 5, 12, 100):
            monkeypatch.setattr(inspection, "_PIECE", piece)
            layer = inspection.inspect(path).layers[0]
            assert layer.winograd_sparsity == pytest.approx(pruning.sparsity(weight), rel=1e-12)


def test_limits_hold_when_writing() -> None:
    graph = ModelProto()
    graph.graph.doc_string = "x" * (container.GRAPH_MOST + 1)
    with pytest.raises(InputError, match="graph"):
        encode(Contents(graph, ()))


# --- libraries -------------------------------------------------------------------------------------------------------

LIBRARIES = (Library("llvm -mcpu=a", "auto", b"first"), Library("llvm -mcpu=b", "auto", b""))


def test_libraries_lie_beside_the_model() -> None:
    plain = _contents()
    found = decode(encode(replace(plain, libraries=LIBRARIES)))
    assert found.libraries == LIBRARIES
    assert model_file.unpack(found) == model_file.unpack(plain)
    assert decode(encode(plain)).libraries == ()


def _libs(entries: Any, packages: bytes = b"firstsecond", length: int | None = None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<I", len(text) if length is None else length) + text + packages


FIRST, SECOND = ({"domain": "auto", "length": n, "target": t} for n, t in ((5, "a"), (6, "b")))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\0\0",
        _libs([FIRST, SECOND], length=2**31),
        _libs([FIRST, SECOND], length=10_000),
        _libs([SECOND, FIRST]),
        _libs([FIRST, FIRST]),
        _libs([FIRST]),
        _libs([FIRST, SECOND, {**SECOND, "target": "c"}]),
        _libs([FIRST, {**SECOND, "length": -6}]),
        _libs([FIRST, {**SECOND, "length": 2**40}]),
        _libs([FIRST, {**SECOND, "target": ""}]),
        _libs([FIRST, {**SECOND, "more": 1}]),
        _libs([FIRST, "second"]),
        _libs({"first": FIRST}),
        _libs(b"[" * 50_000),
        _libs([{"domain": "auto", "length": 0, "target": f"{i:03}"} for i in range(257)], b""),
    ],
)
def test_hostile_libraries(data: bytes, payload: bytes) -> None:
    assert decode(put_together({**take_apart(data), b"libs": _libs([FIRST, SECOND])})).libraries
    _refused(put_together({**take_apart(data), b"libs": payload}), "librar")


def test_a_scale_of_too_many_numbers_stays_as_it_is() -> None:
    """Coder 4 holds 65,536 of them; beyond, coder 2 has the tail of the scale behind its stream."""
    scale = np.linspace(1, 2, 65_537, dtype=np.float32)
    codes = np.tile(np.array([[1], [0], [-2]], np.int32), (21_846, 1))[:65_537]
    record = Record("w", codes.shape, LayerQuantization(codes, 0.5), scale, 0)
    contents = replace(_contents(), records=(record,), winograd={})
    found = decode(encode(contents)).records[0]
    np.testing.assert_array_equal(found.base.codes, codes)
    np.testing.assert_array_equal(found.scale, scale)
