"""Ranges of the numbers that several functions take: one rule and one message for each."""

from __future__ import annotations

import math

from ..schedules.winograd import TILES
from .errors import InputError


def check_sparsity(share: float, what: str) -> None:
    """Refuse a share of zeros outside [0, 1).

    Args:
        what: is to be sparse, for the message.

    Raises:
        InputError: it is outside.
    """
    if not 0 <= share < 1:
        raise InputError(f"{what} sparsity {share}: choose a share from 0 to below 1")


def check_tile(tile: int) -> None:
    """Refuse what is no Winograd output tile size.

    Raises:
        InputError: there are no transforms of that size.
    """
    if tile not in TILES:
        raise InputError(f"tile {tile}: choose one of {', '.join(map(str, TILES))}")


def check_quantiser(step: float | None, bits: int | None, seed: int = 0) -> None:
    """Refuse a quantiser that is not one: ``step`` (0: none) or ``bits``, and the seed of the dither.

    Raises:
        InputError: both are given, or one is out of range.
    """
    if step is not None and bits is not None:
        raise InputError("step and bits contradict each other; give one of them")
    if step is not None and not 0 <= step < math.inf:
        raise InputError(f"quantisation step {step}: choose a number above 0, or 0 for exact weights")
    if bits is not None and not 2 <= bits <= 16:
        raise InputError(f"{bits} bits: choose 2 to 16")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed {seed}: choose 0 to 2^32 - 1")


def check_increase(increase: float) -> None:
    """Refuse what the loss cannot be allowed to grow by.

    Raises:
        InputError: it is not above 0, or not finite.
    """
    if not 0 < increase < math.inf:
        raise InputError(f"increase of the loss {increase}: it must be greater than 0")
