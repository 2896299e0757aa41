"""The one exception for bad input: files, models and options that cannot be used as they are."""

from __future__ import annotations


class InputError(ValueError):
    """What the user gave is at fault. The message is one line: what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with 1.
    """
