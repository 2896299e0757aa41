"""What sparse convolutions read and write, as tensors and as TIR buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Generic, TypeVar

from tvm import te, tir

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Arguments(Generic[T]):
    """What a kernel reads, by the names that the operators declare, in their order.

    Attributes:
        values, indices, indptr: rows of weights, as formats.py packs them.
        filters: number of the filter of each row, where they are not in the filters' order.
        bias: of each filter.
        residual: None where nothing is added.
    """

    data: T
    values: T
    indices: T
    indptr: T
    filters: T | None = None
    bias: T
    residual: T | None = None


@dataclass(frozen=True, kw_only=True)
class ConvolutionBuffers(Arguments[tir.Buffer]):
    """Arguments of a kernel, and its result."""

    result: tir.Buffer


def convolution(
    name: str,
    shape: Sequence[int],
    arguments: Arguments[te.Tensor],
    emit: Callable[[ConvolutionBuffers], tir.Stmt],
) -> te.Tensor:
    """A kernel as a tensor.

    Args:
        shape: of the result.
        emit: the code.
    """
    tensors = {field.name: getattr(arguments, field.name) for field in fields(arguments)}
    given = {argument: tensor for argument, tensor in tensors.items() if tensor is not None}

    def body(ins: Sequence[tir.Buffer], outs: Sequence[tir.Buffer]) -> tir.Stmt:
        return emit(ConvolutionBuffers(**dict(zip(given, ins, strict=True)), result=outs[0]))

    return te.extern([tuple(shape)], list(given.values()), body, name=name, dtype="float32")
