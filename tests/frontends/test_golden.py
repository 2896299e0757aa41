"""Files of version 1 that must decode to the same bits for ever, on every platform, and be written the same again.

``golden_v1.jsm`` was written when bzip2 coded everything, ``golden_v1_codes.jsm`` has its codes by coder 2,
``golden_v1_floats.jsm`` its scales and biases by coders 3 and 4. Never replace them: a change that breaks these tests
needs a coder of another number, or a new version of the format.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from jointsparse.frontends import model_file, onnx_graph, winograd_spec
from jointsparse.frontends.container import Contents, Record, Shared
from jointsparse.frontends.container_encoder import encode
from jointsparse.frontends.quantization import LayerQuantization
from jointsparse.schedules.winograd_pruning import WinogradPruning

KINDS = {"bzip2": "golden_v1.jsm", "codes": "golden_v1_codes.jsm", "floats": "golden_v1_floats.jsm"}
FILES = {kind: Path(__file__).with_name(name) for kind, name in KINDS.items()}
each_file = pytest.mark.parametrize("golden", FILES.values(), ids=FILES)


def _codes(count: int, spread: int, factor: int) -> np.ndarray:
    """Integers in -spread..spread, a third of them 0, by a congruential sequence."""
    state = np.cumsum(np.full(count, factor, np.int64)) ** 2 % 10_007
    return np.where(state % 3 == 0, 0, state % (2 * spread + 1) - spread).astype(np.int32)


def contents() -> Contents:
    """Codes with dither, codebook, two bytes a code, sharing, scale; raw tensors; thresholds. From integers alone."""
    first, second, third = _codes(900, 7, 3), _codes(900, 300, 5), _codes(64, 2, 7)
    values = np.array([c / 16 + (c > 0) / 64 for c in np.unique(first)], np.float32)
    values[np.unique(first) == 0] = 0
    scale = np.array([0.5, -1.25, 3, 0.1, 0, 7, 1e-3, 2, 1, 1], np.float32)
    records = (
        Record("dithered", (10, 10, 3, 3), LayerQuantization(first.reshape(10, 10, 3, 3), 0.1, 2**40 + 1), scale, 0),
        Record("tuned", (10, 10, 3, 3), LayerQuantization(first.reshape(10, 10, 3, 3), 0.0625, None, values)),
        Record("wide", (100, 9), LayerQuantization(second.reshape(100, 9), 0.3)),
        Record("again", (10, 10, 3, 3), Shared("dithered"), scale[::-1].copy(), 0),
        Record("bias", (64,), (third / 8).astype(np.float32)),
        Record("table", (8, 8), third.reshape(8, 8).astype(np.int64)),
    )
    spec = {
        "dithered": WinogradPruning(4, 0.3, True),
        "tuned": WinogradPruning(2, tuple(k / 10 for k in range(10)), False),
    }
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "golden",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="golden")
    return Contents(model, records, spec)


def _decoded(golden: Path) -> tuple[ModelProto, dict[str, np.ndarray]]:
    model = model_file.unpack(model_file.read(golden))
    return model, {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def test_written_the_same_again() -> None:
    assert encode(contents()) == FILES["floats"].read_bytes()


def _philox(counter: int, key: int) -> list[int]:
    """Philox4x64-10 (Salmon et al., SC 2011): the four words of one block."""
    words, keys, mask = [counter, 0, 0, 0], [key, 0], 2**64 - 1
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * words[0], 0xCA5A826395121157 * words[2]
        words = [
            (second >> 64) ^ words[1] ^ keys[0],
            second & mask,
            (first >> 64) ^ words[3] ^ keys[1],
            first & mask,
        ]
        keys = [(keys[0] + 0x9E3779B97F4A7C15) & mask, (keys[1] + 0xBB67AE8584CAA73B) & mask]
    return words


@each_file
def test_values_by_a_second_decoder(golden: Path) -> None:
    """The arithmetic of docs/format.md, written out again with Python integers."""
    first = _codes(900, 7, 3)
    bits = [word for block in range(225) for word in _philox(block + 1, 2**40 + 1)]
    dither = np.array([np.float32((b >> 40) / 2**24 - 0.5) * np.float32(0.1) for b in bits], np.float32)
    plain = np.array([np.float32(c) * np.float32(0.1) for c in first.tolist()], np.float32)
    base = np.where(first == 0, np.float32(0), plain - dither).reshape(10, 10, 3, 3)
    scale = np.array([0.5, -1.25, 3, 0.1, 0, 7, 1e-3, 2, 1, 1], np.float32)
    weights = _decoded(golden)[1]
    np.testing.assert_array_equal(weights["dithered"], base * scale.reshape(-1, 1, 1, 1))
    np.testing.assert_array_equal(weights["again"], base * scale[::-1].reshape(-1, 1, 1, 1))
    tuned = [c / 16 + (c > 0) / 64 if c else 0 for c in first.tolist()]
    np.testing.assert_array_equal(weights["tuned"].ravel(), np.array(tuned, np.float32))
    wide = [np.float32(c) * np.float32(0.3) for c in _codes(900, 300, 5).tolist()]
    np.testing.assert_array_equal(weights["wide"].ravel(), np.array(wide, np.float32))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dithered", "2370e0226dd29c23597487c0f18256ac"),
        ("tuned", "e0bd228b66a676afcb73202df77e0872"),
        ("wide", "76169091baa018f7d5dba943dd07519e"),
        ("again", "d1a83688f4badadd54bf27026bc459d3"),
        ("bias", "e53f8e29c34b2baee43c9069e1dc378a"),
        ("table", "1359d82b0b77bc9b827b465c926771d9"),
    ],
)
@each_file
def test_bits(golden: Path, name: str, expected: str) -> None:
    assert hashlib.sha256(_decoded(golden)[1][name].tobytes()).hexdigest()[:32] == expected


@each_file
def test_thresholds(golden: Path) -> None:
    model, weights = _decoded(golden)
    shapes = {name: weight.shape for name, weight in weights.items()}
    spec = winograd_spec.parse(onnx_graph.metadata(model, winograd_spec.KEY) or "", shapes, "golden")
    scale = np.array([0.5, -1.25, 3, 0.1, 0, 7, 1e-3, 2, 1, 1], np.float32)
    assert spec["dithered"].threshold == tuple(0.3 * abs(float(s)) for s in scale)
    assert spec["tuned"] == WinogradPruning(2, tuple(k / 10 for k in range(10)), False)
