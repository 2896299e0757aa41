"""What a kernel does to its sums before it stores them."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tir

from .vector_code import VectorCode

ACTIVATIONS = ("", "clip", "leaky_relu")

LARGEST = 3.4028234663852886e38
"""Of float32: no bound."""


@dataclass(frozen=True)
class Activation:
    """An activation function.

    Attributes:
        activation: one of ACTIVATIONS; ``""`` is none.
        low, high: bounds of ``clip`` (ReLU is 0 to LARGEST); the slope of ``leaky_relu`` below 0 is `low`.
    """

    activation: str = ""
    low: float = 0.0
    high: float = LARGEST

    def emit(self, code: VectorCode, value: tir.PrimExpr) -> tir.PrimExpr:
        if self.activation == "clip":
            # In the order of Relay's clip, which decides what becomes of NaN.
            if self.high < LARGEST:
                value = tir.Min(value, code.splat(self.high))
            return tir.Max(value, code.splat(self.low)) if self.low > -LARGEST else value
        if self.activation == "leaky_relu":
            return tir.Select(value > code.splat(0.0), value, value * code.splat(self.low))
        return value


RELU = Activation("clip")
