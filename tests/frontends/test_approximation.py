"""Models approximated layer by layer: what they compute, what they cost, and what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from jointsparse import frontends
from jointsparse.frontends.approximation import HeldConv2d, SparseLowRank, Structure, approximate, budgets
from jointsparse.frontends.approximation.layers import fitted, put, target_of
from jointsparse.frontends.approximation.modules import assemble
from jointsparse.frontends.approximation.regression import Factors
from jointsparse.frontends.approximation.structures import Shape, shape_of
from jointsparse.frontends.approximation.tracing import Surroundings, surroundings_of
from jointsparse.frontends.errors import InputError
from jointsparse.frontends.networks import build

pytestmark = pytest.mark.usefixtures("one_thread")


def weights(model: nn.Module) -> int:
    """That are not held at zero, biases and BatchNorm aside."""
    held = sum(int(m.held.sum()) for m in model.modules() if isinstance(m, HeldConv2d))
    return sum(p.numel() for p in model.parameters() if p.dim() > 1) - held


def images(*shape: int, count: int = 3) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=draw) for _ in range(count)]


class Small(nn.Module):
    """BatchNorm, stride, groups, a branch, and layers whose outputs no ReLU takes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.second = nn.Conv2d(12, 16, 3, 2, 1, groups=2)
        self.third = nn.Conv2d(16, 10, (1, 3), padding=(0, 1))
        self.fc = nn.Linear(10, 8)
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        x = self.second(x)
        x = self.third(F.relu(x) + 0.1 * x)
        return self.last(self.fc(x.mean((2, 3))).relu())


@pytest.fixture
def small() -> nn.Module:
    torch.manual_seed(0)
    model = Small()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(4, 3, 12, 12))
        model.norm.weight.uniform_(0.5, 2)
        model.norm.bias.normal_()
    return model.eval()


# --- modules ---------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    size=st.sampled_from([(1, 1), (3, 3), (2, 3)]),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
    by_column=st.booleans(),
    kept=st.integers(0, 4),
    rank=st.integers(0, 3),
)
def test_a_layer_computes_the_sum_of_its_factors(
    size: tuple[int, int], stride: int, padding: int, dilation: int, groups: int, by_column: bool, kept: int, rank: int
) -> None:
    draw = torch.Generator().manual_seed(kept + 10 * rank)
    assume(kept or rank)
    layer = nn.Conv2d(4 * groups, 3 * groups, size, stride, padding, dilation, groups).double()
    shape = shape_of(layer, by_column)
    units = torch.stack([torch.randperm(shape.units, generator=draw)[:kept].sort().values for _ in range(groups)])
    own, rest = shape.columns_of(units), shape.columns_of(shape.other_units(units))
    factors = Factors(
        own,
        rest,
        *(
            torch.randn(groups, *s, generator=draw).double()
            for s in ((3, own.shape[1]), (3, rank), (rank, rest.shape[1]))
        ),
    )
    if not rest.shape[1]:
        factors = Factors(own, rest, factors.sparse, factors.expand[..., :0], factors.reduce[:, :0])
    bias = torch.randn(groups, 3, generator=draw).double()
    made = assemble(layer, shape, factors, bias)
    x = torch.randn(2, 4 * groups, 7, 9, generator=draw).double()
    weight = factors.matrices().reshape(layer.weight.shape)
    wanted = F.conv2d(x, weight, bias.flatten(), stride, padding, dilation, groups)
    torch.testing.assert_close(made(x), wanted)
    assert weights(made) == shape.cost(Structure(units.shape[1], factors.expand.shape[2]))


def test_columns_held_at_zero_stay_zero() -> None:
    layer = HeldConv2d(4, 4, 3, padding=1)
    held = torch.rand(layer.weight.shape) < 0.5
    layer.held.copy_(held)
    optimiser = torch.optim.AdamW(layer.parameters(), 0.1)
    for _ in range(3):
        optimiser.zero_grad()
        layer(torch.randn(2, 4, 5, 5)).square().sum().backward()
        layer.weight.grad += 1  # as of a regulariser
        optimiser.step()
    layer(torch.randn(1, 4, 5, 5))
    assert bool((layer.weight[held] == 0).all())
    assert bool((layer.weight[~held] != 0).all())


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_starts_training_where_evaluation_is(affine: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6, affine=affine))
    x = 2 * torch.randn(64, 3, 8, 8) + 1
    with torch.no_grad():
        for _ in range(50):
            model(x)
        if affine:
            model[1].weight.normal_()
            model[1].weight[0] = 0
    model.eval()
    wanted = model(x)
    shape = shape_of(model[0])
    target = target_of(model[0], model[1], shape)
    every, none = torch.arange(3)[None], torch.empty(1, 0, dtype=torch.long)
    factors = Factors(every, none, target.factor * target.weight, torch.zeros(1, 6, 0), torch.zeros(1, 0, 0))
    columns = x.movedim(1, 0).reshape(1, 3, -1)
    put(model, "0", "1", shape, fitted(target, model[1], factors, target.bias, columns))
    torch.testing.assert_close(model.eval()(x), wanted, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(model.train()(x), wanted, rtol=1e-3, atol=1e-3)


# --- whole models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("units", ["channels", "columns"])
def test_full_structures_change_nothing(small: nn.Module, units: str) -> None:
    """All columns in one part or the other, and a rank of all outputs."""
    x = images(4, 3, 12, 12)
    structures = {
        "first": Structure(0, 12),
        "second": Structure(54 if units == "columns" else 6, 0),
        "third": Structure(7, 10),
        "fc": Structure(3, 8),
    }
    made = approximate(small, x, 1, structures=structures, units=units, iterations=3)
    assert {n for n, m in made.named_modules() if isinstance(m, SparseLowRank)} == set(structures)
    torch.testing.assert_close(made(x[0]), small(x[0]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("budget", budgets.BUDGETS)
@pytest.mark.parametrize("parts", ["both", "sparse", "low-rank"])
@pytest.mark.parametrize("loss", [None, "cross-entropy"])
def test_the_budget_is_kept_and_nearly_used_up(small: nn.Module, budget: str, parts: str, loss: str | None) -> None:
    ratio = 1.6 if parts == "sparse" else 2
    made = approximate(small, images(4, 3, 12, 12), ratio, budget=budget, parts=parts, loss=loss, iterations=2)

    def work(model: nn.Module) -> int:
        total = 0

        def count(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            nonlocal total
            outputs = output.shape[-1] if isinstance(module, nn.Linear) else output.shape[1]
            total += module.weight.numel() * output[0].numel() // outputs

        layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        handles = [m.register_forward_hook(count) for m in layers]
        model(torch.randn(1, 3, 12, 12))
        for handle in handles:
            handle.remove()
        return total

    measure = weights if budget == "parameters" else work
    assert 0.8 * measure(small) / ratio < measure(made) <= measure(small) / ratio
    for module in made.modules():
        if isinstance(module, SparseLowRank):
            assert parts != "sparse" or module.expand is None
            assert parts != "low-rank" or module.sparse is None


def test_the_model_is_left_as_it_is_and_the_same_call_gives_the_same(small: nn.Module) -> None:
    state = {key: value.clone() for key, value in small.state_dict().items()}
    small.train()
    x = images(4, 3, 12, 12)
    first, second = (approximate(small, x, 2, iterations=2).state_dict() for _ in range(2))
    assert small.training
    assert all(torch.equal(value, state[key]) for key, value in small.state_dict().items())
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_a_layer_is_fitted_to_what_the_layers_before_leave_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).eval()
    x = images(500, 16, count=1)
    structures = {"0": Structure(0, 3), "2": Structure(0, 15)}
    made = approximate(model, x, 1, structures=structures)
    alone = approximate(model, x, 1, structures={"2": structures["2"]})
    assert isinstance(made, nn.Sequential)
    assert isinstance(alone, nn.Sequential)
    mixed = nn.Sequential(made[0], nn.ReLU(), alone[2])

    def error(other: nn.Module) -> float:
        return float((other(x[0]) - model(x[0])).detach().square().mean())

    assert error(made) < 0.97 * error(mixed)


def test_shared_weights_and_single_channels_stay(small: nn.Module) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.depthwise = nn.Linear(8, 8), nn.Linear(8, 8), nn.Conv1d(1, 1, 1)
            self.one = nn.Linear(8, 1)
            self.a.weight = self.b.weight
            self.twice, self.free = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(self.free(self.twice(self.twice(self.a(self.b(x))))))

    lines: list[str] = []
    made = approximate(Shared(), images(50, 8), 1.05, progress=lines.append)
    assert {n for n, m in made.named_modules() if isinstance(m, SparseLowRank)} == {"free"}
    assert sum("more than once" in line for line in lines) == 3
    assert any(line.startswith("one:") and "one output" in line for line in lines)


def test_control_flow_that_depends_on_data() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).relu() if x.sum() > -1e9 else x)

    lines: list[str] = []
    made = approximate(Branches(), images(50, 8), 1.5, progress=lines.append)
    assert weights(made) <= 128 / 1.5
    assert any("control flow" in line for line in lines)


def test_surroundings(small: nn.Module) -> None:
    assert surroundings_of(small) == {
        "first": Surroundings(1, "norm", True),
        "second": Surroundings(1, None, False),
        "third": Surroundings(1, None, False),
        "fc": Surroundings(1, None, True),
        "last": Surroundings(1, None, False),
    }


@pytest.mark.parametrize(("name", "rectified"), [("vgg16", 14), ("alexnet", 7), ("googlenet", 55)])
def test_every_activation_of_the_networks_is_seen(name: str, rectified: int) -> None:
    found = surroundings_of(build(name, stem="cifar", width=8, classes=10))
    assert found is not None
    assert sum(one.rectified for one in found.values()) == rectified


# --- after it --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("units", ["channels", "columns"])
def test_through_joint_sparsity_quantisation_and_the_file(small: nn.Module, units: str, tmp_path: Path) -> None:
    import onnxruntime

    x = images(4, 3, 12, 12)
    made = approximate(small, x, 2, iterations=2, units=units)
    objective = frontends.JointSparsity(made.train(), 0.3, 0.3, tile=2)
    optimiser = torch.optim.Adam([*made.parameters(), *objective.parameters()], 1e-3)
    for batch in x:
        loss = made(batch).square().mean()
        optimiser.zero_grad()
        (loss + objective(loss)).backward()
        optimiser.step()
    made.eval()
    objective.prune_("spatial")
    frontends.quantize_(made, step=0.02)
    frontends.save(made, x[0][:1], tmp_path / "m.jsm", objective=objective)
    frontends.decompress(tmp_path / "m.jsm", tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    found = session.run(None, {session.get_inputs()[0].name: x[0][:1].numpy()})[0]
    np.testing.assert_allclose(found, made(x[0][:1]).detach().numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("units", ["channels", "columns"])
@pytest.mark.parametrize("domain", ["auto", "spatial", "winograd", "dense"])
def test_compiled_it_computes_the_same(small: nn.Module, units: str, domain: str) -> None:
    import tvm
    from tvm.contrib import graph_executor

    from jointsparse import passes
    from tests.host import HOST

    x = images(4, 3, 12, 12)
    made = approximate(small, x, 2, iterations=2, units=units)
    mod, params = frontends.from_torch(made, x[0][:1])
    mod, params, _ = passes.sparsify(mod, params, HOST, domain=domain)
    built = graph_executor.GraphModule(tvm.relay.build(mod, target=HOST, params=params)["default"](tvm.cpu()))
    built.set_input(0, x[0][:1].numpy())
    built.run()
    np.testing.assert_allclose(built.get_output(0).numpy(), made(x[0][:1]).detach().numpy(), rtol=1e-4, atol=1e-5)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_a_run_that_was_cut_off_goes_on(small: nn.Module, tmp_path: Path) -> None:
    x, file = images(4, 3, 12, 12), tmp_path / "run.pt"
    whole = approximate(small, x, 2, iterations=2)

    def stop(line: str) -> None:
        if line.startswith("third: keeps"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        approximate(small, x, 2, iterations=2, checkpoint=file, progress=stop)
    lines: list[str] = []
    resumed = approximate(small, x, 2, iterations=2, checkpoint=file, progress=lines.append)
    assert not any(line.startswith(("first: keeps", "second: keeps")) for line in lines)
    assert any(line.startswith("third: keeps") for line in lines)
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in resumed.state_dict().items())


def test_other_checkpoints_are_refused(small: nn.Module, tmp_path: Path) -> None:
    x, file = images(4, 3, 12, 12), tmp_path / "run.pt"
    approximate(small, x, 2, iterations=1, checkpoint=file)
    with pytest.raises(InputError, match="of another model or other options"):
        approximate(small, x, 3, iterations=1, checkpoint=file)
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(InputError, match="damaged"):
        approximate(small, x, 2, iterations=1, checkpoint=file)
    with pytest.raises(InputError, match="no folder"):
        approximate(small, x, 2, checkpoint=tmp_path / "none" / "run.pt")


# --- budgets ---------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_choices_are_nearly_the_best_of_all(data: st.DataObject) -> None:
    """Against every combination: within what one choice can be worth."""
    number = st.floats(0.01, 10)
    choices = {
        str(i): [budgets.Choice(None, 10.0, 0.0)]
        + [budgets.Choice(Structure(0, j), data.draw(number), data.draw(number)) for j in range(3)]
        for i in range(3)
    }
    least = sum(min(c.cost for c in own) for own in choices.values())
    budget = least + data.draw(st.floats(0, 20))
    found = budgets.within(choices, budget)
    assert sum(c.cost for c in found.values()) <= budget
    every = itertools.product(*choices.values())
    best = min(sum(c.loss for c in some) for some in every if sum(c.cost for c in some) <= budget)
    assert best <= sum(c.loss for c in found.values()) <= best + max(c.loss for own in choices.values() for c in own)


def test_losses_of_choices_are_those_of_the_regression() -> None:
    draw = torch.Generator().manual_seed(0)
    weight, x = torch.randn(1, 5, 8, generator=draw).double(), torch.randn(1, 8, 100, generator=draw).double()
    gram, importance = x @ x.mT / 100, torch.rand(1, 5, generator=draw).double()
    shape = Shape(1, 5, 8, 1)
    for choice in budgets.choices_of(shape, weight, gram, importance, 2.0, 1.0):
        structure = choice.structure
        if structure is not None and structure.kept == 0:
            _, values, _ = torch.linalg.svd(importance.sqrt()[0, :, None] * weight[0] @ x[0], full_matrices=False)
            lost = values[structure.rank :].square().sum() / 200
            assert choice.loss == pytest.approx(float(lost), rel=1e-6, abs=1e-12)
            assert choice.cost == structure.rank * 13


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratio": 0.5}, "at least 1"),
        ({"ratio": 1e9}, "cannot become that small"),
        ({"budget": "bytes"}, 'budget "bytes"'),
        ({"units": "rows"}, 'units "rows"'),
        ({"parts": "none"}, 'parts "none"'),
        ({"loss": "l1"}, 'loss "l1"'),
        ({"exclude": ["nowhere"]}, '"nowhere"'),
        ({"structures": {"fc": Structure(99, 0)}}, "10 units"),
        ({"structures": {"fc": Structure(0, 0)}}, "nothing would be left"),
        ({"structures": {"fc": Structure(1, 1)}, "exclude": ["fc"]}, "excluded"),
        ({"exclude": ["first", "second", "third", "fc", "last"]}, "no layer is left"),
        ({"positions": 0}, "0 positions"),
    ],
)
def test_bad_options_are_refused(small: nn.Module, options: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        approximate(small, images(4, 3, 12, 12), **options)


@pytest.mark.parametrize("data", [[], [torch.empty(0, 3, 4, 4)], ["image"]])
def test_no_data_is_refused(small: nn.Module, data: list) -> None:
    with pytest.raises(InputError, match="no calibration data"):
        approximate(small, data)
