"""Universal quantisation: one uniform step for every weight of a network, with or without a shared dither.

The idea is that of Choi, El-Khamy, Lee, arXiv 1805.08303 and "Universal deep neural network compression", arXiv
1802.02271. Here a weight w becomes the integer code ``round((w + u) / step)``, where u is nought or pseudo-random,
uniform in [-step/2, step/2) and known to the decoder, which gives back ``code * step - u``; code 0 gives 0, so that
zeros stay zero. Fine-tuning moves the value of each code by the average gradient of its members.

The core needs numpy only; torch is imported by the functions that take a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .ranges import check_quantiser

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "CodebookTuner",
    "LayerQuantization",
    "Quantization",
    "dither",
    "largest_code",
    "layer_seed",
    "quantize_",
    "quantize_array",
    "step_for_bits",
]


_PIECE = 1 << 18
"""Weights to dequantise at a time; a multiple of the four words of a block of Philox."""


def dither(seed: int, count: int, step: float) -> NDArray[np.float32]:
    """``count`` numbers uniform in [-step/2, step/2): the same bits on every platform.

    24 bits of numpy's Philox counter generator (whose raw stream is fixed) make a fraction that float32 holds exactly;
    the product with ``step`` is rounded once.
    """
    return _Dither(seed, step).next(count)


class _Dither:
    """``dither``, some at a time."""

    def __init__(self, seed: int, step: float) -> None:
        self._generator, self._step = np.random.Philox(key=seed), np.float32(step)

    def next(self, count: int) -> NDArray[np.float32]:
        bits = self._generator.random_raw(count) >> np.uint64(40)
        fraction = bits.astype(np.float32) * np.float32(2.0**-24) - np.float32(0.5)
        return fraction * self._step


@dataclass(frozen=True)
class LayerQuantization:
    """The quantised weights of one layer.

    Attributes:
        codes: int32, the weight's shape. step: float32 value.
        dither_seed: of ``dither``, None for none.
        codebook: float32 value of each distinct code, ascending (0 is among them only if it occurs, with value 0);
            None where they are code * step.
    """

    codes: NDArray[np.int32]
    step: float
    dither_seed: int | None = None
    codebook: NDArray[np.float32] | None = None

    def dequantize(self) -> NDArray[np.float32]:
        """The weights, bit for bit the same everywhere; in pieces, so that little more than they is held."""
        codes, values = self.codes.reshape(-1), np.empty(self.codes.size, np.float32)
        distinct = None if self.codebook is None else np.unique(codes)
        noise = None if self.dither_seed is None else _Dither(self.dither_seed, self.step)
        for begin in range(0, len(codes), _PIECE):
            part, of_part = values[begin : begin + _PIECE], codes[begin : begin + _PIECE]
            if distinct is None or self.codebook is None:
                np.multiply(of_part.astype(np.float32), np.float32(self.step), out=part)
            else:
                part[:] = self.codebook[np.searchsorted(distinct, of_part)]
            if noise is not None:
                part -= noise.next(len(part))
            part[of_part == 0] = 0
        return values.reshape(self.codes.shape)


@dataclass(frozen=True)
class Quantization:
    """What ``quantize_`` did, by layer name.

    Attributes:
        step: of all layers; None where each has its own.
    """

    step: float | None
    layers: Mapping[str, LayerQuantization]

    @property
    def levels(self) -> int:
        """Distinct codes over all layers."""
        return len(np.unique(np.concatenate([np.unique(x.codes) for x in self.layers.values()])))

    @property
    def entropy(self) -> float:
        """First-order entropy of the codes in bits a weight: what a memoryless lossless coder could reach."""
        return entropy(np.concatenate([x.codes.reshape(-1) for x in self.layers.values()]))


def entropy(codes: NDArray[np.integer]) -> float:
    """Of codes, each by itself, in bits a code."""
    shares = np.unique(codes, return_counts=True)[1] / codes.size
    return float(abs(-np.sum(shares * np.log2(shares))))


def quantize_array(weight: NDArray[np.floating], step: float, dither_seed: int | None = None) -> LayerQuantization:
    """Quantise an array.

    Raises:
        InputError: for a step that is not positive, or so small that a code would not fit in 32 bits, or weights that
            are not finite.
    """
    step = float(np.float32(step))
    if not np.isfinite(step) or step <= 0:
        raise InputError(f"quantisation step {step}: it must be greater than 0")
    if not np.isfinite(weight).all():
        raise InputError("cannot quantise weights that are not finite")
    values = np.asarray(weight, np.float64)
    if dither_seed is not None:
        values = values + dither(dither_seed, values.size, step).reshape(values.shape)
    codes = np.rint(values / step)
    if codes.size and np.abs(codes).max() >= 2**31:
        raise InputError(f"quantisation step {step} is too small for weights up to {np.abs(weight).max():.3g}")
    # Half a step of dither may round a zero weight away from zero; zeros must stay.
    codes = np.where(np.asarray(weight) == 0, 0, codes)
    return LayerQuantization(codes.astype(np.int32), step, dither_seed)


def largest_code(bits: int) -> int:
    """Of ``bits`` bits, sign included.

    Raises:
        InputError: ``bits`` is outside 2 to 16.
    """
    check_quantiser(None, bits)
    return 2 ** (bits - 1) - 1


def layer_seed(seed: int, index: int) -> int:
    """Of the dither of layer number ``index``: every layer has a stream of its own.

    Raises:
        InputError: ``seed`` is outside 0 to 2^32 - 1.
    """
    check_quantiser(None, None, seed)
    return (index << 32) | seed


def step_for_bits(model: nn.Module, bits: int) -> float:
    """The step at which the largest weight of the model gets the largest code of ``bits`` bits (2 to 16)."""
    most = largest_code(bits)
    largest = max((float(m.weight.detach().abs().max()) for m in layers_of(model).values()), default=0.0)
    if not largest > 0:
        raise InputError("the model has no non-zero weight to quantise")
    return largest / most


def quantize_(model: nn.Module, step: float, dither: bool = False, seed: int = 0) -> Quantization:
    """Quantise the weights of every convolution and linear layer of a torch model, in place, by one step.

    Each layer's module gets an attribute ``quantization``, from which ``save`` takes the codes.

    Args:
        step: in units of the weights; see ``step_for_bits``.
        dither: whether to dither, each layer with its own stream of ``seed`` (0 to 2^32 - 1).

    Raises:
        InputError: for a bad step or seed, a model without such layers, or weights that are parametrised.
    """
    check_quantiser(None, None, seed)
    layers = {}
    for index, (name, module) in enumerate(layers_of(model).items()):
        weight = module.weight.detach().float().cpu().numpy()
        layers[name] = quantize_array(weight, step, layer_seed(seed, index) if dither else None)
    if not layers:
        raise InputError("the model has no convolution or linear layer to quantise")
    quantization = Quantization(float(np.float32(step)), layers)
    write_(model, quantization)
    return quantization


class CodebookTuner:
    """Fine-tunes what the codes stand for: after ``backward`` of ``loss + objective(loss)``, ``step()`` moves each
    non-zero code's value, which all layers share, by the average gradient of the weights that carry it. Zeros stay
    zero. Keep the joint-sparsity objective on, or the Winograd domain loses its sparsity.

    Under DDP the gradients are averaged before, so that every process makes the same step.

    Args:
        model: quantised by ``quantize_``. rate: of Adam, in units of the quantisation step.
    """

    def __init__(self, model: nn.Module, quantization: Quantization, rate: float = 1e-2) -> None:
        import torch

        self.model, self.quantization = model, quantization
        modules = layers_of(model)
        if quantization.step is None:
            raise InputError("every layer has a step of its own: there is no common codebook to tune; use quantize_")
        self._step = quantization.step
        if set(modules) != set(quantization.layers):
            raise InputError("the quantisation is of another model: their layers differ")
        self._weights = [modules[name].weight for name in quantization.layers]
        distinct, members = np.unique(
            np.concatenate([x.codes.reshape(-1) for x in quantization.layers.values()]), return_inverse=True
        )
        device = self._weights[0].device
        self._codes = distinct
        self._members = torch.from_numpy(members.reshape(-1)).to(device)
        self._counts = torch.bincount(self._members, minlength=len(distinct)).to(torch.float64)
        self._frozen = torch.from_numpy(distinct == 0).to(device)
        values = self._present_values()
        self._values = torch.from_numpy(values).to(device, torch.float64).requires_grad_()
        self._optimiser = torch.optim.Adam([self._values], lr=rate * self._step)

    def step(self) -> None:
        """Move the codebook by the weights' gradients, write the weights anew, and clear their gradients."""
        import torch

        missing = [w for w in self._weights if w.grad is None]
        if missing:
            raise InputError("no gradient: call backward before step")
        gradients = torch.cat([w.grad.detach().reshape(-1).double() for w in self._weights if w.grad is not None])
        sums = torch.bincount(self._members, gradients, minlength=len(self._codes))
        self._values.grad = torch.where(self._frozen, 0.0, sums / self._counts)
        self._optimiser.step()
        for weight in self._weights:
            weight.grad = None
        self._publish()

    def _present_values(self) -> NDArray[np.float64]:
        """The shared value of each code: of the layers' codebooks where they have one, else code * step."""
        values = self._codes.astype(np.float64) * self._step
        for layer in self.quantization.layers.values():
            if layer.codebook is not None:
                values[np.searchsorted(self._codes, np.unique(layer.codes))] = layer.codebook
        return values

    def _publish(self) -> None:
        values = self._values.detach().cpu().numpy().astype(np.float32)
        layers = {
            name: replace(layer, codebook=values[np.searchsorted(self._codes, np.unique(layer.codes))])
            for name, layer in self.quantization.layers.items()
        }
        self.quantization = replace(self.quantization, layers=layers)
        write_(self.model, self.quantization)


def write_(model: nn.Module, quantization: Quantization) -> None:
    """Set the weights to what the codes stand for, and leave these on the modules."""
    import torch

    modules = layers_of(model)
    with torch.no_grad():
        for name, layer in quantization.layers.items():
            modules[name].weight.copy_(torch.from_numpy(layer.dequantize()))
            modules[name].quantization = layer


def layers_of(model: nn.Module) -> dict[str, Any]:
    """The modules of convolutions and linear layers by name, each weight once."""
    from torch import nn
    from torch.nn.modules.conv import _ConvNd

    seen: set[int] = set()
    layers: dict[str, Any] = {}
    for name, module in model.named_modules():
        if not isinstance(module, (_ConvNd, nn.Linear)):
            continue
        check_plain_weight(name, module)
        if id(module.weight) not in seen:
            seen.add(id(module.weight))
            layers[name] = module
    return layers


def check_plain_weight(name: str, module: nn.Module) -> None:
    """Refuse a weight that torch computes from other parameters before each use: what is written to it would be lost.

    Raises:
        InputError: ``module.weight`` is no parameter.
    """
    if module._parameters.get("weight") is None:
        raise InputError(f'layer "{name}": its weight is computed (parametrised); remove the parametrisation first')
