"""Resize and Upsample as TVM 0.19's importer reads them well.

It ignores ``axes``, antialiasing and aspect (opset 18), takes the ratio of the sizes for the scale, and for nearest
neighbours the rounding of a whole upscaling. Nearest neighbours are gathers, so whatever it would get wrong of them
is written as Gather with the indices that ONNX defines; the two usual kinds stay a Resize.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from . import onnx_graph
from .onnx_operators import Chain, Site, set_attributes

_SAFE_NEAREST = {(b"asymmetric", b"floor"), (b"half_pixel", b"round_prefer_floor")}
_half = np.float32(0.5)
# Position in the input of each position in the output, its scale, and both lengths; float32 as in ONNX Runtime,
# so that ties fall to the same side.
_COORDINATES: dict[bytes, Callable[[NDArray[Any], Any, int, int], NDArray[Any]]] = {
    b"asymmetric": lambda x, scale, old, new: x / scale,
    b"half_pixel": lambda x, scale, old, new: (x + _half) / scale - _half,
    b"pytorch_half_pixel": lambda x, scale, old, new: (x + _half) / scale - _half if new > 1 else x * 0,
    b"align_corners": lambda x, scale, old, new: x * np.float32(old - 1) / np.float32(max(new - 1, 1)),
    b"tf_half_pixel_for_nn": lambda x, scale, old, new: (x + _half) / scale,
}
_ROUNDINGS: dict[bytes, Callable[[NDArray[Any]], NDArray[Any]]] = {
    b"floor": np.floor,
    b"ceil": np.ceil,
    b"round_prefer_floor": lambda x: np.ceil(x - _half),
    b"round_prefer_ceil": lambda x: np.floor(x + _half),
}


def resize(node: NodeProto, site: Site) -> list[NodeProto]:
    """Write ``axes`` and unusual nearest neighbours out; refuse what TVM would ignore."""
    for option, harmless in (("antialias", 0), ("keep_aspect_ratio_policy", b"stretch")):
        if onnx_graph.attribute(node, option, harmless) != harmless:
            raise site.error(node, f"has {option}, which TVM 0.19 lacks; export without it")
    position = _values_at(node)
    values = _complete(node, site, position)
    shape = np.array(site.shape(node))
    # ONNX floors a scaled size; a little less than whole is whole, for scales are rounded to float32.
    sizes = np.floor(values * shape + 1e-3).astype(np.int64) if position < 3 else values
    kind = _nearest_kind(node)
    if kind is not None and site.opset > 10 and (kind not in _SAFE_NEAREST or _is_broken(values, shape, position)):
        scales = values if position < 3 else sizes.astype(np.float32) / shape.astype(np.float32)
        return _gather(node, site, kind, scales.astype(np.float32), sizes)
    if any(new != old for new, old in zip(sizes[:2], shape[:2], strict=True)):
        raise site.error(node, "resizes batch or channels, which TVM 0.19 lacks")
    if _is_broken(values, shape, position):
        raise _broken(node, site, values, shape)
    return [node]


def upsample(node: NodeProto, site: Site) -> list[NodeProto]:
    """The ancestor of Resize: TVM rounds a scaled size, ONNX floors it."""
    scales = site.constant(node, 1)
    given = np.array(onnx_graph.attribute(node, "scales", []), np.float32) if scales is None else scales
    shape = np.array(site.shape(node))
    if given.size != shape.size:
        raise site.error(node, f"has {given.size} scales for {shape.size} axes; export the model again")
    if _is_broken(given, shape, 2):
        raise _broken(node, site, given, shape)
    return [node]


def _broken(node: NodeProto, site: Site, scales: NDArray[Any], shape: NDArray[Any]) -> Exception:
    return site.error(
        node,
        f"scales {shape.tolist()} by {[round(s, 4) for s in scales.tolist()]}, which makes no whole size; export with "
        "sizes (in torch: interpolate or Upsample with size= instead of scale_factor=)",
    )


def _is_broken(values: NDArray[Any], shape: NDArray[Any], position: int) -> bool:
    """TVM takes the ratio of the sizes for the scale; they agree if the scaled size is whole."""
    return position < 3 and any(not math.isclose(s, round(s), abs_tol=1e-3) for s in (values * shape).tolist())


def _values_at(node: NodeProto) -> int:
    """Opset 10: data, scales. Later: data, region, scales, sizes."""
    return 1 if len(node.input) == 2 else 3 if len(node.input) > 3 and node.input[3] else 2


def _complete(node: NodeProto, site: Site, position: int) -> NDArray[Any]:
    """Scales or sizes for all axes, also in the node."""
    values = site.constant(node, position)
    if values is None:
        raise site.error(node, "has neither scales nor sizes; export the model again")
    axes, shape = onnx_graph.attribute(node, "axes", None), site.shape(node)
    if axes is None:
        return values
    full = np.ones(len(shape), np.float32) if position < 3 else np.array(shape, np.int64)
    full[[a % len(shape) for a in axes]] = values.ravel()
    node.input[position] = site.store(full, f"{node.output[0]}.sizes")
    set_attributes(node, axes=None)
    return full


def _nearest_kind(node: NodeProto) -> tuple[bytes, bytes] | None:
    """How positions are mapped and rounded; None if it interpolates."""
    if onnx_graph.attribute(node, "mode", b"nearest") != b"nearest":
        return None
    mapping = onnx_graph.attribute(node, "coordinate_transformation_mode", b"half_pixel")
    return mapping, onnx_graph.attribute(node, "nearest_mode", b"round_prefer_floor")


def _gather(
    node: NodeProto, site: Site, kind: tuple[bytes, bytes], scales: NDArray[Any], sizes: NDArray[Any]
) -> list[NodeProto]:
    mapping, rounding = kind
    if mapping not in _COORDINATES or rounding not in _ROUNDINGS:
        raise site.error(node, f"has nearest neighbours by {mapping.decode()} and {rounding.decode()}, not supported")
    chain = Chain(node, site)
    for axis, (old, new) in enumerate(zip(site.shape(node), sizes.tolist(), strict=True)):
        if new != old or scales[axis] != 1:
            x = _COORDINATES[mapping](np.arange(new, dtype=np.float32), scales[axis], old, new)
            chain.then("Gather", _ROUNDINGS[rounding](x).clip(0, old - 1).astype(np.int64), axis=axis)
    return chain.end()
