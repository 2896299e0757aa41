"""What stands behind each layer of a model: a BatchNorm, and an activation that the approximation can reckon with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

__all__ = ["Surroundings", "surroundings_of"]

_RELU = {F.relu, torch.relu, torch.relu_}
_SAME = (nn.Identity, nn.Dropout, nn.Dropout2d)
"""Of no effect in evaluation mode."""


@dataclass(frozen=True)
class Surroundings:
    """Of a layer.

    Attributes:
        uses: how often the model calls it. norm: name of the BatchNorm that alone takes its output, or None. rectified:
            whether all that follows takes a ReLU of that.
    """

    uses: int
    norm: str | None
    rectified: bool


def surroundings_of(model: nn.Module) -> dict[str, Surroundings] | None:
    """Of every convolution and linear layer by name; None where the model cannot be traced, its control flow
    depending on data."""
    try:
        graph = fx.symbolic_trace(model).graph
    # Tracing runs the model's own code on stand-ins for tensors, which may raise anything.
    except Exception:
        return None
    modules = dict(model.named_modules())
    found: dict[str, Surroundings] = {}
    for node in graph.nodes:
        if node.op == "call_module" and isinstance(modules.get(node.target), (nn.Conv2d, nn.Linear)):
            uses = found[node.target].uses + 1 if node.target in found else 1
            found[node.target] = Surroundings(uses, *_behind(node, modules))
    return found


def _behind(node: Any, modules: dict[str, nn.Module]) -> tuple[str | None, bool]:
    norm = None
    users = _users(node, modules)
    if len(users) == 1 and isinstance(modules.get(str(users[0].target)), nn.BatchNorm2d):
        norm = str(users[0].target)
        users = _users(users[0], modules)
    return norm, bool(users) and all(_is_relu(user, modules) for user in users)


def _users(node: Any, modules: dict[str, nn.Module]) -> list[Any]:
    """Those of a node, and in place of those that do nothing, theirs."""
    users = []
    for user in node.users:
        does_nothing = user.op == "call_module" and isinstance(modules[user.target], _SAME)
        users += _users(user, modules) if does_nothing else [user]
    return users


def _is_relu(node: Any, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[node.target], nn.ReLU)
    if node.op == "call_function":
        return node.target in _RELU
    return node.op == "call_method" and node.target in ("relu", "relu_")
