"""Engines: all compute the same function, each in a process of its own, and what cannot take part says why."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import pytest
import torch
import tvm
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import nn

from jointsparse.frontends import exporting
from jointsparse.frontends.compiling import compile_model
from jointsparse.frontends.engines import (
    AVX2,
    ENGINES,
    ISAS,
    NATIVE,
    OURS,
    PEERS,
    Engine,
    LeftOut,
    find_engine,
    measuring,
    onnx_module,
    operators,
    peak,
    reference,
    sources,
    worker,
)
from jointsparse.frontends.engines.base import Prepared
from jointsparse.frontends.engines.inputs import random_inputs
from jointsparse.frontends.engines.measuring import Entry, Measurement, Setting, Workbench, compare, environment
from jointsparse.frontends.engines.onnx_module import OnnxModule
from jointsparse.frontends.engines.onnx_runtime import OnnxRuntime, open_session
from jointsparse.frontends.engines.processes import Process, run_job
from jointsparse.frontends.engines.tvm_build import open_package
from jointsparse.frontends.errors import InputError
from jointsparse.frontends.winograd_inference import winograd_pruned
from jointsparse.schedules.winograd_pruning import WinogradPruning, dump
from tests.frontends.torch_models import Residual, randomised

BRIEF = Setting(seconds=0.01)
x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX2 is x86-64's")


class Classifier(nn.Module):
    """Convolution, pooling of both kinds, branches, fully-connected layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.left = nn.Conv2d(8, 8, 3, 2, 1)
        self.right = nn.MaxPool2d(3, 2, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        return self.head(torch.cat([self.left(x), self.right(x)], 1).mean((2, 3)))


def written(module: nn.Module, shape: tuple[int, ...], path: Path) -> Path:
    onnx.save_model(exporting.export(module, torch.zeros(shape)), path)
    return path


def by_onnxruntime(path: Path) -> list[NDArray[np.float32]]:
    return open_session(path, 1).run(None, random_inputs(path))


@pytest.fixture(scope="module")
def workbench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    folder = tmp_path_factory.mktemp("workbench")
    torch.manual_seed(0)
    return Workbench(written(Classifier(), (1, 3, 16, 16), folder / "model.onnx"), folder)


def measure(workbench: Workbench, engine: Engine, setting: Setting) -> Measurement:
    return compare([Entry(workbench, engine, setting)])[0]


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_computes_the_same(name: str, workbench: Workbench) -> None:
    measured = measure(workbench, ENGINES[name], BRIEF)
    if name == "openvino-bf16" and measured.left_out == "this CPU does not multiply bfloat16":
        pytest.skip(measured.left_out)
    assert measured.left_out is None
    assert measured.error is not None
    assert measured.error < (1e-5 if ENGINES[name].precision == "fp32" else 0.1)
    assert measured.version
    assert measured.runs is not None
    assert measured.turns_ms is not None
    assert measured.runs >= len(measured.turns_ms) >= measuring.MIN_TURNS
    assert 0 < measured.min_ms <= measured.median_ms  # type: ignore[operator]
    assert (measured.build_bytes is not None) == ENGINES[name].ahead_of_time
    assert (measured.plan is not None) == (name in (*OURS, "tvm"))


def test_reference_is_what_onnxruntime_computes(workbench: Workbench) -> None:
    values, method = reference.compute(workbench.model, (), random_inputs(workbench.model))
    assert "double" in method
    assert worker.relative_rms(by_onnxruntime(workbench.model), values) < 1e-6


@x86
@pytest.mark.parametrize("name", ["spatial", "openvino", "torch"])
def test_engines_held_to_avx2(name: str, workbench: Workbench) -> None:
    measured = measure(workbench, ENGINES[name], Setting(isa=AVX2, seconds=0.01))
    assert measured.left_out is None
    assert measured.error is not None
    assert measured.error < 1e-5


def test_what_cannot_be_held_to_avx2_says_so(workbench: Workbench) -> None:
    setting = Setting(isa=AVX2, seconds=0.01)
    assert "no switch" in (measure(workbench, ENGINES["onnxruntime"], setting).left_out or "")
    assert "bfloat16" in (measure(workbench, ENGINES["openvino-bf16"], setting).left_out or "")


def test_threads_and_instruction_set_reach_the_process() -> None:
    variables = environment(ENGINES["torch"], Setting(threads=2, isa=AVX2))
    assert variables["TVM_NUM_THREADS"] == variables["OMP_NUM_THREADS"] == "2"
    assert variables["ATEN_CPU_CAPABILITY"] == "avx2"
    assert variables["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert "ONEDNN_MAX_CPU_ISA" not in environment(ENGINES["torch"], Setting(isa=NATIVE))


@dataclass(frozen=True)
class Absent(OnnxRuntime):
    """An engine that nobody has."""

    distribution: ClassVar[str] = "no-such-engine"


def test_a_missing_engine_is_told(workbench: Workbench) -> None:
    measured = measure(workbench, Absent("absent", "Absent"), BRIEF)
    assert measured.left_out == "no-such-engine is not installed; pip install no-such-engine, or 'jointsparse[bench]'"
    assert measured.min_ms is None


def test_a_wrong_engine_is_not_timed(workbench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "TOLERANCE", 1e-12)
    measured = measure(workbench, ENGINES["onnxruntime"], BRIEF)
    assert (measured.left_out or "").startswith("wrong: relative RMS error")
    assert measured.error is not None
    assert measured.min_ms is None


def test_engines_take_turns(workbench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    take_turn = measuring.Contestant.take_turn

    def noted(self: measuring.Contestant, seconds: float) -> None:
        order.append(f"{self.measurement.engine} {self.measurement.threads}")
        take_turn(self, seconds)

    monkeypatch.setattr(measuring.Contestant, "take_turn", noted)
    entries = [Entry(workbench, ENGINES[name], BRIEF) for name in ("onnxruntime", "openvino")]
    told: list[str] = []
    measured = compare(entries, told.append)
    assert told == ["ONNX Runtime", "OpenVINO"]
    turns = [len(one.turns_ms or ()) for one in measured]
    assert turns[0] == turns[1] >= measuring.MIN_TURNS
    assert order == ["onnxruntime 1", "openvino 1"] * turns[0]


def test_one_that_dies_in_its_turn_is_out_and_the_others_go_on(
    workbench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_turn = measuring.Contestant.take_turn

    def fatal(self: measuring.Contestant, seconds: float) -> None:
        if self.measurement.engine == "torch" and len(self.turns) == 2:
            assert self.process is not None
            self.process._process.kill()
        take_turn(self, seconds)

    monkeypatch.setattr(measuring.Contestant, "take_turn", fatal)
    first, second = compare([Entry(workbench, ENGINES[name], BRIEF) for name in ("torch", "onnxruntime")])
    assert (first.left_out or "").startswith("failed (load, exit code -9)")
    assert first.min_ms is None
    assert second.left_out is None
    assert second.min_ms is not None


def test_a_turn_begins_with_a_run_that_does_not_count() -> None:
    runs: list[int] = []
    once = Prepared(lambda: runs.append(1), list)
    assert len(worker.turn(once, 1e-9)) == len(runs) == 1, "unless it takes the whole turn"
    runs.clear()
    times = worker.turn(once, 0.01)
    assert len(times) == len(runs) - 1 > 1


def test_outputs_of_another_shape_are_wrong(workbench: Workbench, tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", np.zeros((1, 6)))
    with loaded(workbench, reference=str(tmp_path / "other.npz")) as process:
        assert process.answer() == {"left_out": "wrong: relative RMS error inf, 0.0001 allowed", "error": None}


def loaded(workbench: Workbench, **options: object) -> Process:
    """The job ``load`` of ONNX Runtime, in a process of its own."""
    defaults: dict[str, object] = {
        "path": str(workbench.model),
        "reference": None,
        "tolerance": 1e-4,
        "inputs": str(workbench.inputs),
        "engine": "onnxruntime",
        "threads": 1,
    }
    return Process("load", {}, **defaults | options)


def test_a_process_that_dies_says_what_it_said_last(workbench: Workbench, tmp_path: Path) -> None:
    with (
        loaded(workbench, path=str(tmp_path / "missing.onnx")) as process,
        pytest.raises(LeftOut, match=r"failed \(load, exit code 1\): .*missing.onnx"),
    ):
        process.answer()
    missing = str(tmp_path / "missing.onnx")
    with pytest.raises(LeftOut, match=r"failed \(reference, exit code 1\): .*missing.onnx"):
        run_job("reference", {}, model=missing, winograd=[], inputs=str(workbench.inputs), outputs="")


def test_registry() -> None:
    assert set(PEERS) == {"tvm", "onnxruntime", "openvino", "torch"}
    assert find_engine("auto") is ENGINES["auto"]
    with pytest.raises(InputError, match="choose from spatial"):
        find_engine("tensorrt")


def test_settings_are_checked() -> None:
    with pytest.raises(InputError, match="threads"):
        measuring.check_setting(Setting(threads=10**6))
    with pytest.raises(InputError, match="seconds"):
        measuring.check_setting(Setting(seconds=0))


# --- the graph as a torch module -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Residual, Classifier])
def test_onnx_module(make: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = written(randomised(make()), (1, 3, 16, 16), tmp_path / "m.onnx")
    module = OnnxModule(onnx.load(path))
    with torch.no_grad():
        outputs = module(*(torch.from_numpy(value) for value in random_inputs(path).values()))
    assert worker.relative_rms([value.numpy() for value in outputs], by_onnxruntime(path)) < 1e-5


@pytest.mark.parametrize(
    ("operator", "attributes"),
    [
        ("MaxPool", {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 0, 1, 1]}),
        ("MaxPool", {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
        ("AveragePool", {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
        ("AveragePool", {"kernel_shape": [2, 2], "pads": [0, 1, 1, 0], "count_include_pad": 1}),
        ("ReduceMean", {"axes": [2, 3], "keepdims": 0}),
        ("Flatten", {"axis": 2}),
        ("Softmax", {"axis": 1}),
        ("Transpose", {"perm": [0, 2, 3, 1]}),
        ("LeakyRelu", {"alpha": 0.2}),
        ("GlobalAveragePool", {}),
    ],
)
def test_operators_of_the_onnx_module(operator: str, attributes: dict[str, object], tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node(operator, ["x"], ["y"], **attributes)], "one", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save_model(model, tmp_path / "m.onnx")
    (result,) = OnnxModule(model)(torch.from_numpy(random_inputs(tmp_path / "m.onnx")["x"]))
    np.testing.assert_allclose(result.numpy(), by_onnxruntime(tmp_path / "m.onnx")[0], rtol=1e-5, atol=1e-6)


def test_an_unknown_operator_is_named() -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3, 8, 8])
    graph = helper.make_graph([helper.make_node("LRN", ["x"], ["y"], size=3)], "one", [x], [y])
    with pytest.raises(LeftOut, match="LRN"):
        OnnxModule(helper.make_model(graph))


@pytest.mark.parametrize("tile", [2, 4])
def test_reference_applies_thresholds(tile: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Band by band, as winograd_inference does for the whole image."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 2, 5, padding=2)).eval()
    spec = {"0.weight": WinogradPruning(tile, 0.1), "2.weight": WinogradPruning(tile, 0.05)}
    path = written(module, (1, 3, 15, 13), tmp_path / "m.onnx")
    model = onnx.load(path)
    helper.set_model_props(model, {"jointsparse.winograd": dump(spec)})
    onnx.save_model(model, path)
    monkeypatch.setattr(onnx_module, "_BAND_VALUES", 1)
    inputs = random_inputs(path)
    (result,), _ = reference.compute(path, list(spec), inputs)
    (dense,), _ = reference.compute(path, [], inputs)
    x = torch.from_numpy(next(iter(inputs.values()))).double()
    with torch.no_grad(), winograd_pruned(module.double(), {name: one.to_json() for name, one in spec.items()}):
        expected = module(x).numpy()
    assert worker.relative_rms([result], [expected]) < 1e-12
    assert worker.relative_rms([dense], [expected]) > 0.01


def test_relative_rms() -> None:
    right = np.array([3.0, 4.0])
    assert worker.relative_rms([right], [right]) == 0
    assert worker.relative_rms([right * 1.1], [right]) == pytest.approx(0.1)
    assert worker.relative_rms([right[:1]], [right]) == float("inf")
    assert np.isnan(worker.relative_rms([right * np.nan], [right]))


# --- operators and peak ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("domain", ["dense", "spatial"])
def test_operators_of_a_package(domain: str, workbench: Workbench, tmp_path: Path) -> None:
    plan = compile_model(workbench.model, "llvm", tmp_path / "m.tar", domain=domain)
    layers = json.loads(plan.to_json())["layers"]
    timed = operators.measure(tmp_path / "m.tar", random_inputs(workbench.model), layers, 0.01)
    work = {one.layer: one.multiply_adds for one in timed if one.layer}
    assert work == {"stem": 8 * 3 * 9 * 16 * 16, "left": 8 * 8 * 9 * 8 * 8, "head": 16 * 5}
    assert [one.layer for one in timed if "dense" in one.name] == ["head"]
    assert all(0 < one.ms < float("inf") for one in timed)
    # Nothing is said of a package with other convolutions than the plan's.
    unknown = operators.measure(tmp_path / "m.tar", random_inputs(workbench.model), [], 0.01)
    assert not any(one.layer for one in unknown)
    if domain == "dense":
        assert [one.multiply_adds for one in unknown if "dense" in one.name] == [16 * 5]


def test_operators_of_branches(tmp_path: Path) -> None:
    """TVM may run the branches of a residual block in another order than the plan's: sizes tell them apart."""
    torch.manual_seed(0)
    path = written(randomised(Residual()), (1, 3, 16, 16), tmp_path / "m.onnx")
    sizes = {"stem": 8 * 3 * 9, "conv1": 8 * 8 * 9, "conv2": 16 * 8 * 9, "project": 16 * 8, "fc": 16 * 10}
    orders = []
    for domain in ("dense", "spatial", "winograd"):
        plan = compile_model(path, "llvm", tmp_path / "m.tar", domain=domain)
        layers = json.loads(plan.to_json())["layers"]
        text, _, parameters = open_package(tmp_path / "m.tar")
        graph = operators._Graph(json.loads(text), frozenset(tvm.runtime.load_param_dict(parameters)))
        for shuffled in (layers, layers[::-1]):
            timed = operators.measure(tmp_path / "m.tar", random_inputs(path), shuffled, 0.01)
            found = {one.layer: node for one, node in zip(timed, graph.operators, strict=True) if one.layer}
            assert set(found) == set(sizes)
            if domain == "dense":
                assert sizes == {name: operators._seen(graph, node)[2] for name, node in found.items()}
            orders.append(sorted(found, key=found.__getitem__))
    # Sparse kernels run where the dense ones did.
    assert all(order == orders[0] for order in orders)


@pytest.mark.parametrize("isa", [NATIVE, pytest.param(AVX2, marks=x86)])
def test_peak(isa: str) -> None:
    assert isa in ISAS
    assert 0 < peak.multiply_adds(isa, repeat=1) < float("inf")


def test_peak_loop_computes_what_it_says() -> None:
    schedule, arguments = peak._chains(4, 8)
    loop = tvm.build(schedule, arguments, "llvm")
    a, y = tvm.nd.array(np.full(8, 0.5, np.float32)), tvm.nd.array(np.zeros(8, np.float32))
    loop(a, y)
    # x = x / 2 + 1/2 ends at 1.
    np.testing.assert_array_equal(y.numpy(), np.ones(8))


# --- processes -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not pin processes")
def test_pinning() -> None:
    code = (
        "import os; from jointsparse.frontends.engines.worker import pin; pin(1); print(len(os.sched_getaffinity(0)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"
    with pytest.raises(InputError, match="cores free"):
        worker.pin(10**6)


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two cores to pin to"
)
def test_tvm_threads_have_a_core_each() -> None:
    code = """
import os
# TVM may have bound the thread that this process was started from to one core.
os.sched_setaffinity(0, range(os.cpu_count()))
from jointsparse.frontends.engines.tvm_build import bind_threads
bind_threads(2)

def affinity(task):
    try:
        return os.sched_getaffinity(int(task))
    except ProcessLookupError:  # has ended since it was listed
        return set()

masks = [affinity(task) for task in os.listdir("/proc/self/task")]
print(sorted(os.sched_getaffinity(0))[1], *(next(iter(mask)) for mask in masks if len(mask) == 1))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TVM_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    second, *bound = done.stdout.split()
    assert bound == [second]


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="this system does not tell")
def test_memory_is_the_own_not_the_parents() -> None:
    ballast = np.ones(2**25)
    code = "from jointsparse.frontends.engines.worker import memory; print(memory('VmRSS'), memory('VmHWM'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    now, most = map(int, done.stdout.split())
    assert 0 < now <= most < ballast.nbytes
    assert worker.memory("VmHWM") > ballast.nbytes  # type: ignore[operator]


def test_digest_of_the_sources() -> None:
    assert len(sources.digest()) == 8
    assert sources.digest() == sources.digest()
