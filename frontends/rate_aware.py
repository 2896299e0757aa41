"""Quantisation for a small file: as coarse, layer by layer, as a given growth of the loss allows.

The step of a layer is such that in all layers a bit saved costs the same loss: for uniform errors of the quantiser,
step^2 = 12 price / (h log 2), h the mean second derivative of the loss by the layer's weights (as in Choi, El-Khamy,
Lee, "Towards the limit of network quantization", arXiv 1612.01543). Codes are chosen by ``rate_distortion``. The price
is as high as the loss, measured on the calibration data, allows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .coding.floats import shortened
from .curvature import curvatures, filters_of, restored
from .errors import InputError
from .losses import LOSSES, Batch, evaluating
from .quantization import LayerQuantization, Quantization, layers_of, write_
from .ranges import check_increase
from .rate_distortion import Layer
from .short_floats import DIGITS, shorten_
from .winograd_inference import winograd_pruned

if TYPE_CHECKING:
    from .joint_sparsity import JointSparsity

__all__ = ["quantize_within_"]

_SHARE = 0.06
"""Of the price by which the steps go, what a bit costs when codes are chosen. The errors of codes chosen for their bits
have a common direction, towards 0, and cost more than the second derivatives tell; measured on CT-SRCNN, VDSR and
ResNet-20 shares between 0.03 and 0.1 gave the smallest files for their loss."""

_DIGITS = (DIGITS, 11, 14, 23)
"""Of biases and BatchNorm, tried in turn."""

_SHORT_SHARE = 0.25
"""Of the increase that they may take."""

_COARSE = 7

_LEAST = 2.0**-100
"""Weights are as good as zero if none of a layer's is larger."""

_MOST_CODE = 2**15
"""Magnitude of a code, about: bounds what prices near 0 ask for."""

_STEP_DIGITS = 4
"""Binary digits of a step behind the point: in the file's index all of them stand in decimal."""

_FINENESS = 8
"""Prices are found to 2^(1/8)."""

_FURTHEST = 40
"""Powers of two from the first guess."""


def quantize_within_(
    model: nn.Module,
    batches: Iterable[Batch],
    increase: float,
    loss: str = "mse",
    *,
    objective: JointSparsity | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Quantization:
    """Quantise the weights of every convolution and linear layer of a torch model, in place, for the smallest file.

    Weights that are 0 stay 0; more become it. Everything is measured in evaluation mode. Biases and BatchNorm are
    rounded by ``short_floats.shorten_``, so do not train BatchNorm further. Afterwards as after ``quantize_``, but that
    every layer has a step of its own.

    Args:
        batches: calibration data, inputs and targets as in training: a few hundred images, at once, and every time the
            same. increase: of their mean loss, at most; in units of the loss, for "cross-entropy" nats.
        loss: "mse" or "cross-entropy".
        objective: the model's; the loss of the network pruned in the Winograd domain, by ``winograd_spec``, may then
            grow no further than that of the network as it is.
        progress: told what is tried.

    Raises:
        InputError: for a bad increase or loss, no batches or such that are not pairs of tensors, a model without such
            layers, one of them taking no part in the output, weights that are parametrised or not finite, or where
            nothing keeps the loss within bounds. The model is then as it was.
    """
    if loss not in LOSSES:
        raise InputError(f'loss "{loss}": choose {" or ".join(LOSSES)}')
    check_increase(increase)
    if not (layers := layers_of(model)):
        raise InputError("the model has no convolution or linear layer to quantise")
    search = _Search(model, layers, _checked(batches), increase, loss, objective, progress)
    state = copy.deepcopy(model.state_dict())
    earlier = {name: getattr(module, "quantization", None) for name, module in layers.items()}
    try:
        return search.run()
    except BaseException:
        model.load_state_dict(state)
        for name, module in layers.items():
            module.quantization = earlier[name]
        raise


def _checked(batches: Iterable[Batch]) -> list[Batch]:
    found = list(batches)
    if not found:
        raise InputError("no calibration data; give some batches of inputs and targets")
    for batch in found:
        if len(batch) != 2 or not all(isinstance(part, Tensor) and part.dim() and len(part) for part in batch):
            raise InputError("calibration data must be pairs of tensors, inputs and targets, of one image or more")
    return found


class _Search:
    """For a price as high as the bounds allow."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Any],
        batches: Sequence[Batch],
        increase: float,
        loss: str,
        objective: JointSparsity | None,
        progress: Callable[[str], None],
    ) -> None:
        self.model, self.layers, self.batches = model, layers, batches
        self.increase, self.loss, self.objective, self.progress = increase, loss, objective, progress
        self.weights = {name: m.weight.detach().float().cpu().numpy().copy() for name, m in layers.items()}
        if not all(np.isfinite(weight).all() for weight in self.weights.values()):
            raise InputError("cannot quantise weights that are not finite")
        self.before = self._measure()
        if not all(map(math.isfinite, self.before)):
            raise InputError(f"the loss of the calibration data is {self.before[0]}; give finite data and parameters")

    def run(self) -> Quantization:
        """Quantise."""
        self.progress(f"calibrating on {len(self.batches)} batches, loss {self.before[0]:.6g}")
        found = curvatures(self.model, self.layers, self.batches, self.loss)
        self.layouts = {name: Layer(filters_of(self.layers[name], w), found[name]) for name, w in self.weights.items()}
        self._shorten()
        return self._search()

    def _shorten(self) -> None:
        """Biases and BatchNorm to as few digits as cost a small part of the increase."""
        state = copy.deepcopy(self.model.state_dict())
        for digits in _DIGITS:
            self.model.load_state_dict(state)
            shorten_(self.model, digits)
            if self._grown() <= _SHORT_SHARE * self.increase:
                break

    def _search(self) -> Quantization:
        """By doubling or halving the price, at ever longer strides, until one is within bounds and one is not; then by
        bisection. The loss may fall again at a higher price, which is not looked for."""
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
            raise InputError(f"no quantisation keeps the loss within {self.increase:g}; allow more, or give other data")
        write_(self.model, best)
        return best

    def _is_within(self, quantization: Quantization) -> bool:
        write_(self.model, quantization)
        grown = self._grown()
        self.progress(f"{quantization.entropy:.3f} bits a weight by entropy, loss {grown:+.3g}")
        return grown <= self.increase

    def _grown(self) -> float:
        """By how much the loss is above what it was, in the domain where that is more."""
        return max(after - before for after, before in zip(self._measure(), self.before, strict=True))

    def _measure(self) -> list[float]:
        """The losses of the model as it is, and as its Winograd build computes it."""
        losses = [self._mean()]
        if self.objective is not None and (spec := self.objective.winograd_spec()):
            with winograd_pruned(self.model, spec):
                losses.append(self._mean())
        return losses

    def _mean(self) -> float:
        """Of the loss, over all images."""
        device = next(iter(self.layers.values())).weight.device
        total = 0.0
        with evaluating(self.model), torch.inference_mode():
            for inputs, targets in self.batches:
                mean = LOSSES[self.loss](self.model(inputs.to(device)), targets.to(device))
                total += float(mean) * len(inputs)
        return total / sum(len(inputs) for inputs, _ in self.batches)

    def _quantised(self, price: float) -> Quantization:
        return Quantization(
            None,
            {
                name: _quantised(self.layers[name], weight, self.layouts[name], price)
                for name, weight in self.weights.items()
            },
        )


def _quantised(module: Any, weight: NDArray[np.float32], layer: Layer, price: float) -> LayerQuantization:
    largest = float(np.abs(weight).max(initial=0))
    if largest < _LEAST:
        return LayerQuantization(np.zeros(weight.shape, np.int32), 1.0)
    # Where all inputs of a layer are 0 in the calibration data, these say nothing: it is rounded coarsely.
    slope = layer.slope()
    step = math.sqrt(12 * price / (slope * math.log(2))) if slope > 0 else largest / _COARSE
    step = min(max(step, largest / _MOST_CODE), largest)
    step = float(shortened(np.array([step], np.float32), _STEP_DIGITS)[0])
    codes = layer.quantise(step, _SHARE * price if slope > 0 else 0.0)
    return LayerQuantization(restored(module, codes.astype(np.int32), weight.shape), step)
