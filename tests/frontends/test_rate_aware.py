"""Rate-aware quantisation: the curvature is that of the loss, codes are the cheapest, the loss stays within bounds."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from jointsparse.frontends import rate_distortion, save
from jointsparse.frontends.coding import tensors
from jointsparse.frontends.curvature import LayerCurvature, curvatures
from jointsparse.frontends.errors import InputError
from jointsparse.frontends.joint_sparsity import JointSparsity
from jointsparse.frontends.losses import LOSSES
from jointsparse.frontends.quantization import CodebookTuner, layers_of, quantize_
from jointsparse.frontends.rate_aware import quantize_within_
from jointsparse.frontends.winograd_inference import winograd_pruned


def _batches(count: int, shape: tuple[int, ...], target: tuple[int, ...]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(shape, generator=draw), torch.randn(target, generator=draw)) for _ in range(count)]


LAYERS = {
    "linear": (lambda: nn.Linear(7, 5), (64, 7)),
    "strided": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2), (4, 4, 11, 9)),
    "grouped": (lambda: nn.Conv2d(4, 6, (3, 1), groups=2), (4, 4, 8, 8)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding="same"), (4, 4, 8, 8)),
    "reflected": (lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"), (4, 3, 8, 8)),
    "one axis": (lambda: nn.Conv1d(3, 5, 4, padding=2), (8, 3, 17)),
    "three axes": (lambda: nn.Conv3d(2, 3, 2), (4, 2, 5, 5, 5)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_curvature_of_one_layer_is_exact(kind: str) -> None:
    """The mean square error of a linear model is quadratic, with the second moments of its inputs as Hessian."""
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    layer = make()
    batches = [(x, layer(x).detach()) for x, _ in _batches(60, shape, (1,))]
    found = curvatures(layer, {"": layer}, batches, "mse")[""]
    error = 1e-2 * torch.randn_like(layer.weight)
    with torch.no_grad():
        layer.weight += error
    grown = float(np.mean([float(LOSSES["mse"](layer(x), y).detach()) for x, y in batches]))
    rows = error.reshape(len(error), -1).double().numpy()
    share = len(rows) // len(found.moments)
    predicted = 0.0
    for index, row in enumerate(rows):
        for block, moments in zip(found.blocks, found.moments[index // share], strict=True):
            predicted += 0.5 * found.filters[index] * row[block] @ moments @ row[block]
    # The weights of filters are estimates from many probes.
    assert predicted == pytest.approx(grown, rel=0.2)


def test_curvature_of_cross_entropy() -> None:
    """Of a softmax of few inputs, against the Gauss-Newton matrix by autograd."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 4, bias=False)
    batches = [(torch.randn(512, 3), torch.zeros(512, dtype=torch.long)) for _ in range(40)]
    diagonal = curvatures(layer, {"": layer}, batches, "cross-entropy")[""].diagonal()
    exact = torch.zeros(4, 3)
    for x, _ in batches:
        p = layer(x).softmax(1).detach()
        exact += torch.einsum("nk,nc->kc", p * (1 - p), x**2) / len(x) / len(batches)
    np.testing.assert_allclose(diagonal, exact.numpy(), rtol=0.5)


def test_layers_that_take_no_part_are_named() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 3), "idle": nn.Linear(3, 3)})
    model.forward = lambda x: model["used"](x)  # type: ignore[method-assign]
    with pytest.raises(InputError, match='"idle"'):
        curvatures(model, layers_of(model), _batches(1, (4, 3), (4, 3)), "mse")


# --- codes -----------------------------------------------------------------------------------------------------------


def _curvature(draw: np.random.Generator, filters: int, inputs: int, groups: int = 1) -> LayerCurvature:
    def moments() -> np.ndarray:
        x = draw.normal(size=(4 * inputs, inputs)) + 1.0
        return x.T @ x / len(x)

    return LayerCurvature(draw.uniform(0.5, 2, filters), [slice(0, inputs)], [[moments()] for _ in range(groups)])


def _growth(weight: np.ndarray, codes: np.ndarray, step: float, curvature: LayerCurvature) -> float:
    error, share = weight - step * codes, len(weight) // len(curvature.moments)
    return sum(
        0.5 * float(curvature.filters[i] * row @ curvature.moments[i // share][0] @ row) for i, row in enumerate(error)
    )


@given(st.integers(0, 2**32 - 1), st.sampled_from([(1, 1), (3, 5), (8, 12), (6, 30)]), st.sampled_from([1, 2, 3]))
@settings(deadline=None, max_examples=40)
def test_zeros_stay_and_feedback_is_hardly_worse_than_rounding(seed: int, shape: tuple[int, int], groups: int) -> None:
    draw = np.random.default_rng(seed)
    filters, inputs = shape[0] * groups, shape[1]
    weight = draw.normal(size=(filters, inputs)) * (draw.random((filters, inputs)) < draw.choice([0.0, 0.3, 1.0]))
    curvature = _curvature(draw, filters, inputs, groups)
    codes = rate_distortion.Layer(weight, curvature).quantise(0.3, 0.0)
    assert not codes[weight == 0].any()
    rounded = np.rint(weight / 0.3).astype(np.int64)
    # Greedy: one filter may be worse off, not all of them by much.
    limit = _growth(weight, rounded, 0.3, curvature)
    assert _growth(weight, codes, 0.3, curvature) <= 1.1 * limit + 1e-12


def test_codes_of_independent_inputs_are_the_cheapest() -> None:
    """Without correlations every weight is by itself: compare with all codes."""
    draw = np.random.default_rng(3)
    weight = draw.normal(size=(4, 25))
    curvature = LayerCurvature(draw.uniform(0.5, 2, 4), [slice(0, 25)], [[np.eye(25)]])
    step, price = 0.4, 0.01
    first = rate_distortion.Layer(weight, curvature).quantise(step, 0.0)
    prices = rate_distortion.Prices.of(first)
    codes = rate_distortion.Layer(weight, curvature).pass_over(step, price, prices)
    candidates = np.arange(-9, 10)
    bits = prices.magnitude[np.minimum(np.abs(candidates), len(prices.magnitude) - 1)]
    cost = price * (bits + (candidates != 0) * prices.nonzero[..., None])
    damped = 0.5 * curvature.filters[:, None, None] * (1 + rate_distortion._DAMPING)
    cost = cost + damped * (weight[..., None] - step * candidates) ** 2
    np.testing.assert_array_equal(codes, candidates[np.argmin(cost, axis=-1)])


def test_dear_bits_make_small_files() -> None:
    draw = np.random.default_rng(5)
    weight = draw.laplace(size=(32, 72)) * (draw.random((32, 72)) < 0.4)
    curvature = _curvature(draw, 32, 72)
    sizes, growths = [], []
    for price in (0.0, 0.01, 0.1, 1.0):
        codes = rate_distortion.Layer(weight, curvature).quantise(0.2, price)
        sizes.append(len(tensors.encode(codes.astype(np.int32))))
        growths.append(_growth(weight, codes, 0.2, curvature))
    assert all(a > b for a, b in itertools.pairwise(sizes))
    assert all(a < b for a, b in itertools.pairwise(growths))


# --- models ----------------------------------------------------------------------------------------------------------


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 4 * 4, 5),
    )
    with torch.no_grad():
        for layer in layers_of(model).values():
            layer.weight *= 3 * (torch.rand_like(layer.weight) < 0.5)
    return model


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_stays_within_bounds(loss: str) -> None:
    model = _network()
    model.eval()
    # What the model itself says: else less of it would be better.
    batches = [(x, model(x).detach()) for x, _ in _batches(4, (16, 3, 2, 2), (1,))]
    if loss == "cross-entropy":
        batches = [(x, y.argmax(1)) for x, y in batches]
    before = {name: layer.weight.detach().clone() for name, layer in layers_of(model).items()}

    def mean() -> float:
        with torch.no_grad():
            return float(np.mean([float(LOSSES[loss](model.eval()(x), y)) for x, y in batches]))

    start, sizes = mean(), []
    for increase in (1e-4, 1e-3, 1e-2):
        with torch.no_grad():
            for name, layer in layers_of(model).items():
                layer.weight.copy_(before[name])
        model.train()
        quantization = quantize_within_(model, batches, increase, loss)
        assert model.training
        assert mean() - start <= increase * 1.001
        for name, layer in layers_of(model).items():
            assert not layer.weight[before[name] == 0].any()
            np.testing.assert_array_equal(layer.weight.detach().numpy(), quantization.layers[name].dequantize())
        sizes.append(sum(len(tensors.encode(layer.codes)) for layer in quantization.layers.values()))
    # Cross-entropy to what the model thinks likeliest falls with larger weights.
    assert loss == "cross-entropy" or sizes[0] > sizes[1] > sizes[2]


def test_smaller_than_one_step_for_all_at_the_same_loss() -> None:
    """What it is for. Layers of different scales, of which one step fits only one."""
    model = _network()
    with torch.no_grad():
        model[0].weight *= 50
        model[6].weight *= 0.02
    model.eval()
    batches = _batches(4, (64, 3, 2, 2), (64, 5))
    batches = [(x, model(x).detach() + 0.01 * y) for x, y in batches]
    start = float(np.mean([float(LOSSES["mse"](model(x), y).detach()) for x, y in batches]))
    plain = {name: layer.weight.detach().clone() for name, layer in layers_of(model).items()}
    one = quantize_(model, step=0.01)
    grown = float(np.mean([float(LOSSES["mse"](model(x), y).detach()) for x, y in batches])) - start
    with torch.no_grad():
        for name, layer in layers_of(model).items():
            layer.weight.copy_(plain[name])
    own = quantize_within_(model, batches, grown)
    size = [sum(len(tensors.encode(layer.codes)) for layer in q.layers.values()) for q in (one, own)]
    assert size[1] < 0.8 * size[0]


def test_what_is_refused_leaves_the_weights() -> None:
    model = _network()
    batches = _batches(2, (4, 3, 2, 2), (4, 5))
    for arguments, message in [
        ((batches, 0.0), "increase"),
        ((batches, float("nan")), "increase"),
        (([], 0.1), "calibration"),
        ((batches, 0.1, "l1"), "choose mse"),
    ]:
        with pytest.raises(InputError, match=message):
            quantize_within_(model, *arguments)
    with pytest.raises(InputError, match="no convolution"):
        quantize_within_(nn.ReLU(), batches, 0.1)
    before = [layer.weight.detach().clone() for layer in layers_of(model).values()]

    def stop(line: str) -> None:
        if "bits a weight" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_within_(model, batches, 0.1, progress=stop)
    for kept, layer in zip(before, layers_of(model).values(), strict=True):
        assert torch.equal(kept, layer.weight)
    with pytest.raises(InputError, match="step of its own"):
        CodebookTuner(model, quantize_within_(model, batches, 0.1))


@pytest.mark.parametrize("bias", [True, False])
def test_layers_of_zeros_stay_zeros(bias: bool) -> None:
    """Without a bias the next layer sees nothing, and nothing is known of its weights."""
    model = nn.Sequential(nn.Linear(4, 4, bias=bias), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.zero_()
    quantization = quantize_within_(model, _batches(2, (16, 4), (16, 2)), 0.01)
    assert not quantization.layers["0"].codes.any()
    assert bias or quantization.layers["2"].codes.any(), "what calibration data do not show is kept, coarsely"


def test_weights_next_to_nothing() -> None:
    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.weight *= 1e-42
    assert not quantize_within_(model, _batches(1, (16, 4), (16, 2)), 0.01).layers[""].codes.any()


def test_frozen_models_of_several_modes() -> None:
    model = _network().requires_grad_(False)
    batches = [(x, model.eval()(x)) for x, _ in _batches(2, (16, 3, 2, 2), (1,))]
    model.train()
    model[1].eval()
    with torch.no_grad():
        quantize_within_(model, batches, 1e-3)
    assert [module.training for module in model] == [index != 1 for index in range(len(model))]
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_weight_of_two_layers_is_looked_at_in_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(0 * x) + self.b(x)

    model = Twice()
    found = curvatures(model, layers_of(model), _batches(4, (16, 3), (16, 3)), "mse")["a"]
    assert (found.diagonal() > 0.1).all()
    assert quantize_within_(model, _batches(4, (16, 3), (16, 3)), 1e-2).layers["a"].codes.any()


def test_batch_norm_is_rounded_no_further_than_the_loss_allows() -> None:
    """Far from 0 a rounded scale moves much; parameters of two layers stay."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4)).eval()
    model[3].weight, model[3].bias = model[2].weight, model[2].bias
    with torch.no_grad():
        model[0].bias.fill_(100.0)
        model[1].running_mean.copy_(model[0].bias)
        model[2].running_var.fill_(4.0)
        model[3].running_var.fill_(9.0)
    batches = [(x, model(x).detach()) for x, _ in _batches(2, (4, 2, 5, 5), (1,))]
    quantize_within_(model, batches, 1e-6)
    assert np.mean([float(LOSSES["mse"](model(x), y).detach()) for x, y in batches]) <= 1e-6
    assert model[3].running_var[0] == 9


def test_after_a_failure_all_is_as_before(tmp_path: Path) -> None:
    class Extra(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

        def get_extra_state(self) -> dict[str, int]:
            return {"calls": 3}

        def set_extra_state(self, state: dict[str, int]) -> None:
            assert state == {"calls": 3}

    model = nn.Sequential(_network(), Extra()).eval()
    quantize_(model, 0.01)
    codes = model[0][0].quantization
    before = {name: value.clone() for name, value in model.state_dict().items() if torch.is_tensor(value)}

    def stop(line: str) -> None:
        if "bits a weight" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_within_(model, _batches(2, (4, 3, 2, 2), (4, 5)), 0.1, progress=stop)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if name in before)
    assert model[0][0].quantization is codes
    save(model, torch.zeros(1, 3, 2, 2), tmp_path / "m.jsm")


@pytest.mark.parametrize("batches", [[torch.zeros(4, 4)], [((torch.zeros(4, 4),), torch.zeros(4, 2))], [(1.0, 2.0)]])
def test_what_is_no_batch_is_refused(batches: list[Any]) -> None:
    with pytest.raises(InputError, match="pairs of tensors"):
        quantize_within_(nn.Linear(4, 2), batches, 0.1)


def test_data_that_are_not_finite_are_refused() -> None:
    with pytest.raises(InputError, match="loss of the calibration data is nan"):
        quantize_within_(nn.Linear(4, 2), [(torch.full((4, 4), torch.nan), torch.zeros(4, 2))], 0.1)


def test_batches_may_come_one_after_the_other() -> None:
    quantize_within_(nn.Linear(4, 2), iter(_batches(3, (16, 4), (16, 2))), 0.01)


def test_the_loss_of_the_winograd_build_stays_within_bounds() -> None:
    """What the codes are off makes Winograd weights that pruning takes away."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
    objective = JointSparsity(model, 0.5, 0.7)
    batches = [(x, model(x).detach()) for x, _ in _batches(3, (4, 4, 12, 12), (1,))]

    def loss() -> float:
        with torch.no_grad(), winograd_pruned(model, objective.winograd_spec()):
            return float(np.mean([float(LOSSES["mse"](model(x), y)) for x, y in batches]))

    before, entropies, state = loss(), [], copy.deepcopy(model.state_dict())
    for regularised in (objective, None):
        model.load_state_dict(state)
        quantization = quantize_within_(model, batches, 2e-5, objective=regularised)
        entropies.append(quantization.entropy)
        if regularised:
            assert loss() - before <= 2e-5
    assert entropies[0] >= entropies[1]
