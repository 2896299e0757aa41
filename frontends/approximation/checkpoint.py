"""Layers done, in a file, so that a run that was cut off goes on where it stopped."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..outputs import check_output, replacing
from .layers import Fitted
from .regression import Factors
from .structures import Structure

__all__ = ["Checkpoint", "fingerprint"]


class Checkpoint:
    """The layers of one run.

    Args:
        path: of the file, None for none; layers in it are there from the start. run: its ``fingerprint``.

    Raises:
        InputError: the file cannot be written, is damaged, or of another run.
    """

    def __init__(self, path: Path | None, run: str) -> None:
        self.path, self.run = path, run
        self.done: dict[str, dict[str, Any]] = {}
        if path is None:
            return
        check_output(path)
        if not path.exists():
            return
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            known, self.done = state["run"], state["done"]
        # Not a zip, cut off, no such key: each raises an error of its own.
        except Exception as error:
            raise InputError(f"{path}: damaged, cannot be resumed; remove it to begin anew") from error
        if known != run:
            raise InputError(f"{path}: of another model or other options; give another file, or remove it")

    def get(self, name: str, device: torch.device) -> Fitted | None:
        """A layer, if it is there."""
        if name not in self.done:
            return None
        entry = self.done[name]
        factors = Factors(**{key: value.to(device) for key, value in entry["factors"].items()})
        bias, norm = entry["bias"], entry["norm"]
        return Fitted(
            factors,
            None if bias is None else bias.to(device),
            None if norm is None else tuple(value.to(device) for value in norm),
        )

    def add(self, name: str, found: Fitted) -> None:
        """A layer."""
        if self.path is None:
            return
        # Clones: of a view the whole would be written.
        factors = {key: value.clone() for key, value in vars(found.factors).items()}
        self.done[name] = {"factors": factors, "bias": found.bias, "norm": found.norm}
        with replacing(self.path) as scratch:
            torch.save({"run": self.run, "done": self.done}, scratch)


def fingerprint(model: nn.Module, structures: Mapping[str, Structure], *options: Any) -> str:
    """Of a run: the model's state, what its layers become, and by which options. The data are not looked at."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    digest.update(repr(([(name, asdict(s)) for name, s in structures.items()], options)).encode())
    return digest.hexdigest()
