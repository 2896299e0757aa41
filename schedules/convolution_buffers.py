"""What both sparse convolutions read and write, as TIR buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import te, tir


@dataclass(frozen=True)
class ConvolutionBuffers:
    """Arguments of a kernel; the residual is None where nothing is added."""

    data: tir.Buffer
    values: tir.Buffer
    indices: tir.Buffer
    indptr: tir.Buffer
    bias: tir.Buffer
    residual: tir.Buffer | None
    result: tir.Buffer


def convolution(
    name: str,
    shape: Sequence[int],
    tensors: Sequence[te.Tensor],
    residual: te.Tensor | None,
    emit: Callable[[ConvolutionBuffers], tir.Stmt],
) -> te.Tensor:
    """A kernel as a tensor.

    Args:
        shape: of the result.
        tensors: data, values, indices, indptr and bias.
        residual: of the shape of the result, or None.
        emit: the code.
    """

    def body(ins: Sequence[tir.Buffer], outs: Sequence[tir.Buffer]) -> tir.Stmt:
        data, values, indices, indptr, bias, *rest = ins
        return emit(ConvolutionBuffers(data, values, indices, indptr, bias, rest[0] if rest else None, outs[0]))

    inputs = [*tensors, *([] if residual is None else [residual])]
    return te.extern([tuple(shape)], inputs, body, name=name, dtype="float32")
