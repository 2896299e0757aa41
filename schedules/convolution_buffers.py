"""What sparse convolutions read and write, as TIR buffers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tvm import te, tir


@dataclass(frozen=True)
class ConvolutionBuffers:
    """Arguments of a kernel, and its result.

    Attributes:
        filters: number of the filter of each row of weights, where they are not in the filters' order.
        residual: None where nothing is added.
    """

    data: tir.Buffer
    values: tir.Buffer
    indices: tir.Buffer
    indptr: tir.Buffer
    bias: tir.Buffer
    result: tir.Buffer
    filters: tir.Buffer | None = None
    residual: tir.Buffer | None = None


def convolution(
    name: str,
    shape: Sequence[int],
    tensors: Mapping[str, te.Tensor | None],
    emit: Callable[[ConvolutionBuffers], tir.Stmt],
) -> te.Tensor:
    """A kernel as a tensor.

    Args:
        shape: of the result.
        tensors: by their names in ConvolutionBuffers; None for what there is not.
        emit: the code.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def body(ins: Sequence[tir.Buffer], outs: Sequence[tir.Buffer]) -> tir.Stmt:
        return emit(ConvolutionBuffers(**dict(zip(given, ins, strict=True)), result=outs[0]))

    return te.extern([tuple(shape)], list(given.values()), body, name=name, dtype="float32")
