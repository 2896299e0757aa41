"""The benchmarks of whole networks: what is pruned, and that results are kept, shown and gone on from."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto
from torch import nn

from benchmarks import against_peers, codec, networks, report
from benchmarks.networks import DENSE, JOINT, NETWORKS, SPATIAL, WINOGRAD, Network
from benchmarks.results import Results
from benchmarks.rows import CASES, Case
from jointsparse.frontends import onnx_graph, winograd_spec
from jointsparse.frontends.engines import ENGINES, ISAS
from jointsparse.frontends.engines.measuring import Measurement, Setting
from jointsparse.frontends.errors import InputError

BRIEF = Setting(seconds=0.01, layers=True)


def tiny() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 5, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 8, 3, 2, 1),
        nn.Flatten(),
        nn.Linear(8 * 64, 4),
    )


TINY = Network("Tiny", tiny, (1, 3, 16, 16))


def weights(model: ModelProto) -> dict[str, np.ndarray]:
    return {t.name: onnx_graph.array(t) for t in model.graph.initializer if t.name in onnx_graph.layers(model)}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet18", 11_689_512),
        ("vgg16", 138_357_544),
        ("alexnet", 61_100_840),
        # With biases 6,998,552; BatchNorm has one parameter more for each of 7,280 channels.
        ("googlenet", 6_998_552 + 7_280),
    ],
)
def test_networks_have_the_size_of_their_originals(name: str, parameters: int) -> None:
    with torch.device("meta"):
        module = NETWORKS[name].make()
        output = module.eval()(torch.zeros(NETWORKS[name].shape))
    assert sum(parameter.numel() for parameter in module.parameters()) == parameters
    assert output.shape == (1, 1000)


def test_the_table_names_networks_that_there_are() -> None:
    assert {case.network for case in CASES} == set(NETWORKS)
    assert all(case.at_least is None or case.at_least < (case.aim or 0) for case in CASES)


def test_weights_are_the_same_every_time() -> None:
    first, second = (networks.dense_model(TINY).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


def test_what_is_pruned() -> None:
    dense = networks.dense_model(TINY)
    reach = {"0.weight": 4, "2.weight": 4}
    assert networks.winograd_tiles(dense) == reach
    for domain in (SPATIAL, WINOGRAD, JOINT):
        model = networks.sparse_model(dense, 0.8, domain)
        onnx.checker.check_model(model)
        text = onnx_graph.metadata(model, winograd_spec.KEY)
        found = weights(model)
        spec = winograd_spec.parse(text, {k: v.shape for k, v in found.items()}, "m") if text else {}
        assert set(spec) == (set() if domain == SPATIAL else set(reach))
        for name, weight in found.items():
            pruned = domain != WINOGRAD or name not in reach
            assert np.mean(weight == 0) == (pytest.approx(0.8, abs=0.01) if pruned else 0)
            if name in spec:
                assert spec[name].sparsity(weight) == pytest.approx(0.8, abs=0.01)
    assert networks.sparse_model(dense, 0.8, DENSE) == dense


def test_pruning_keeps_the_energy() -> None:
    weight = np.random.default_rng(0).normal(size=(16, 8, 3, 3)).astype(np.float32)
    pruned = networks.prune(weight, 0.9)
    assert np.linalg.norm(pruned) == pytest.approx(np.linalg.norm(weight), rel=1e-5)
    scaled, pruning = networks.prune_winograd(weight, 0.9, 4)
    before = replace(pruning, threshold=0.0).magnitudes(weight)
    after = pruning.magnitudes(scaled)
    kept = after[after > pruning.threshold]
    assert np.linalg.norm(kept) == pytest.approx(np.linalg.norm(before), rel=1e-5)


def test_small_images_get_small_tiles() -> None:
    small = Network("small", lambda: nn.Conv2d(4, 4, 3, padding=1), (1, 4, 7, 7))
    assert networks.winograd_tiles(networks.dense_model(small)) == {"weight": 2}


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setitem(NETWORKS, "tiny", TINY)
    return Case("tiny", 0.8, 1.5, 3.0)


def run(case: Case, engines: list[str], file: Path) -> Results:
    results = Results.open(file)
    against_peers.run([case], [ENGINES[name] for name in engines], [BRIEF], results)
    return results


def test_results_are_kept_and_gone_on_from(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.json"
    run(case, ["onnxruntime"], file)
    assert capsys.readouterr().err.count("\n") == 1
    # Something is missing: the row is measured as a whole. The third run measures nothing.
    results = run(case, ["winograd"], file)
    said = capsys.readouterr().err
    assert said.count("\n") == 2
    assert "winograd" in said
    run(case, ["onnxruntime", "winograd"], file)
    assert capsys.readouterr().err == ""

    document = json.loads(file.read_text())
    assert set(document) == {"format", "version", "machine", "table", "results"}
    assert (document["format"], document["version"]) == ("jointsparse.benchmarks", 2)
    entries = {entry["engine"]: entry for entry in document["results"]}
    assert set(entries) == {"onnxruntime", "winograd"}
    assert all(entry["left_out"] is None and entry["error"] < 1e-4 for entry in entries.values())
    (line,) = document["table"]
    assert (line["fastest_build"], line["fastest_peer"]) == ("winograd", "onnxruntime")
    pairs = zip(entries["onnxruntime"]["turns_ms"], entries["winograd"]["turns_ms"], strict=True)
    assert line["speed_up"] == pytest.approx(np.median([peer / build for peer, build in pairs]))
    kernels = [layer["kernel"] for layer in entries["winograd"]["plan"]]
    assert kernels == ["winograd_f4", "winograd_f4", "direct", "direct"], "the last is fully connected"
    assert {one["layer"] for one in entries["winograd"]["operators"]} >= {"0", "2", "4"}

    report.show(results, [case], [ENGINES["onnxruntime"], ENGINES["winograd"]], [BRIEF])
    shown = capsys.readouterr().out
    for text in ("Tiny", "80%", "speed-up", "1.50x", "3.00x", "G/s", "ONNX Runtime: "):
        assert text in shown

    # A longer measurement is another one, and so is one of more threads.
    engine = ENGINES["onnxruntime"]
    assert not results.lacks(case, engine, BRIEF)
    assert results.lacks(case, engine, replace(BRIEF, seconds=0.02))
    assert results.lacks(case, engine, replace(BRIEF, threads=2))

    # Results of another version do not count.
    document["results"][0]["version"] = "0.0"
    file.write_text(json.dumps(document))
    run(case, ["onnxruntime", "winograd"], file)
    assert capsys.readouterr().err.count("\n") == 2


def test_an_operator_is_timed_when_asked_for(case: Case) -> None:
    results, one = (
        Results(None, {}),
        Measurement("winograd", 1, "native", 1.0, ENGINES["winograd"].version(), plan=[{}]),
    )
    brief = Setting(seconds=1.0)
    results.put(case, "native", [one])
    assert not results.lacks(case, ENGINES["winograd"], brief)
    assert results.lacks(case, ENGINES["winograd"], replace(brief, layers=True))
    results.put(case, "native", [replace(one, operators=[])])
    assert not results.lacks(case, ENGINES["winograd"], replace(brief, layers=True))


def test_two_threads_over_one_and_packages(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    one = Measurement(
        "spatial", 1, "native", 1.0, "1", min_ms=8.5, median_ms=9.5, build_seconds=2.0, build_bytes=3_000_000
    )
    results = Results(None, {"cpu": "some"})
    first = replace(one, turns_ms=[9.0, 18.0, 9.0], peak_bytes=7_000_000)
    results.put(case, "native", [first, replace(one, threads=2, turns_ms=[4.5, 9.0, 9.0])])
    report.show(results, [case], [ENGINES["spatial"]], [replace(BRIEF, threads=n) for n in (1, 2)])
    shown = capsys.readouterr().out
    for text in ("two threads over one", "2.00x", "2 / 3.0 / 7"):
        assert text in shown


def test_an_engine_left_out_is_shown(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setting = replace(BRIEF, isa="avx2")
    results = Results.open(None)
    against_peers.run([case], [ENGINES["onnxruntime"]], [setting], results)
    assert capsys.readouterr().err.count("\n") == 1
    against_peers.run([case], [ENGINES["onnxruntime"]], [setting], results)
    assert capsys.readouterr().err == "", "it is tried once"
    report.show(results, [case], [ENGINES["onnxruntime"]], [setting])
    assert "left out: ONNX Runtime, avx2 (Tiny): ONNX Runtime has no switch" in capsys.readouterr().out


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text("[]")
    with pytest.raises(InputError, match="not a file of results"):
        Results.open(file)
    file.write_text(json.dumps(Results(None, {"cpu": "another"}).document()))
    with pytest.raises(InputError, match="another machine"):
        Results.open(file)


def test_rows_of_other_sparsities_ask_for_nothing() -> None:
    assert list(against_peers.cases(["vdsr"], None)) == [Case("vdsr", 0.8, 4.5, 8.0)]
    assert list(against_peers.cases(["vdsr"], [0.5, 0.8])) == [Case("vdsr", 0.5), Case("vdsr", 0.8, 4.5, 8.0)]
    with pytest.raises(InputError):
        Case("vdsr", 1.0).check()
    assert ISAS == ("native", "avx2")


GOLDEN = Path(__file__).parent / "frontends" / "golden_v1.jsm"


def test_codecs_give_back_what_they_got(capsys: pytest.CaptureFixture[str]) -> None:
    layers = codec.read(GOLDEN)
    assert set(layers) == {"dithered", "tuned", "wide"}
    rows = [codec.measure(layers, name, one, repeat=1) for name, one in codec.codecs().items()]
    assert {"jointsparse", "bzip2 -9", "xz -9"} <= {row.codec for row in rows}
    codec.show(GOLDEN, layers, rows)
    assert f"{rows[0].bytes:,}" in capsys.readouterr().out
    wrong = codec.Codec(lambda codes: b"", lambda data, codes: codes + 1)
    with pytest.raises(ValueError, match="wrong does not decode"):
        codec.measure(layers, "wrong", wrong, repeat=1)


COSTS = """
import sys
from pathlib import Path
import tvm
from benchmarks.calibrate_costs import LinearCostModel, fit, measured_log, read, regrets, square

path, target = Path(sys.argv[1]), tvm.target.Target("llvm")
small, larger = square(4, 4, 8), square(4, 6, 9, 5)
first = measured_log(path, [small], [0.0, 0.9], target, again=False)
assert set(first[small]) == {"dense", "direct", "winograd_f2", "winograd_f4"}
# Goes on: what is there stays as it is.
both = measured_log(path, [small, larger, larger], [0.0, 0.9], target, again=False)
assert both[small] == first[small] and list(both) == [small, larger] and read(path, "sse") == both
again = measured_log(path, [small], [0.0, 0.5, 0.9], target, again=True)[small]
for kernel, times in first[small].items():
    later = dict(zip(again[kernel].nonzeros, again[kernel].seconds, strict=True))
    assert all(later[count] <= seconds for count, seconds in zip(times.nonzeros, times.seconds, strict=True))
    assert len(later) == (1 if kernel == "dense" else 3)
coefficients, errors = fit(both, target)
assert set(coefficients) == set(errors) == {"dense", "direct", "winograd_f2", "winograd_f4"}
cases = list(regrets(both, LinearCostModel({"sse": coefficients}), target))
assert len(cases) == 4 and all(ratio >= 1 for ratio, _ in cases)
try:
    read(path, "avx2")
except ValueError as error:
    assert "not a log of costs on avx2" in str(error)
else:
    raise AssertionError
"""


def test_costs_are_measured_logged_and_fitted(tmp_path: Path) -> None:
    """In a process of its own: it is for one thread."""
    subprocess.run([sys.executable, "-c", COSTS, str(tmp_path / "log.json")], check=True)


def test_layers_of_the_networks_are_those_that_were_measured() -> None:
    code = (
        "import tvm; from benchmarks.calibrate_costs import network_layers;"
        "from jointsparse.passes.measured_costs import shipped;"
        "missing = set(network_layers(tvm.target.Target('llvm'))) - (set(shipped('avx2')) & set(shipped('avx512')));"
        "assert not missing, missing"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
