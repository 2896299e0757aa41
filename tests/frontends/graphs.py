"""ONNX graphs in a line or two, their results by ONNX Runtime, and ``.jsm`` files taken apart and put together."""

from __future__ import annotations

import bz2
import hashlib
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, shape_inference

Arrays = Mapping[str, NDArray[Any]]


def model(
    nodes: Sequence[NodeProto],
    inputs: Mapping[str, Sequence[int | str]],
    constants: Arrays,
    outputs: Sequence[str] = ("y",),
    opset: int = 17,
    output_shape: Sequence[int] | None = None,
) -> ModelProto:
    """A model of float32 inputs; a string is an open axis. Output shapes are inferred if none is given."""
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, output_shape) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    inferred = shape_inference.infer_shapes(proto, data_prop=True)
    del inferred.graph.value_info[:]
    return inferred


def run(proto: ModelProto, *inputs: NDArray[Any]) -> list[NDArray[Any]]:
    """All outputs by ONNX Runtime, graph optimisation off."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {i.name: x for i, x in zip(session.get_inputs(), inputs, strict=True)}))


def floats(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    """Standard normal float32."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def take_apart(data: bytes) -> dict[bytes, bytes]:
    """The sections of a file, by the specification alone."""
    sections, position = {}, 20
    while position < len(data):
        tag, length = struct.unpack_from("<4sI", data, position)
        sections[tag] = data[position + 8 : position + 8 + length]
        position += 12 + length
    return sections


def put_together(sections: Mapping[bytes, bytes], version: int = 1) -> bytes:
    """A file of these sections, lengths and checksums right; END is made anew."""
    parts = [_section(tag, payload) for tag, payload in sections.items() if tag != b"END "]
    length = 20 + sum(map(len, parts)) + 20
    body = struct.pack("<8sHHQ", b"\x89JSM\r\n\x1a\n", version, 0, length) + b"".join(parts)
    return body + _section(b"END ", hashlib.blake2b(body, digest_size=8).digest())


def read_index(sections: Mapping[bytes, bytes]) -> dict[str, Any]:
    """The index of a file."""
    payload = sections[b"INDX"]
    coder, size = struct.unpack_from("<BI", payload)
    text = payload[5:] if coder == 0 else bz2.decompress(payload[5:])
    assert len(text) == size
    return dict(json.loads(text))


def stored(text: bytes) -> bytes:
    """A text section's payload, not coded."""
    return struct.pack("<BI", 0, len(text)) + text


def _section(tag: bytes, payload: bytes) -> bytes:
    return struct.pack("<4sI", tag, len(payload)) + payload + struct.pack("<I", zlib.crc32(tag + payload))
