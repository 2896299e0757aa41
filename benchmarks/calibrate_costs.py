"""Measure the kernels on this machine: a log that the choice of kernels goes by, and the cost model's coefficients.

    python -m benchmarks.calibrate_costs [--target "llvm -mcpu=..."] [--log FILE [--again] | --fit FILE | --check FILE]

The layers are those of the benchmark's networks, and some more. Each kernel runs alone, as a library of one layer
(Winograd's on images in the layout that a network would have), on one thread; the figure is the least processor time
of many runs, because whatever else the machine does only ever adds to it. --log writes them for ``tuning_logs/``;
--again measures what the log has already once more, and the least counts. The fit is by non-negative least squares of
the relative error; it prints the coefficients for ``passes/costs.py`` and how far they are off on the layers measured.
--check measures again, at more sparsities, and tells how much slower than the best alternative the kernels are that a
log makes the choice take.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

os.environ["TVM_NUM_THREADS"] = "1"
os.environ.setdefault("TOPHUB_LOCATION", "NONE")

import numpy as np
import tvm
from numpy.typing import NDArray
from scipy.optimize import least_squares, nnls
from tvm import relay
from tvm.contrib import graph_executor

from benchmarks import networks
from jointsparse.frontends import onnx_import
from jointsparse.frontends.engines.machine import describe
from jointsparse.frontends.outputs import replacing
from jointsparse.passes import sparsify
from jointsparse.passes.absorb_conversions import AbsorbConversions
from jointsparse.passes.absorb_epilogues import AbsorbEpilogues
from jointsparse.passes.costs import Coefficients, CostModel, LinearCostModel, counts, family, kind
from jointsparse.passes.measured_costs import Log, MeasuredCostModel, Times, dump, load
from jointsparse.passes.plan import DENSE, DIRECT, TILE, WINOGRAD
from jointsparse.schedules.attributes import winograd_plan_of
from jointsparse.schedules.constructors import (
    conv2d_sparse_direct,
    conv2d_sparse_winograd,
    dense_sparse,
    why_not_winograd,
)
from jointsparse.schedules.geometry import ConvGeometry
from jointsparse.schedules.operators import WINOGRAD as WINOGRAD_OPERATOR
from jointsparse.schedules.targets import cpu_facts

# What each kind of kernel is charged for.
TERMS = {
    "dense": ("vectors", "inputs", "outputs", "weights", "fixed"),
    "dense_1x1": ("vectors", "inputs", "outputs", "weights", "fixed"),
    "dense_grouped": ("vectors", "inputs", "outputs", "weights", "fixed"),
    "depthwise": ("vectors", "inputs", "outputs", "fixed"),
    "dense_fc": ("vectors", "ragged", "weights", "far_weights", "outputs", "fixed"),
    "direct": ("vectors", "touched", "entries", "rows", "packed", "outputs", "fixed"),
    "direct_1x1": ("vectors", "entries", "rows", "packed", "outputs", "fixed"),
    "direct_fc": ("vectors", "entries", "far_entries", "rows", "packed", "fixed"),
    "winograd_f2": ("vectors", "entries", "far_entries", "rows", "inputs", "outputs", "fixed"),
    "winograd_f4": ("vectors", "entries", "far_entries", "rows", "inputs", "outputs", "fixed"),
}

SPARSITIES = (0.0, 0.4, 0.8, 0.95)
WORST = 20
"""Cases told, of those chosen wrongly."""

CHECKED = (0.0, 0.2, 0.4, 0.6, 0.8, 0.95)

SECONDS = 0.15
"""Spent on one measurement, at least."""


def square(channels: int, filters: int, size: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> ConvGeometry:
    """A convolution with "same" padding."""
    pad = kernel // 2
    return ConvGeometry(
        1, channels, size, size, filters, (kernel, kernel), (stride, stride), (pad, pad, pad, pad), groups=groups
    )


def fully_connected(inputs: int, outputs: int, batch: int = 1) -> ConvGeometry:
    """A fully-connected layer."""
    return ConvGeometry(batch, inputs, 1, 1, outputs, (1, 1))


# Shapes of ResNet-18 and CIFAR ResNet, VGG, VDSR and CT-SRCNN, GoogLeNet, AlexNet and MobileNet.
LAYERS = (
    square(64, 64, 56),
    square(128, 128, 28),
    square(256, 256, 14),
    square(512, 512, 7),
    square(16, 16, 32),
    square(64, 64, 8),
    square(32, 32, 180),
    square(64, 64, 256),
    square(192, 96, 27),
    square(64, 64, 27, 5),
    square(32, 32, 96, 5),
    square(96, 24, 14, 5),
    square(64, 128, 56, stride=2),
    square(256, 512, 14, stride=2),
    square(3, 64, 224, 7, 2),
    square(1, 64, 180, 9),
    square(64, 64, 56, 1),
    square(256, 256, 14, 1),
    square(480, 192, 14, 1),
    square(1024, 256, 14, 1),
    square(64, 256, 56, 1),
    square(32, 64, 16, 1),
    square(16, 16, 32, 1),
    square(64, 128, 56, 1, 2),
    square(96, 256, 27, 5, groups=2),
    square(64, 64, 56, groups=4),
    square(128, 128, 28, groups=32),
    square(256, 256, 14, groups=8),
    square(384, 384, 13, groups=2),
    square(32, 32, 112, groups=32),
    square(64, 64, 112, stride=2, groups=64),
    square(128, 128, 56, groups=128),
    square(120, 120, 28, 5, groups=120),
    square(256, 256, 14, groups=256),
    square(512, 512, 14, groups=512),
    fully_connected(9216, 4096),
    fully_connected(4096, 4096),
    fully_connected(4096, 1000),
    fully_connected(1024, 1000),
    fully_connected(512, 1000),
    fully_connected(784, 300),
    fully_connected(300, 100),
    fully_connected(4096, 4096, 4),
    fully_connected(512, 1000, 4),
    fully_connected(784, 300, 16),
    fully_connected(1024, 1024, 16),
)


def library(kernel: str, geometry: ConvGeometry, sparsity: float, target: tvm.target.Target):
    """A build of one layer, and how many weights it multiplies by."""
    rng = np.random.default_rng(0)
    shape = geometry.weight_shape
    if kernel in TILE:
        n = TILE[kernel] + geometry.kernel[0] - 1
        shape = (*shape[:2], n, n)
    weight = rng.standard_normal(shape).astype(np.float32)
    weight[rng.random(shape) < sparsity] = 0
    data_shape = (geometry.batch, geometry.in_channels, geometry.in_height, geometry.in_width)
    if geometry.fully_connected:
        data_shape = data_shape[:2]
    data = relay.var("x", shape=data_shape)
    if geometry.fully_connected:
        matrix = weight[:, :, 0, 0]
        if kernel == DENSE:
            body = relay.nn.dense(data, relay.const(matrix))
        else:
            body = dense_sparse(data, matrix, geometry.batch, target)
    elif kernel == DENSE:
        body = relay.nn.conv2d(
            data,
            relay.const(weight),
            strides=geometry.strides,
            padding=geometry.padding,
            dilation=geometry.dilation,
            groups=geometry.groups,
            channels=geometry.out_channels,
            kernel_size=geometry.kernel,
        )
    elif kernel == DIRECT:
        body = conv2d_sparse_direct(data, weight, geometry, target)
    else:
        body, data_shape = as_in_a_network(conv2d_sparse_winograd(data, weight, geometry, TILE[kernel], target))
    if kernel not in TILE:
        # With the usual epilogue.
        body = relay.nn.relu(body)
    with tvm.transform.PassContext(opt_level=3):
        built = relay.build(AbsorbEpilogues()(tvm.IRModule.from_expr(body)), target=target)
    return built, data_shape, weight.size if kernel == DENSE else int(np.count_nonzero(weight))


def as_in_a_network(image: relay.Expr) -> tuple[relay.Expr, tuple[int, ...]]:
    """A Winograd convolution without the conversions around it, on NCHW images or on tiles; shape of its data."""
    absorbed = AbsorbConversions(preferred=True)(tvm.IRModule.from_expr(image))["main"].body
    convolution = absorbed if absorbed.op.name == WINOGRAD_OPERATOR else absorbed.args[0]
    if absorbed is convolution:
        return convolution, tuple(int(size) for size in convolution.args[0].checked_type.shape)
    plan = winograd_plan_of(convolution.attrs)
    shape = plan.layout.shape(plan.geometry.batch, plan.geometry.in_channels)
    arguments = [relay.var("x", shape=shape), *convolution.args[1:]]
    return relay.Call(convolution.op, arguments, convolution.attrs), shape


def seconds(built, data_shape: tuple[int, ...]) -> float:
    """The least processor time of one run, which other programs on the machine disturb less than the clock's."""
    executor = graph_executor.GraphModule(built["default"](tvm.cpu()))
    executor.set_input("x", np.random.default_rng(1).standard_normal(data_shape).astype(np.float32))
    executor.run()
    first = timed(executor.run, 1)
    number = max(1, int(2e-4 / first))
    return min(timed(executor.run, number) for _ in range(max(3, int(SECONDS / (number * first)))))


def timed(run: Callable[[], None], number: int) -> float:
    start = time.thread_time()
    for _ in range(number):
        run()
    return (time.thread_time() - start) / number


def network_layers(target: tvm.target.Target) -> Iterator[ConvGeometry]:
    """The layers of the benchmark's networks."""
    for name, network in networks.NETWORKS.items():
        mod, params = onnx_import.to_relay(networks.dense_model(network), name)
        for layer in sparsify(mod, params, target, "dense")[2]:
            batch, channels, height, width = (*layer.input_shape, 1, 1)[:4]
            filters, _, *kernel = (*layer.weight_shape, 1, 1)[:4]
            yield ConvGeometry(
                batch,
                channels,
                height,
                width,
                filters,
                tuple(kernel),
                layer.strides or (1, 1),
                layer.padding or (0, 0, 0, 0),
                layer.dilation or (1, 1),
                layer.groups or 1,
            )


def measure(geometry: ConvGeometry, sparsities: Sequence[float], target: tvm.target.Target) -> dict[str, Times]:
    """Every kernel of a layer."""
    measured = {}
    for kernel in (DENSE, DIRECT, *(k for m, k in WINOGRAD.items() if why_not_winograd(geometry, m) is None)):
        times = {}
        for sparsity in sparsities if kernel != DENSE else (0.0,):
            built, shape, nonzeros = library(kernel, geometry, sparsity, target)
            times[nonzeros] = seconds(built, shape)
        said = ", ".join(f"{1e3 * taken:.3f} ms with {nonzeros}" for nonzeros, taken in times.items())
        print(f"{kernel:12} {_described(geometry)}: {said}", file=sys.stderr, flush=True)
        measured[kernel] = Times.of(times)
    return measured


def _described(geometry: ConvGeometry) -> str:
    return f"{geometry.weight_shape} at {geometry.in_height}x{geometry.in_width}, stride {geometry.strides[0]}"


def fit(log: Log, target: tvm.target.Target) -> tuple[Coefficients, dict[str, float]]:
    """Coefficients by kind of kernel, and the mean relative error of each; of the kinds in the log."""
    cpu = cpu_facts(target)
    samples: dict[str, list[tuple[dict[str, float], float]]] = {}
    for geometry, kernels in log.items():
        for kernel, times in kernels.items():
            of_kind = samples.setdefault(kind(kernel, geometry), [])
            for nonzeros, taken in zip(times.nonzeros, times.seconds, strict=True):
                of_kind.append((counts(kernel, geometry, nonzeros, cpu), 1e9 * taken))
    coefficients, errors = {}, {}
    for name, rows in samples.items():
        terms = TERMS[name]
        amounts = np.array([[row[term] / nanoseconds for term in terms] for row, nanoseconds in rows])
        # Columns of like size, for the solver's sake.
        scale = np.linalg.norm(amounts, axis=0)
        scale[scale == 0] = 1
        start = nnls(amounts / scale, np.ones(len(rows)))[0]
        # Ratios, not differences: half and twice the time are equally wrong.
        solution = least_squares(_LogRatio(amounts / scale), start + 1e-6, bounds=(0, np.inf)).x
        coefficients[name] = {
            term: float(f"{share / size:.3g}")
            for term, share, size in zip(terms, solution, scale, strict=True)
            if share > 1e-3
        }
        errors[name] = float(np.mean(np.abs(amounts / scale @ solution - 1)))
    return coefficients, errors


class _LogRatio:
    """Logarithms of predicted over measured."""

    def __init__(self, amounts: NDArray[np.float64]) -> None:
        self.amounts = amounts

    def __call__(self, coefficients: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.log(np.maximum(self.amounts @ coefficients, 1e-9))


def regrets(log: Log, model: CostModel, target: tvm.target.Target) -> Iterator[tuple[float, str]]:
    """For each layer and sparsity, the time of the kernel that a model would choose over the least time of a log; and
    which case that is."""
    for geometry, kernels in log.items():
        for i, sparsity in enumerate(_shares(kernels[DIRECT])):
            # Dense has one time for all.
            at = {kernel: min(len(times.seconds) - 1, i) for kernel, times in kernels.items()}
            times = {kernel: kernels[kernel].seconds[number] for kernel, number in at.items()}
            costs = {
                kernel: model.cost(kernel, geometry, kernels[kernel].nonzeros[number], target)
                for kernel, number in at.items()
            }
            chosen, best = (min(by, key=by.__getitem__) for by in (costs, times))
            case = f"{_described(geometry)}, {sparsity:.0%} zeros: {chosen}, best {best}"
            yield times[chosen] / times[best], case


def _shares(times: Times) -> list[float]:
    """Of zeros; the most non-zeros are all weights."""
    return [1 - count / times.nonzeros[-1] for count in times.nonzeros]


def tell(log: Log, model: CostModel, target: tvm.target.Target) -> None:
    """How much slower than the best the choice by a model is, by a log."""
    found = sorted(regrets(log, model, target), reverse=True)
    ratios = np.array([ratio for ratio, _ in found])
    print(
        f"# Chosen by it against the best: {np.exp(np.mean(np.log(ratios))):.3f} times its time on average, "
        f"{max(ratios):.2f} at worst, within 5 % in {np.mean(ratios <= 1.05):.1%} of {len(ratios)} cases."
    )
    for ratio, case in found[:WORST]:
        if ratio > 1.05:
            print(f"#   {ratio:.2f}: {case}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default=f"llvm -mcpu={tvm.target.codegen.llvm_get_system_cpu()}")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--log", type=Path, help="write measurements here, and go on from them")
    parser.add_argument("--again", action="store_true", help="measure also what the log has already")
    one.add_argument("--fit", type=Path, help="fit a log written before, instead of measuring")
    one.add_argument("--check", type=Path, help="measure the choice by a log written before")
    arguments = parser.parse_args()
    target = tvm.target.Target(arguments.target)
    name = family(cpu_facts(target))
    try:
        if arguments.check:
            chosen_by = MeasuredCostModel({name: read(arguments.check, name)})
            tell(measured_log(None, network_layers(target), CHECKED, target, False), chosen_by, target)
            return
        if arguments.fit:
            log = read(arguments.fit, name)
        else:
            log = measured_log(arguments.log, (*network_layers(target), *LAYERS), SPARSITIES, target, arguments.again)
    except (OSError, ValueError) as error:
        sys.exit(f"calibrate_costs: {error}")
    coefficients, errors = fit(log, target)
    print(f'    "{name}": {{')
    for kernel, terms in coefficients.items():
        print(f'        "{kernel}": {json.dumps(terms)},  # mean error {errors[kernel]:.0%}')
    print("    },")
    tell(log, LinearCostModel({name: coefficients}), target)


def read(path: Path, name: str) -> Log:
    """A log of a family of CPUs."""
    try:
        return load(path.read_text(), name)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def measured_log(
    path: Path | None,
    layers: Iterable[ConvGeometry],
    sparsities: Sequence[float],
    target: tvm.target.Target,
    again: bool,
) -> Log:
    """Measurements of layers, of those of a file that is there already only if asked for again."""
    name = family(cpu_facts(target))
    log = dict(read(path, name)) if path and path.exists() else {}
    for geometry in dict.fromkeys(layers):
        known = log.get(geometry, {})
        if known and not again:
            continue
        measured = measure(geometry, sparsities, target)
        log[geometry] = {kernel: times.least(known.get(kernel, times)) for kernel, times in measured.items()}
        if path:
            with replacing(path) as file:
                file.write_text(dump(log, name, str(describe()["cpu"])))
    return log


if __name__ == "__main__":
    main()
