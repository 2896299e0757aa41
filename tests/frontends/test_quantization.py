"""The universal quantiser: error bounds, zeros, bit-exact dither, codebook fine-tuning."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from jointsparse.frontends.errors import InputError
from jointsparse.frontends.joint_sparsity import JointSparsity
from jointsparse.frontends.quantization import (
    CodebookTuner,
    LayerQuantization,
    dither,
    quantize_,
    quantize_array,
    step_for_bits,
)

WEIGHTS = hnp.arrays(np.float32, hnp.array_shapes(max_dims=4, max_side=6), elements=st.floats(-2, 2, width=32))
SEEDS = st.one_of(st.none(), st.integers(0, 2**40))


@given(WEIGHTS, st.floats(1e-3, 1.0), SEEDS)
@settings(deadline=None)
def test_error_is_bounded_and_zeros_stay(weight: np.ndarray, step: float, seed: int | None) -> None:
    layer = quantize_array(weight, step, seed)
    result = layer.dequantize()
    assert result.dtype == np.float32
    assert result.shape == weight.shape
    assert (result[weight == 0] == 0).all()
    assert (result[layer.codes == 0] == 0).all()
    kept = layer.codes != 0
    assert np.abs(result - weight)[kept].max(initial=0) <= step / 2 + 1e-6
    # A dithered weight below one step may become zero, a plain one below half.
    assert np.abs(weight[~kept]).max(initial=0) <= (step / 2 if seed is None else step) + 1e-6


@given(WEIGHTS, st.floats(1e-3, 1.0))
@settings(deadline=None)
def test_plain_quantisation_is_idempotent(weight: np.ndarray, step: float) -> None:
    once = quantize_array(weight, step)
    twice = quantize_array(once.dequantize(), step)
    np.testing.assert_array_equal(once.codes, twice.codes)


def test_dither_is_bit_exact() -> None:
    """Golden bits: they are part of the file format. A change is a breaking change of it."""
    assert dither(7, 4, 0.25).view(np.uint32).tolist() == [1035894888, 3176238016, 3164840920, 3166814648]
    assert dither(7, 3, 0.25).tolist() == dither(7, 4, 0.25)[:3].tolist()


def test_dither_is_uniform() -> None:
    values = dither(3, 100_000, 1.0)
    assert values.min() >= -0.5
    assert values.max() < 0.5
    assert abs(values.mean()) < 0.005
    assert abs(values.var() - 1 / 12) < 0.001


def test_dithered_error_does_not_depend_on_the_weight() -> None:
    """What dither is for: the error of non-zero codes is uniform, whatever the weight."""
    step = 0.1
    for value in (0.35, 0.375, 0.4):
        weight = np.full(50_000, value, np.float32)
        error = quantize_array(weight, step, 11).dequantize() - weight
        assert abs(error.mean()) < 1e-3
        assert abs(error.var() - step**2 / 12) < 2e-5


@pytest.mark.parametrize("step", [0.0, -1.0, float("nan"), float("inf"), 1e-12])
def test_bad_steps_are_refused(step: float) -> None:
    with pytest.raises(InputError, match="step"):
        quantize_array(np.ones(3, np.float32), step)


def test_weights_must_be_finite() -> None:
    with pytest.raises(InputError, match="finite"):
        quantize_array(np.array([1.0, np.nan], np.float32), 0.1)


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 1, 1))


@pytest.mark.parametrize("with_dither", [False, True])
def test_quantize_writes_the_weights_and_leaves_the_codes_on_the_modules(with_dither: bool) -> None:
    model = small_net()
    objective = JointSparsity(model, 0.6, 0.6)
    objective.prune_("spatial")
    before = [m.weight.detach().clone() for m in model if isinstance(m, nn.Conv2d)]
    quantization = quantize_(model, 0.05, with_dither, seed=3)
    assert set(quantization.layers) == {"0", "2", "3"}
    for weight, module in zip(before, (m for m in model if isinstance(m, nn.Conv2d)), strict=True):
        layer = module.quantization
        assert isinstance(layer, LayerQuantization)
        np.testing.assert_array_equal(module.weight.detach().numpy(), layer.dequantize())
        assert (module.weight[weight == 0] == 0).all()
    if with_dither:
        assert len({layer.dither_seed for layer in quantization.layers.values()}) == 3
    assert 0 < quantization.entropy < np.log2(quantization.levels) + 1e-9


def test_step_for_bits() -> None:
    model = small_net()
    quantization = quantize_(model, step_for_bits(model, 4))
    codes = np.concatenate([x.codes.reshape(-1) for x in quantization.layers.values()])
    assert np.abs(codes).max() == 7
    with pytest.raises(InputError, match="bits"):
        step_for_bits(model, 1)


@pytest.mark.parametrize("with_dither", [False, True])
def test_codebook_moves_by_average_gradients(with_dither: bool) -> None:
    """One step against the definition; the value of a code is shared by all layers and zero is frozen."""
    model = small_net()
    JointSparsity(model, 0.5, 0.5).prune_("spatial")
    step = 0.1
    quantization = quantize_(model, step, with_dither)
    tuner = CodebookTuner(model, quantization, rate=0.5)
    modules = [m for m in model if isinstance(m, nn.Conv2d)]
    x = torch.randn(2, 1, 8, 8)
    model(x).square().mean().backward()
    codes = np.concatenate([m.quantization.codes.reshape(-1) for m in modules])
    gradients = np.concatenate([m.weight.grad.numpy().reshape(-1) for m in modules])
    tuner.step()
    for code in np.unique(codes):
        average = gradients[codes == code].astype(np.float64).mean()
        # Adam's first step is its rate times the gradient over its own magnitude.
        expected = code * step - (0.5 * step * average / (abs(average) + 1e-8) if code else 0)
        for module in modules:
            distinct = np.unique(module.quantization.codes)
            if code in distinct:
                value = module.quantization.codebook[np.searchsorted(distinct, code)]
                assert value == pytest.approx(expected, abs=1e-4 * step)
    for module in modules:
        np.testing.assert_array_equal(module.weight.detach().numpy(), module.quantization.dequantize())
        assert module.weight.grad is None


def tuned(regularised: bool) -> tuple[nn.Sequential, JointSparsity, list[float]]:
    """A pruned and quantised net after codebook fine-tuning towards the outputs it had before."""
    model, target = small_net(), small_net()
    objective = JointSparsity(model, 0.5, 0.5, alpha=3.0)
    objective.prune_("spatial")
    x = torch.randn(8, 1, 10, 10, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = target(x)
    tuner = CodebookTuner(model, quantize_(model, 0.15), rate=0.02)
    losses = []
    for _ in range(60):
        loss = nn.functional.mse_loss(model(x), y)
        (loss + objective(loss) if regularised else loss).backward()
        tuner.step()
        losses.append(float(loss.detach()))
    objective.update_thresholds()
    return model, objective, losses


def test_codebook_fine_tuning_lowers_the_loss_and_keeps_zeros() -> None:
    model, _, losses = tuned(regularised=False)
    assert losses[-1] < 0.95 * losses[0]
    reference = small_net()
    JointSparsity(reference, 0.5, 0.5).prune_("spatial")
    for module, pruned in zip(model, reference, strict=True):
        if isinstance(module, nn.Conv2d):
            assert (module.weight[pruned.weight == 0] == 0).all()


def test_the_regulariser_holds_the_winograd_domain_in_codebook_fine_tuning() -> None:
    shares = [float(tuned(on)[1].regularisers()["winograd"].detach()) for on in (True, False)]
    assert shares[0] < shares[1]


def test_tuner_needs_gradients_and_its_own_model() -> None:
    model = small_net()
    quantization = quantize_(model, 0.1)
    with pytest.raises(InputError, match="backward"):
        CodebookTuner(model, quantization).step()
    with pytest.raises(InputError, match="another model"):
        CodebookTuner(nn.Linear(2, 2), quantization)


def test_a_model_without_layers_or_a_bad_seed_is_refused() -> None:
    with pytest.raises(InputError, match="no convolution"):
        quantize_(nn.ReLU(), 0.1)
    with pytest.raises(InputError, match="seed"):
        quantize_(small_net(), 0.1, dither=True, seed=-1)


def test_the_core_needs_no_torch() -> None:
    program = (
        "import sys; sys.modules['torch'] = None; sys.modules['tvm'] = None\n"
        "import numpy as np; from jointsparse.frontends.quantization import quantize_array\n"
        "assert quantize_array(np.ones(2, np.float32), 0.5, 1).dequantize().shape == (2,)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_computed_weight_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(InputError, match='layer "1": its weight is computed'):
        quantize_(model, 0.1)
