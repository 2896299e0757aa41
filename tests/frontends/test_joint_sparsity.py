"""The joint-sparsity objective: its gradients, thresholds, coefficients, pruning, and life in training loops."""

from __future__ import annotations

import copy
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.utils.prune
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn

from jointsparse.frontends.errors import InputError
from jointsparse.frontends.joint_sparsity import JointSparsity, histogram_quantile
from jointsparse.schedules.winograd import transform


def small_net(seed: int = 0) -> nn.Sequential:
    """Every kind of layer: 9x9, 5x5, 3x3, strided, 1x1, dilated, grouped, linear."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 9, padding=4),
        nn.ReLU(),
        nn.Conv2d(8, 8, 5, padding=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.Conv2d(12, 8, 1),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def batch(seed: int = 0, count: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 12, 12, generator=generator), torch.randint(0, 4, (count,), generator=generator)


def train(model: nn.Module, objective: JointSparsity, steps: int, rate: float = 1e-3) -> torch.optim.Optimizer:
    optimiser = torch.optim.Adam([*model.parameters(), *objective.parameters()], lr=rate)
    x, y = batch()
    for _ in range(steps):
        step(model, objective, optimiser, x, y)
    return optimiser


def step(
    model: Callable[[Tensor], Tensor], objective: JointSparsity, optimiser: torch.optim.Optimizer, x: Tensor, y: Tensor
) -> None:
    loss = nn.functional.cross_entropy(model(x), y)
    optimiser.zero_grad()
    (loss + objective(loss)).backward()
    optimiser.step()
    objective.hold_()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_sign_of_the_loss_does_not_turn_the_regularisers_round(sign: float) -> None:
    model = small_net()
    objective = JointSparsity(model, 0.5, 0.5)
    before = {domain: share.item() for domain, share in shares(objective).items()}
    optimiser = torch.optim.Adam([*model.parameters(), *objective.parameters()], lr=1e-3)
    for _ in range(100):
        optimiser.zero_grad()
        objective(torch.tensor(sign)).backward()
        optimiser.step()
    assert objective.loss_scale == pytest.approx(1.0)
    assert all(share < 0.5 * before[domain] for domain, share in shares(objective).items())


def shares(objective: JointSparsity) -> dict[str, Tensor]:
    objective.update_thresholds()
    return objective.regularisers()


def test_losses_that_are_not_finite_do_not_count() -> None:
    objective = JointSparsity(small_net(), 0.5, 0.5)
    for loss in (float("nan"), 2.0, float("inf"), 4.0):
        objective(torch.tensor(loss))
    assert objective.loss_scale == pytest.approx(3.0)


def test_layers_by_domain() -> None:
    objective = JointSparsity(small_net())
    assert objective.layers["winograd"] == ["2", "5", "9"]
    assert objective.layers["spatial"] == ["0", "2", "5", "6", "7", "8", "9", "12"]


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("tile", [2, 4])
def test_gradient_is_the_papers(tile: int, weighted: bool) -> None:
    """dR_WD/dw = 2/E G^T [(G w G^T) * mask] G and dR_SD/dw = 2/E w * mask, from float64 numpy; weighted: I^2 inside."""
    torch.manual_seed(1)
    model = nn.Conv2d(4, 5, 3, padding=1)
    objective = JointSparsity(model, 0.7, 0.6, tile, weighted=weighted)
    objective.update_thresholds()
    shares = objective.regularisers()
    w = model.weight.detach().double().numpy()
    winograd = transform(tile, 3)
    _, g, _ = winograd.arrays()
    importance = winograd.importance() if weighted else np.ones((winograd.n, winograd.n))
    u = g @ w @ g.T * importance

    (spatial,) = torch.autograd.grad(shares["spatial"], model.weight)
    kept = np.abs(w) > objective.thresholds["spatial"]
    assert np.isclose(kept.mean(), 0.3, atol=0.01)
    assert np.isclose(float(shares["spatial"].detach()), (np.where(kept, 0, w) ** 2).sum() / (w**2).sum())
    np.testing.assert_allclose(spatial, 2 * np.where(kept, 0, w) / (w**2).sum(), atol=1e-6)

    (gradient,) = torch.autograd.grad(shares["winograd"], model.weight)
    kept = np.abs(u) > objective.thresholds["winograd"]
    assert np.isclose(kept.mean(), 0.4, atol=0.01)
    expected = 2 * g.T @ (np.where(kept, 0, u) * importance) @ g / (u**2).sum()
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())


def test_gradient_agrees_with_finite_differences_of_the_cost() -> None:
    """The whole objective, z included: dC/dz = c (exp(z) (R + e) - 1) speed."""
    model = small_net()
    objective = JointSparsity(model, alpha=0.5, speed=3.0).eval()
    objective.update_thresholds()
    with torch.no_grad():
        for z in objective.parameters():
            z.fill_(0.4)
    objective().backward()
    for domain, share in objective.regularisers().items():
        expected = 0.5 * 3.0 * (np.exp(1.2) * (float(share.detach()) + objective.floor) - 1)
        assert float(objective.z[domain].grad) == pytest.approx(expected, rel=1e-4)


def test_coefficients_grow_until_the_regulariser_balances() -> None:
    """With fixed weights z converges to -log (R + floor)."""
    objective = JointSparsity(small_net(), floor=0.1)
    optimiser = torch.optim.Adam(objective.parameters(), lr=1e-3)
    for _ in range(300):
        optimiser.zero_grad()
        objective(torch.tensor(2.0)).backward()
        optimiser.step()
    for domain, share in objective.regularisers().items():
        assert objective.state()[f"z_{domain}"] == pytest.approx(-np.log(float(share.detach()) + 0.1), abs=0.05)


def test_alpha_follows_the_scale_of_the_loss() -> None:
    small, large = (JointSparsity(nn.Conv2d(2, 2, 3)) for _ in range(2))
    large._layers[0].module.load_state_dict(small._layers[0].module.state_dict())
    for _ in range(30):
        low, high = small(torch.tensor(1e-3)), large(torch.tensor(5.0))
    assert float(high.detach() / low.detach()) == pytest.approx(5000, rel=1e-5)


def test_training_pulls_the_pruned_share_of_both_domains_to_nothing() -> None:
    model = small_net()
    objective = JointSparsity(model, 0.8, 0.8, alpha=10.0, floor=1e-6, speed=100.0, ramp=100)
    objective.update_thresholds()
    objective.calls = 1000
    objective.update_thresholds()
    before = {d: float(r.detach()) for d, r in objective.regularisers().items()}
    objective.calls = 0
    train(model, objective, 400)
    after = {d: float(r.detach()) for d, r in objective.regularisers().items()}
    assert all(after[d] < before[d] / 30 for d in before), (before, after)


def test_a_domain_at_zero_is_left_alone() -> None:
    model = small_net()
    objective = JointSparsity(model, spatial=0.8, winograd=0)
    assert list(objective.z) == ["spatial"]
    assert objective.winograd_spec() == {}
    train(model, objective, 3)
    assert max(objective.prune_("winograd").values()) == 0
    assert JointSparsity(model, spatial=0, winograd=0.5).prune_("spatial")["0"] == 0


def test_ramp_raises_the_target() -> None:
    model = nn.Conv2d(16, 16, 3)
    objective = JointSparsity(model, 0.8, 0.8, ramp=20, refresh=1)
    shares = []
    for _ in range(25):
        objective()
        shares.append(float((model.weight.detach().abs() <= objective.thresholds["spatial"]).float().mean()))
    assert shares[0] == 0
    assert shares == sorted(shares)
    assert shares[10] == pytest.approx(0.8 * (1 - 0.5**3), abs=0.005)
    assert shares[-1] == pytest.approx(0.8, abs=0.005)


@given(
    st.lists(
        hnp.arrays(np.float32, st.integers(1, 300), elements=st.floats(-1e3, 1e3, width=32)), min_size=1, max_size=4
    ),
    st.floats(0.01, 0.99),
)
@settings(deadline=None, max_examples=60)
def test_histogram_quantile_is_close_and_never_short(arrays: list[np.ndarray], share: float) -> None:
    threshold = histogram_quantile([torch.from_numpy(a) for a in arrays], share)
    magnitudes = np.sort(np.abs(np.concatenate(arrays)))
    exact = magnitudes[int(np.ceil(share * magnitudes.size)) - 1]
    tolerance = magnitudes[-1] * (1.0 / 2048**2 + 1e-6)
    assert exact - tolerance <= threshold <= exact + tolerance


@pytest.mark.parametrize("tile", [2, 4])
def test_pruning_reaches_the_asked_sparsity_in_both_domains(tile: int) -> None:
    model = small_net()
    objective = JointSparsity(model, 0.8, 0.7, tile)
    spatial = objective.prune_("spatial")
    weights = {n: m.weight for n, m in model.named_modules() if n in spatial}
    zeros = sum(int((w == 0).sum()) for w in weights.values())
    total = sum(w.numel() for w in weights.values())
    assert 0.8 <= zeros / total < 0.803
    for name, share in spatial.items():
        assert share == pytest.approx(float((weights[name] == 0).float().mean()))

    winograd, spec = objective.prune_("winograd"), objective.winograd_spec()
    assert set(spec) == {f"{name}.weight" for name in winograd} == {"2.weight", "5.weight", "9.weight"}
    pruned = entries = 0
    for name, entry in spec.items():
        made = transform(entry["tile"], weights[name.removesuffix(".weight")].shape[-1])
        u = made.filters(weights[name.removesuffix(".weight")].detach().numpy())
        gone = np.abs(u) * made.importance() <= entry["threshold"]
        assert winograd[name.removesuffix(".weight")] == gone.mean()
        pruned, entries = pruned + gone.sum(), entries + gone.size
    assert 0.7 <= pruned / entries < 0.703


def test_winograd_spec_survives_rounding() -> None:
    """Scaled filters against the scaled threshold, in float32 as batch normalisation is folded: the same entries go."""
    model = nn.Conv2d(32, 32, 3)
    objective = JointSparsity(model, 0.8, 0.8)
    entry = objective.winograd_spec()["weight"]
    made = transform(4, 3)
    weight = model.weight.detach().numpy()
    scale = np.random.default_rng(0).uniform(0.1, 3, (32, 1, 1, 1)).astype(np.float32)
    plain = np.abs(made.filters(weight)) * made.importance() <= entry["threshold"]
    scaled = np.abs(made.filters(weight * scale)) * made.importance() <= entry["threshold"] * scale.astype(np.float64)
    assert (plain == scaled).all()


def test_held_weights_stay_zero_and_a_resumed_run_knows_them() -> None:
    model = small_net()
    objective = JointSparsity(model)
    optimiser = train(model, objective, 5)
    objective.prune_("spatial")
    zero = model[2].weight == 0
    x, y = batch()
    for _ in range(3):
        step(model, objective, optimiser, x, y)
    assert (model[2].weight[zero] == 0).all()

    resumed = copy.deepcopy(model)
    again = JointSparsity(resumed)
    again.load_state_dict(objective.state_dict())
    with torch.no_grad():
        before = resumed[2].weight.clone()
    train(resumed, again, 3)
    assert (resumed[2].weight[zero] == 0).all()
    assert not torch.equal(resumed[2].weight, before)


def test_state_dict_resumes_exactly(tmp_path: Path) -> None:
    """Ten steps, or five, a checkpoint in a file, and five more: the same weights, bit for bit."""
    whole = small_net()
    x, y = batch()
    objective = JointSparsity(whole, ramp=8, refresh=3)
    train(whole, objective, 10)

    first = small_net()
    objective_1 = JointSparsity(first, ramp=8, refresh=3)
    optimiser_1 = train(first, objective_1, 5)
    state = {"model": first.state_dict(), "objective": objective_1.state_dict(), "optimiser": optimiser_1.state_dict()}
    torch.save(state, tmp_path / "state.pt")

    state = torch.load(tmp_path / "state.pt", weights_only=True)
    second = small_net(seed=5)
    objective_2 = JointSparsity(second, ramp=8, refresh=3)
    second.load_state_dict(state["model"])
    objective_2.load_state_dict(state["objective"])
    optimiser_2 = torch.optim.Adam([*second.parameters(), *objective_2.parameters()], lr=1e-3)
    optimiser_2.load_state_dict(state["optimiser"])
    for _ in range(5):
        step(second, objective_2, optimiser_2, x, y)
    for a, b in zip(whole.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert objective.thresholds == objective_2.thresholds


def test_regularisers_are_float32_under_autocast() -> None:
    model = small_net()
    objective = JointSparsity(model).eval()
    objective.update_thresholds()
    plain = objective().detach()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = objective()
    assert mixed.dtype == torch.float32
    assert torch.equal(plain, mixed.detach())
    x, y = batch()
    objective.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = nn.functional.cross_entropy(model(x), y)
        (loss + objective(loss)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def _distributed_worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = small_net()
    wrapped = nn.parallel.DistributedDataParallel(model)
    objective = JointSparsity(model, alpha=2.0, refresh=2)
    optimiser = torch.optim.Adam([*model.parameters(), *objective.parameters()], lr=1e-3)
    for index in range(6):
        x, y = batch(seed=10 * index + rank)
        step(wrapped, objective, optimiser, x, y)
    torch.save({"model": model.state_dict(), "objective": objective.state_dict()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_agree_on_everything(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_distributed_worker, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["objective"]["_extra_state"] == second["objective"]["_extra_state"]
    assert first["objective"]["_extra_state"]["calls"] == 6
    for key in ("z.spatial", "z.winograd"):
        assert torch.equal(first["objective"][key], second["objective"][key])
    statistics = ("running_mean", "running_var")  # BatchNorm's are each process's own.
    for key, value in first["model"].items():
        assert key.endswith(statistics) or torch.equal(value, second["model"][key]), key


def test_tiles_by_layer_and_exclusion() -> None:
    objective = JointSparsity(small_net(), tile={"2": 2, "9": 4}, exclude=["0", "12"])
    assert objective.layers["winograd"] == ["2", "9"]
    assert {n: e["tile"] for n, e in objective.winograd_spec().items()} == {"2.weight": 2, "9.weight": 4}
    assert "0" not in objective.layers["spatial"]


def test_shared_weights_count_once() -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1)
    objective = JointSparsity(nn.Sequential(conv, nn.ReLU(), conv))
    assert objective.layers["spatial"] == ["0"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"spatial": 1.0}, "spatial sparsity 1.0"),
        ({"winograd": -0.1}, "Winograd sparsity -0.1"),
        ({"spatial": 0, "winograd": 0}, "nothing is left"),
        ({"tile": 3}, "choose one of 2, 4"),
        ({"tile": {"6": 4}}, "no 3x3 or 5x5"),
        ({"tile": {"nowhere": 4}}, '"nowhere"'),
        ({"alpha": 0.0}, "alpha"),
        ({"floor": 0.0}, "floor"),
        ({"exclude": ["nowhere"]}, '"nowhere"'),
    ],
)
def test_bad_options_are_refused_in_one_line(options: dict, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        JointSparsity(small_net(), **options)
    assert "\n" not in str(caught.value)


def test_a_model_without_reachable_layers_is_refused() -> None:
    with pytest.raises(InputError, match="winograd=0"):
        JointSparsity(nn.Linear(3, 3))


def test_unknown_domain_is_refused() -> None:
    with pytest.raises(InputError, match="unknown domain"):
        JointSparsity(small_net()).prune_("frequency")


def test_quantile_counts_beyond_what_float32_counts() -> None:
    """22 million magnitudes fall into the lowest bin: more than 2^24, where a float32 count stands still."""
    values = torch.full((25_000_000,), 1e-4)
    values[:3_000_000] = torch.linspace(0.5, 1, 3_000_000)
    assert histogram_quantile([values], 0.8) < 1e-3


def _weight_norm(layer: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(layer)


def _torch_prune(layer: nn.Module) -> None:
    nn.utils.prune.random_unstructured(layer, "weight", 0.5)


@pytest.mark.parametrize("computed", [_weight_norm, nn.utils.parametrizations.spectral_norm, _torch_prune])
def test_a_computed_weight_is_refused_unless_excluded(computed: Callable[[nn.Module], object]) -> None:
    model = small_net()
    computed(model[5])
    with pytest.raises(InputError, match='layer "5": its weight is computed'):
        JointSparsity(model)
    assert "5" not in JointSparsity(model, exclude=["5"]).layers["spatial"]


def test_pruning_reports_the_zeros_that_are_there() -> None:
    model = small_net()
    reported = JointSparsity(model, 0.6).prune_("spatial")
    zeros = {name: float((model[int(name)].weight == 0).double().mean()) for name in reported}
    assert reported == pytest.approx(zeros)


def test_a_domain_without_layers_prunes_nothing() -> None:
    assert JointSparsity(nn.Linear(4, 4), 0.5, 0).prune_("winograd") == {}
