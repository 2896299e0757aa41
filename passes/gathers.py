"""Layers that read channels taken out of an image: what the copy costs, and how they would read the image itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..schedules.geometry import ConvGeometry
from .layers import Layer
from .parts import Gather

COPY = 0.4e-9
"""Seconds for an element that is read and written once more."""


def gather_seconds(layer: Layer, found: Gather) -> float:
    """For the copy of the channels that a layer reads."""
    assert layer.geometry is not None
    geometry = layer.geometry
    return COPY * geometry.batch * len(found.channels) * geometry.in_height * geometry.in_width


def without_gather(geometry: ConvGeometry, found: Gather) -> ConvGeometry | None:
    """Of a layer that reads all channels of the source; None where its groups do not divide them, or a group reads
    channels of another."""
    channels = int(found.source.checked_type.shape[1])
    if channels % geometry.groups:
        return None
    groups, size = np.arange(geometry.groups)[:, None], channels // geometry.groups
    own = bool(np.all(found.channels.reshape(geometry.groups, -1) // size == groups))
    return replace(geometry, in_channels=channels) if own else None


def scattered(filters: NDArray[np.float32], geometry: ConvGeometry, found: Gather) -> NDArray[np.float32]:
    """Filters of the channels taken out, as filters of a layer that reads all channels."""
    groups, channels = geometry.groups, geometry.in_channels // geometry.groups
    whole = np.zeros((filters.shape[0], channels, *filters.shape[2:]), np.float32)
    rows = filters.shape[0] // groups
    for group, taken in enumerate(found.channels.reshape(groups, -1) % channels):
        part = slice(group * rows, (group + 1) * rows)
        for place, channel in enumerate(taken):
            # Adds, as a channel may have been taken twice.
            whole[part, channel] += filters[part, place]
    return whole
