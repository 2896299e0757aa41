"""A torch module to an ONNX model that keeps its parameters' names and its BatchNorm layers.

The TorchScript exporter is used while torch has it: with ``TrainingMode.PRESERVE`` it neither folds BatchNorm (the
codes of a quantised layer would be lost) nor constants (weights would be renamed), and it takes a tenth of the time.
The ``torch.export`` one folds both when it optimises, so it runs unoptimised, with onnxscript's constant folding after
it; it takes over where the first fails, and where torch has dropped it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import onnx
from onnx import ModelProto

from . import onnx_graph
from .errors import InputError

if TYPE_CHECKING:
    import torch

_LEGACY_OPSET = 17

# Elements of a constant that may be folded: shapes and the like, not weights, which would lose their names.
_FOLDED_MOST = 16

# Loggers that print a page about every export, and exporters' other channels, are silenced for the call.
_LOGGERS = ("torch.onnx", "torch.onnx._internal.exporter._registration", "onnxscript", "onnx_ir")


def export(module: torch.nn.Module, example_input: Any, exporter: str = "auto") -> ModelProto:
    """Trace ``module`` in evaluation mode on ``example_input`` and give the ONNX model; the module is not changed.

    Args:
        example_input: a tensor, or a tuple of tensors for a module of several inputs. Every axis gets its size.
        exporter: "torchscript", "dynamo", or "auto": the first, then the second.

    Returns:
        The model; initializers are named as the parameters are (``layer1.0.conv1.weight``).

    Raises:
        InputError: the module cannot be exported.
    """
    import torch

    from .losses import evaluating

    if not isinstance(module, torch.nn.Module):
        raise InputError(f"expected a torch.nn.Module, got {type(module).__name__}")
    inputs = _inputs(example_input)
    exporters = {"torchscript": _by_torchscript, "dynamo": _by_dynamo}
    chosen = list(exporters) if exporter == "auto" else [exporter]
    failures = []
    with evaluating(module), torch.no_grad():
        for name in chosen:
            try:
                return exporters[name](module, inputs)
            # Each exporter has errors of its own, none of them documented.
            except Exception as error:
                failures.append(f"{name}: {type(error).__name__}: {onnx_graph.first_line(error)}")
    raise InputError(f"{type(module).__name__} cannot be exported to ONNX ({'; '.join(failures)}); change the module")


def _by_torchscript(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> ModelProto:
    import torch

    stream = io.BytesIO()
    with _quiet():
        torch.onnx.export(
            module,
            inputs,
            stream,  # type: ignore[arg-type]
            dynamo=False,
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
            opset_version=_LEGACY_OPSET,
            input_names=_input_names(inputs),
            output_names=None,
        )
    return onnx.load_from_string(stream.getvalue())


def _by_dynamo(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> ModelProto:
    import torch

    with _quiet():
        program = torch.onnx.export(
            module, inputs, dynamo=True, optimize=False, verbose=False, input_names=_input_names(inputs)
        )
        return _finish(program)


def _finish(program: Any) -> ModelProto:
    """Fold the small constants (the exporter makes a chain of nodes for a missing bias), leave the weights."""
    from onnxscript import optimizer

    # A transposed weight is folded whatever its size unless it is named here.
    optimizer.fold_constants(
        program.model,
        input_size_limit=_FOLDED_MOST,
        should_fold=lambda node: False if node.op_type == "Transpose" else None,
    )
    return program.model_proto


def _inputs(example_input: Any) -> tuple[torch.Tensor, ...]:
    import torch

    inputs = (example_input,) if isinstance(example_input, torch.Tensor) else example_input
    if not isinstance(inputs, Sequence) or not inputs or not all(isinstance(x, torch.Tensor) for x in inputs):
        raise InputError("the example input must be a tensor or a tuple of tensors, as the module takes them")
    return tuple(inputs)


def _input_names(inputs: Sequence[Any]) -> list[str]:
    return ["input"] if len(inputs) == 1 else [f"input_{i}" for i in range(len(inputs))]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Deprecation notices and exporters' chatter off; tracer warnings, which tell of a wrong model, stay."""
    import torch

    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    # The TorchScript exporter prints the graph of a failed export from C++, past Python's streams; torch's switch for
    # it is turned on again by every export.
    print_graph = getattr(torch._C, "_jit_onnx_log", None)
    if print_graph is not None:
        torch._C._jit_onnx_log = lambda *_: None
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            warnings.simplefilter("default", category=torch.jit.TracerWarning)
            yield
    finally:
        if print_graph is not None:
            torch._C._jit_onnx_log = print_graph
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
