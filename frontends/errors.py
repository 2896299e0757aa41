"""The one exception for bad input: files, models and options that cannot be used as they are."""

from __future__ import annotations

import re


class InputError(ValueError):
    """What the user gave is at fault. The message is one line: what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with 1. Line breaks, and what a terminal would obey, are
    taken out of the message: names in it may come from a stranger's file.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(" ".join(_COLOUR.sub("", message).split())))


# Torch and others colour their messages, which end up inside ours.
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def printable(text: str) -> str:
    """``text`` with a replacement character for each that is not printable."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
