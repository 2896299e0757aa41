"""Quantisation for a small file: as coarse, layer by layer, as a given growth of the loss allows.

The step of a layer is such that in all layers a bit saved costs the same loss: for uniform errors of the quantiser,
step^2 = 12 price / (h log 2), h the mean second derivative of the loss by the layer's weights (as in Choi, El-Khamy,
Lee, "Towards the limit of network quantization", arXiv 1612.01543). Codes are chosen by ``rate_distortion``. The price
is the highest one at which the loss, measured on the calibration data, stays within bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from . import rate_distortion
from .coding.floats import shortened
from .curvature import LOSSES, LayerCurvature, curvatures, evaluating, filters_of, restored
from .errors import InputError
from .quantization import LayerQuantization, Quantization, layers_of, write_
from .short_floats import shorten_

__all__ = ["quantize_within_"]

_SHARE = 0.06
"""Of the price by which the steps go, what a bit costs when codes are chosen. The errors of codes chosen for their bits
have a common direction, towards 0, and cost more than the second derivatives tell; measured on CT-SRCNN, VDSR and
ResNet-20 shares between 0.03 and 0.1 gave the smallest files for their loss."""

_MOST_CODE = 2**15
"""Magnitude of a code, about: bounds what prices near 0 ask for."""

_STEP_DIGITS = 4
"""Binary digits of a step behind the point: in the file's index all of them stand in decimal."""

_FINENESS = 8
"""Prices are found to 2^(1/8)."""

_FURTHEST = 40
"""Powers of two from the first guess."""

Batch = tuple[Tensor, Tensor]


def quantize_within_(
    model: nn.Module,
    batches: Sequence[Batch],
    increase: float,
    loss: str = "mse",
    progress: Callable[[str], None] = lambda line: None,
) -> Quantization:
    """Quantise the weights of every convolution and linear layer of a torch model, in place, for the smallest file.

    Weights that are 0 stay 0; more become it. Everything is measured in evaluation mode. Biases and BatchNorm are
    rounded by ``short_floats.shorten_``, so do not train BatchNorm further. Afterwards as after ``quantize_``, but that
    every layer has a step of its own.

    Args:
        batches: calibration data, inputs and targets as in training; a few hundred images.
        increase: of the mean loss of the batches, at most; in units of the loss, for "cross-entropy" nats.
        loss: "mse" or "cross-entropy".
        progress: told what is tried.

    Raises:
        InputError: for a bad increase or loss, no batches, a model without such layers, one of them taking no part in
            the output, or weights that are parametrised or not finite.
    """
    if loss not in LOSSES:
        raise InputError(f'loss "{loss}": choose {" or ".join(LOSSES)}')
    if not 0 < increase < math.inf:
        raise InputError(f"increase of the loss {increase}: it must be greater than 0")
    if not batches:
        raise InputError("no calibration data; give some batches of inputs and targets")
    search = _Search(model, batches, increase, loss, progress)
    return search.run()


class _Search:
    """For the highest price that stays within bounds."""

    def __init__(
        self, model: nn.Module, batches: Sequence[Batch], increase: float, loss: str, progress: Callable[[str], None]
    ) -> None:
        self.model, self.batches, self.increase = model, batches, increase
        self.loss, self.progress = loss, progress
        self.layers = layers_of(model)
        if not self.layers:
            raise InputError("the model has no convolution or linear layer to quantise")
        self.weights = {name: m.weight.detach().float().cpu().numpy().copy() for name, m in self.layers.items()}
        if not all(np.isfinite(weight).all() for weight in self.weights.values()):
            raise InputError("cannot quantise weights that are not finite")
        self.state = {name: value.clone() for name, value in model.state_dict().items()}
        self.before = self._measure()
        progress(f"calibrating on {len(batches)} batches, loss {self.before:.6g}")
        self.curvatures = curvatures(model, self.layers, batches, loss)

    def run(self) -> Quantization:
        """Quantise; the model is as it was if that fails."""
        try:
            shorten_(self.model)
            return self._run()
        except BaseException:
            self.model.load_state_dict(self.state)
            raise

    def _run(self) -> Quantization:
        nonzeros = sum(int(np.count_nonzero(weight)) for weight in self.weights.values())
        # What rounding alone would make of the price, if it were that.
        first = 2 * math.log(2) * self.increase / max(nonzeros, 1)
        low, high = -_FURTHEST * _FINENESS, _FURTHEST * _FINENESS
        at, stride, best = 0, 2 * _FINENESS, None
        while high - low > 1:
            found = self._quantised(first * 2 ** (at / _FINENESS))
            if self._is_within(found):
                low, best = at, found
            else:
                high = at
            known = low > -_FURTHEST * _FINENESS and high < _FURTHEST * _FINENESS
            if not known:
                at, stride = (at + stride if low == at else at - stride), 2 * stride
                at = min(max(at, low + 1), high - 1)
            else:
                at = (low + high) // 2
        if best is None:
            raise InputError(f"no quantisation keeps the loss within {self.increase:g}; give more, or other data")
        write_(self.model, best)
        return best

    def _is_within(self, quantization: Quantization) -> bool:
        write_(self.model, quantization)
        grown = self._measure() - self.before
        self.progress(f"{quantization.entropy:.3f} bits a weight by entropy, loss {grown:+.3g}")
        return grown <= self.increase

    def _measure(self) -> float:
        device = next(iter(self.layers.values())).weight.device
        with evaluating(self.model), torch.inference_mode():
            losses = [LOSSES[self.loss](self.model(x.to(device)), y.to(device)) for x, y in self.batches]
            return float(torch.stack(losses).double().mean())

    def _quantised(self, price: float) -> Quantization:
        return Quantization(
            None,
            {
                name: _quantised(self.layers[name], weight, self.curvatures[name], price)
                for name, weight in self.weights.items()
            },
        )


def _quantised(module: Any, weight: NDArray[np.float32], curvature: LayerCurvature, price: float) -> LayerQuantization:
    filters = filters_of(module, weight).astype(np.float64)
    present = filters != 0
    if not present.any():
        return LayerQuantization(np.zeros(weight.shape, np.int32), 1.0)
    largest = float(np.abs(filters).max())
    step = math.sqrt(12 * price / (float(curvature.diagonal()[present].mean()) * math.log(2)))
    step = min(max(step, largest / _MOST_CODE), largest)
    step = float(shortened(np.array([step], np.float32), _STEP_DIGITS)[0])
    codes = rate_distortion.quantise(filters, curvature, step, _SHARE * price)
    return LayerQuantization(restored(module, codes.astype(np.int32), weight.shape), step)
