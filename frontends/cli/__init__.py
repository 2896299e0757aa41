"""The ``jointsparse`` command: arguments here, the work in the modules beside this folder."""

from .app import main

__all__ = ["main"]
