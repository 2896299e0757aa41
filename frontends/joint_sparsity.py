"""The joint-sparsity objective: one set of filters that can be pruned in the spatial and in the Winograd domain.

The idea is that of Choi, El-Khamy, Lee, "Compression of deep convolutional neural networks under joint sparsity
constraints" (arXiv 1805.08303): one compressed model whose filters are sparse in both domains. The formulas are this
project's. Only the spatial filters w are trained. Two regularisers pull the magnitudes that pruning will remove towards
zero, each in its own domain:

    R_SD = 1/E_SD sum_l || w_l 1{|w_l| <= t_SD} ||^2            R_WD = 1/E_WD sum_l || U_l 1{|U_l| <= t_WD} ||^2
    cost = loss + sum_D  c exp(z_D) (R_D + e) - c z_D,          U = G w G^T,  c = alpha * loss scale

with learnable z_SD, z_WD: a coefficient c exp(z) grows until exp(z) R = 1, so that minimising over z leaves c log R.
The thresholds t are the quantiles of the magnitudes over all layers together and follow the weights. R is divided by
the energy E of its whole domain, so that both live on one scale and R is the share of the energy that pruning would
remove; z is counted from log c; c follows the scale of the loss; the floor e bounds the coefficients, for an R far
below it is not worth its price in loss; the target sparsities may rise over the first steps.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..schedules.winograd import KERNELS, transform
from ..schedules.winograd_pruning import WinogradPruning, magnitudes
from .errors import InputError
from .quantization import check_plain_weight
from .ranges import check_sparsity, check_tile
from .winograd_spec import separating_threshold

__all__ = ["DOMAINS", "JointSparsity", "histogram_quantile"]

DOMAINS = ("spatial", "winograd")

_CALIBRATION = 20  # calls over which the scale of the loss is averaged.
_BINS = 2048
_CHUNK = 2**23  # magnitudes a histogram call: torch.histc counts in float32, which stops at 2^24.
_EXTRA_STATE = ("calls", "losses", "loss_scale", "thresholds", "energies", "held")


@dataclass(frozen=True)
class _Layer:
    """A regularised layer. ``tile``: of its Winograd convolution, None where Winograd does not reach."""

    name: str
    module: nn.Module
    tile: int | None

    @property
    def weight(self) -> Tensor:
        return self.module.weight  # type: ignore[return-value]


class JointSparsity(nn.Module):
    """The regularisers of both domains, for any training loop: ``loss = criterion(model(x), y) + objective(loss)``.

    Give ``objective.parameters()`` (the coefficients) to the optimiser beside the model's. The thresholds depend on the
    weights only, so that under DDP every process finds the same ones. Everything is computed in float32 or better,
    whatever the autocast. ``state_dict`` holds all that a resumed run needs. The model is not a submodule.

    Args:
        model: its convolutions and linear layers are regularised in the spatial domain; its 3x3 and 5x5 convolutions
            of stride 1 and dilation 1 in the Winograd domain as well.
        spatial, winograd: target sparsity of each domain, over all its layers together, in [0, 1); 0 leaves the
            domain alone.
        tile: output tile size of F(tile x tile, r x r), 2 or 4; or a mapping from layer names to it, which leaves the
            layers that it does not name to the spatial domain.
        weighted: compare and penalise Winograd weights multiplied by how much each tile position changes the output
            (``Transform.importance``), instead of raw magnitudes.
        alpha: strength, relative to the scale of the loss.
        floor: e above; alpha / floor bounds the coefficients, relative to the loss. Where the bound is high the last of
            R is forced out at the price of the loss, where it is low pruning makes an error: for CT-SRCNN (Adam, 1600
            steps) 5e6 gave 32.22 dB in both builds, 5e3 32.46 dB in both, 5e2 32.60 dB spatial and 32.32 dB Winograd.
        speed: how far z moves for a unit step of its parameter.
        ramp: calls over which the targets rise from 0, as 1 - (1 - t/ramp)^3.
        refresh: calls between two refreshes of the thresholds.
        exclude: names of layers to leave alone.

    Attributes:
        layers: names of the layers regularised in each domain.

    Raises:
        InputError: for values out of range, unknown layer names, layers that Winograd cannot reach in ``tile``, or
            weights computed from others (weight norm, spectral norm, ``torch.nn.utils.prune``), which no pruning in
            place would outlast.
    """

    def __init__(
        self,
        model: nn.Module,
        spatial: float = 0.8,
        winograd: float = 0.8,
        tile: int | Mapping[str, int] = 4,
        *,
        weighted: bool = True,
        alpha: float = 1.0,
        floor: float = 1e-4,
        speed: float = 100.0,
        ramp: int = 0,
        refresh: int = 10,
        exclude: Iterable[str] = (),
    ) -> None:
        super().__init__()
        _check(spatial, winograd, alpha, floor, speed, ramp, refresh)
        self.targets = {"spatial": float(spatial), "winograd": float(winograd)}
        self.weighted, self.alpha, self.floor, self.speed = weighted, alpha, floor, speed
        self.ramp, self.refresh = ramp, refresh
        self._layers = tuple(_find_layers(model, tile, frozenset(exclude)))
        self.layers = {domain: [x.name for x in self._of(domain)] for domain in DOMAINS}
        self._check_layers()
        self._supports: dict[str, Tensor] | None = None
        self._matrices: dict[tuple[Any, ...], Tensor] = {}
        self.z = nn.ParameterDict({d: nn.Parameter(torch.zeros(())) for d in DOMAINS if self.targets[d]})
        self.z.to(self._layers[0].weight.device)
        # Plain numbers, so that a step waits for the device only when they change; see get_extra_state.
        self.calls = 0
        self.losses = 0
        self.loss_scale = 1.0
        self.thresholds = dict.fromkeys(self.z, 0.0)
        self.energies = dict.fromkeys(self.z, 1.0)
        self.held = False
        self._shares: dict[str, Tensor] = {}

    # --- the objective -----------------------------------------------------------------------------------------------

    def forward(self, loss: Tensor | None = None) -> Tensor:
        """The scalar to add to the loss: both regularisers and ``-c (z_WD + z_SD)``.

        Args:
            loss: this step's loss without it. Its mean magnitude over the first calls (and over all processes) sets the
                scale of c; without it the scale is 1, which suits a cross-entropy near 1.
        """
        device = self._layers[0].weight.device
        with torch.autocast(device.type, enabled=False):
            if self.training:
                self._advance(loss)
            total = torch.zeros((), device=device)
            for domain, share in self.regularisers().items():
                self._shares[domain] = share.detach()
                z = self.speed * self.z[domain]
                total = total + torch.exp(z) * (share + self.floor) - z
            return self.alpha * self.loss_scale * total

    def regularisers(self) -> dict[str, Tensor]:
        """R_SD and R_WD: the share of each active domain's energy at or below its threshold, differentiable."""
        return {domain: self._pruned_energy(domain) / self.energies[domain] for domain in self.z}

    def state(self) -> dict[str, float]:
        """Figures to log: R as of the last call, z and the threshold of each active domain."""
        figures: dict[str, float] = {}
        for domain, z in self.z.items():
            figures[f"R_{domain}"] = float(self._shares.get(domain, math.nan))
            figures[f"z_{domain}"] = self.speed * float(z.detach())
            figures[f"threshold_{domain}"] = self.thresholds[domain]
        return figures

    def get_extra_state(self) -> dict[str, Any]:
        """What ``state_dict`` holds besides the coefficients."""
        return {name: getattr(self, name) for name in _EXTRA_STATE}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """The counterpart of ``get_extra_state``."""
        for name in _EXTRA_STATE:
            setattr(self, name, copy.copy(state[name]))
        self._supports = None

    def _advance(self, loss: Tensor | None) -> None:
        """Count the call, measure the loss, refresh thresholds and energies when due."""
        self._find_supports()
        if loss is not None and self.calls < _CALIBRATION:
            self._measure(float(_mean_over_processes(loss.detach().float())))
        if self.calls % self.refresh == 0:
            self.update_thresholds()
        self.calls += 1

    def _measure(self, loss: float) -> None:
        """Average the magnitude of the loss; one that is not finite, as an overflow may make it, says nothing."""
        if not math.isfinite(loss):
            return
        earlier = self.loss_scale if self.losses else 0.0
        self.losses += 1
        # The magnitude: with a negative scale (a log-likelihood, -SSIM) the regularisers would push the other way.
        self.loss_scale = earlier + (abs(loss) - earlier) / self.losses

    @torch.no_grad()
    def update_thresholds(self) -> None:
        """Set the thresholds to the present targets' quantiles, by histogram, and the energies to the weights'."""
        rise = 1.0 if not self.ramp else 1 - (1 - min(1.0, self.calls / self.ramp)) ** 3
        for domain in self.z:
            values = [rows @ matrix if matrix is not None else rows for rows, matrix in self._values(domain)]
            self.thresholds[domain] = histogram_quantile(values, rise * self.targets[domain])
            energy = sum(float(v.square().sum()) for v in values)
            self.energies[domain] = max(energy, torch.finfo(torch.float32).tiny)

    def _pruned_energy(self, domain: str) -> Tensor:
        threshold = self.thresholds[domain]
        parts = [_PrunedEnergy.apply(rows, matrix, threshold) for rows, matrix in self._values(domain)]
        return torch.stack(parts).sum()

    def _values(self, domain: str) -> list[tuple[Tensor, Tensor | None]]:
        """Pairs ``(rows, matrix)``: the rows times the matrix (None: themselves) are what the domain's threshold is
        compared with, weights or Winograd weights times their importance. Float32.
        """
        if domain == "spatial":
            return [(torch.cat([x.weight.float().reshape(-1) for x in self._of(domain)]), None)]
        groups: dict[tuple[int, int], list[Tensor]] = {}
        for layer in self._of(domain):
            assert layer.tile is not None
            kernel = layer.weight.shape[-1]
            groups.setdefault((layer.tile, kernel), []).append(layer.weight.float().reshape(-1, kernel * kernel))
        return [(torch.cat(filters), self._matrix(key, filters[0].device)) for key, filters in groups.items()]

    def _matrix(self, key: tuple[int, int], device: torch.device) -> Tensor:
        """r^2 x n^2: a flattened filter as a row times it is G w G^T flattened, times the importance if weighted."""
        if (key, device) not in self._matrices:
            winograd = transform(*key)
            _, g, _ = winograd.arrays()
            matrix = np.kron(g, g).T
            if self.weighted:
                matrix = matrix * winograd.importance().reshape(-1)
            self._matrices[key, device] = torch.tensor(matrix, dtype=torch.float32, device=device)
        return self._matrices[key, device]

    # --- pruning -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prune_(self, domain: str) -> dict[str, float]:
        """Prune to the target sparsity, over all layers of the domain together; at least the asked share goes.

        "spatial" sets the smallest weights to zero, in place, and remembers which are left for ``hold_``. "winograd"
        changes no weight, for Winograd weights are not stored: it is the sparsity that ``winograd_spec`` gives, layer
        by layer, with the present weights.

        Returns:
            measured share of zeros of each layer of the domain, in [0, 1]; empty where it has no layer.
        """
        if domain == "winograd":
            if not self._of(domain):
                return {}
            threshold = self._winograd_threshold()
            return {x.name: float(np.mean(self._winograd_magnitudes(x) <= threshold)) for x in self._of(domain)}
        if domain != "spatial":
            raise InputError(f'unknown domain "{domain}"; prune in "spatial" or "winograd"')
        layers = self._of(domain)
        magnitudes = [x.weight.detach().double().abs().cpu().numpy() for x in layers]
        threshold = _threshold(magnitudes, self.targets[domain])
        supports = {}
        for layer, magnitude in zip(layers, magnitudes, strict=True):
            supports[layer.name] = torch.from_numpy(magnitude > threshold).to(layer.weight.device)
        self._supports = supports
        self.held = True
        self.hold_()
        return {x.name: 1 - int(x.weight.count_nonzero()) / x.weight.numel() for x in layers}

    @torch.no_grad()
    def hold_(self) -> None:
        """Set what ``prune_("spatial")`` pruned to zero again: call it after each optimiser step to fine-tune a pruned
        model. Does nothing before the first ``prune_("spatial")``.
        """
        if not self.held:
            return
        self._find_supports()
        assert self._supports is not None
        for layer in self._of("spatial"):
            layer.weight.masked_fill_(~self._supports[layer.name], 0)

    def _find_supports(self) -> None:
        """After a checkpoint is loaded the weights themselves say what was pruned, until the next optimiser step."""
        if self.held and self._supports is None:
            self._supports = {x.name: x.weight.detach() != 0 for x in self._of("spatial")}

    def winograd_spec(self) -> dict[str, dict[str, Any]]:
        """What a compiler needs to prune the present weights in the Winograd domain, by weight name:
        ``{"tile": 2 | 4, "origin": [0, 0], "threshold": t, "weighted": bool}``; empty where the target is 0.

        U = G w G^T is computed in float64; an entry goes where |U| (times the importance if weighted) <= t. The
        threshold lies in a gap between magnitudes, so that rounding cannot flip an entry.
        """
        if not self.targets["winograd"]:
            return {}
        threshold = self._winograd_threshold()
        return {
            f"{x.name}.weight" if x.name else "weight": WinogradPruning(x.tile, threshold, self.weighted).to_json()
            for x in self._of("winograd")
            if x.tile is not None
        }

    def _winograd_threshold(self) -> float:
        return _threshold([self._winograd_magnitudes(x) for x in self._of("winograd")], self.targets["winograd"])

    def _winograd_magnitudes(self, layer: _Layer) -> NDArray[np.float64]:
        assert layer.tile is not None
        return magnitudes(layer.weight.detach().float().cpu().numpy(), layer.tile, self.weighted)

    def _of(self, domain: str) -> list[_Layer]:
        return [x for x in self._layers if domain == "spatial" or x.tile is not None]

    def _check_layers(self) -> None:
        for domain in DOMAINS:
            if self.targets[domain] and not self.layers[domain]:
                raise InputError(f"the model has no layer that can be sparse in the {domain} domain; set {domain}=0")


def _check(spatial: float, winograd: float, alpha: float, floor: float, speed: float, ramp: int, refresh: int) -> None:
    check_sparsity(spatial, "spatial")
    check_sparsity(winograd, "Winograd")
    if not spatial and not winograd:
        raise InputError("spatial and winograd are both 0: nothing is left to make sparse")
    if not (alpha > 0 and floor > 0 and speed > 0) or ramp < 0 or refresh < 1:
        raise InputError("alpha, floor and speed must be above 0, ramp at least 0 and refresh at least 1")


def _find_layers(model: nn.Module, tile: int | Mapping[str, int], exclude: frozenset[str]) -> Iterable[_Layer]:
    """Layers with weights, each weight once however often the model uses it."""
    sizes = tile.values() if isinstance(tile, Mapping) else (tile,)
    for given in sizes:
        check_tile(given)
    modules = {n: m for n, m in model.named_modules() if isinstance(m, (_ConvNd, nn.Linear))}
    named = set(tile) if isinstance(tile, Mapping) else set()
    if unknown := (named | exclude) - set(modules):
        raise InputError(f'the model has no convolution or linear layer "{min(unknown)}"')
    if beyond := sorted(n for n in named if not _winograd_reaches(modules[n])):
        raise InputError(f'tile: layer "{beyond[0]}" is no 3x3 or 5x5 convolution of stride 1 and dilation 1')
    seen: set[int] = set()
    for name, module in modules.items():
        if name in exclude:
            continue
        check_plain_weight(name, module)
        if id(module.weight) in seen:
            continue
        seen.add(id(module.weight))
        size = tile.get(name) if isinstance(tile, Mapping) else tile
        yield _Layer(name, module, size if _winograd_reaches(module) else None)


def _winograd_reaches(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size[0] == module.kernel_size[1]
        and module.kernel_size[0] in KERNELS
        and module.stride == (1, 1)
        and module.dilation == (1, 1)
        and module.padding_mode == "zeros"
    )


def _mean_over_processes(value: Tensor) -> Tensor:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    value = value.clone()
    torch.distributed.all_reduce(value)
    return value / torch.distributed.get_world_size()


class _PrunedEnergy(torch.autograd.Function):
    """Energy of the entries of V = rows @ matrix with |V| <= threshold; its gradient is 2 (V 1{|V| <= threshold})
    matrix^T, for a filter 2 G^T [(G w G^T) * mask] G. Three passes over V, of which only the pruned part is kept.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrix: Tensor | None, threshold: float) -> Tensor:
        values = rows if matrix is None else rows @ matrix
        pruned = values - F.hardshrink(values, threshold)
        ctx.save_for_backward(pruned, matrix)
        return torch.dot(pruned.reshape(-1), pruned.reshape(-1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        pruned, matrix = ctx.saved_tensors
        scaled = (2 * grad) * pruned
        return (scaled if matrix is None else scaled @ matrix.T), None, None


def histogram_quantile(values: list[Tensor], share: float) -> float:
    """The smallest threshold, to within the largest magnitude / 2048^2, that at least ``share`` of all magnitudes in
    ``values`` do not exceed; 0 for ``share`` 0. Two histograms: one finds the bin, the other divides it.
    """
    magnitudes = [v.abs() for v in values]
    wanted = share * sum(m.numel() for m in magnitudes)
    if wanted <= 0:
        return 0.0
    low, high, below = 0.0, max(float(m.max()) for m in magnitudes), 0.0
    for _ in range(2):
        if not high > low:
            break
        chunks = (chunk for m in magnitudes for chunk in m.reshape(-1).split(_CHUNK))
        counts = torch.stack([torch.histc(chunk, _BINS, low, high).double() for chunk in chunks]).sum(0)
        reached = below + counts.cumsum(0)
        index = min(int((reached < wanted).sum()), _BINS - 1)
        below = float(reached[index] - counts[index])
        low, high = low + index * (high - low) / _BINS, low + (index + 1) * (high - low) / _BINS
    return high


def _threshold(magnitudes: list[NDArray[np.float64]], share: float) -> float:
    return separating_threshold(np.concatenate([m.reshape(-1) for m in magnitudes]), share)
