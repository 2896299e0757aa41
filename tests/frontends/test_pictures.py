"""Pictures of results."""

from __future__ import annotations

import numpy as np

from jointsparse.frontends.data import luma
from jointsparse.frontends.pictures import in_colour, side_by_side


def test_colour_keeps_chroma_and_gains_the_luma() -> None:
    rng = np.random.default_rng(0)
    picture = rng.uniform(0.3, 0.7, (8, 8, 3))
    difference = rng.uniform(-0.1, 0.1, (8, 8)).astype(np.float32)
    coloured = in_colour(picture, difference)
    gained = luma((255 * coloured).astype(np.uint8)) - luma((255 * picture).astype(np.uint8))
    np.testing.assert_allclose(gained, difference, atol=2 / 255)  # both were rounded to 8 bits
    np.testing.assert_allclose(coloured - coloured[..., :1], picture - picture[..., :1], atol=1e-6)


def test_panels_lie_side_by_side() -> None:
    rng = np.random.default_rng(0)
    panels = [(name, rng.random((20, 30, 3))) for name in "ab"]
    sheet = np.asarray(side_by_side(panels, (5, 6, 10, 12)))
    assert sheet.shape == (20 + 2 * 10, 2 * 2 * 12 + 4, 3)
    for (_, picture), left in zip(panels, (0, 28), strict=True):
        part = np.round(picture[5:15, 6:18] * 255)
        np.testing.assert_array_equal(sheet[20::2, left : left + 24 : 2], part)
    whole = np.asarray(side_by_side(panels, (15, 0, 10, 12)))
    assert whole.shape == (20 + 2 * 20, 2 * 2 * 30 + 4, 3)
