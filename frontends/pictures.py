"""Results of super-resolution to look at: in colour, and side by side. Pictures are H x W x 3 in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["in_colour", "side_by_side", "to_pillow"]

Picture = NDArray[np.floating]
Box = tuple[int, int, int, int]


def in_colour(enlarged: Picture, difference: NDArray[np.floating]) -> Picture:
    """Add a difference of luma (H x W) to a picture; chroma stays that of the bicubic enlargement, as is the custom."""
    # BT.601 puts 219 steps of luma where RGB has 255.
    return enlarged + (255 / 219) * difference[:, :, None]


def side_by_side(panels: Sequence[tuple[str, Picture]], detail: Box) -> Image:
    """The same detail of each labelled picture, doubled in size.

    Args:
        detail: top, left, height and width; all of a picture that is too small to have it.
    """
    from PIL import Image as Pillow
    from PIL import ImageDraw

    top, left, height, width = _inside(panels[0][1], detail)
    margin, heading = 4, 20
    sheet = Pillow.new("RGB", ((2 * width + margin) * len(panels) - margin, 2 * height + heading), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (label, picture) in enumerate(panels):
        part = to_pillow(picture[top : top + height, left : left + width])
        x = index * (2 * width + margin)
        sheet.paste(part.resize((2 * width, 2 * height), Pillow.Resampling.NEAREST), (x, heading))
        draw.text((x, 3), label, fill="black", font_size=13)
    return sheet


def to_pillow(picture: Picture) -> Image:
    """Rounded to 8 bits."""
    from PIL import Image as Pillow

    return Pillow.fromarray(np.clip(np.round(picture * 255), 0, 255).astype(np.uint8))


def _inside(picture: Picture, detail: Box) -> Box:
    top, left, height, width = detail
    if picture.shape[0] < top + height or picture.shape[1] < left + width:
        return 0, 0, picture.shape[0], picture.shape[1]
    return detail
