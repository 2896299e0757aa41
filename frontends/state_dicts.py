"""Weights alone: a state dict from a file into a network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["SUFFIXES", "load_weights"]

SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt")
"""Of files that hold weights alone."""


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict into ``model``, strictly; only BatchNorm's batch counters may be missing.

    Args:
        path: a safetensors file, or a pickle of a state dict, or of one under "state_dict".

    Raises:
        InputError: where the file cannot be read, holds more than tensors, or does not fit.
    """
    state = _read(path)
    # Files made without the counters are common, and nothing depends on them.
    counters = {k: v for k, v in model.state_dict().items() if k.endswith("num_batches_tracked")}
    try:
        model.load_state_dict({**counters, **state})
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: does not fit the network ({detail})") from error


def _read(path: Path) -> dict[str, Tensor]:
    """A state dict; a pickle may hold tensors only, so that a stranger's file cannot run code."""
    import torch

    if not path.is_file():
        raise InputError(f"{path}: there is no such file; check the path")
    try:
        if path.suffix.lower() == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    # Not a zip, not a pickle, or a pickle of more than tensors: each raises an error of its own.
    except Exception as error:
        raise InputError(f"{path}: not a file of weights alone ({' '.join(str(error).split())[:200]})") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(k, str) and torch.is_tensor(v) for k, v in state.items()):
        raise InputError(f"{path}: holds no state dict; save model.state_dict(), or export the model to ONNX")
    return state
