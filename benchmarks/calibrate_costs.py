"""Measure the kernels on this machine and fit the cost model's coefficients.

    python benchmarks/calibrate_costs.py [--target "llvm -mcpu=..."] [--json FILE | --fit FILE]

Each kernel runs alone, as a library of one layer (Winograd's of images in tile layout already, also where a
network would leave them NCHW), on one thread;
the figure is the least processor time of many runs, because whatever else the machine does only ever adds to it. The
fit is by non-negative least squares of the relative error. It prints the coefficients for ``passes/costs.py`` and how
far they are off on the layers measured.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["TVM_NUM_THREADS"] = "1"
os.environ.setdefault("TOPHUB_LOCATION", "NONE")

import numpy as np
import tvm
from numpy.typing import NDArray
from scipy.optimize import least_squares, nnls
from tvm import relay
from tvm.contrib import graph_executor

from jointsparse.passes.absorb_epilogues import AbsorbEpilogues
from jointsparse.passes.costs import Coefficients, LinearCostModel, counts, family, kind
from jointsparse.passes.plan import DENSE, DIRECT, TILE, WINOGRAD
from jointsparse.schedules.attributes import winograd_plan_of
from jointsparse.schedules.constructors import (
    conv2d_sparse_direct,
    conv2d_sparse_winograd,
    dense_sparse,
    why_not_winograd,
)
from jointsparse.schedules.geometry import ConvGeometry
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

SPARSITIES = (0.0, 0.5, 0.8, 0.95)


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
        body, data_shape = in_tiles(conv2d_sparse_winograd(data, weight, geometry, TILE[kernel], target))
    if kernel not in TILE:
        # As in a network: with the usual epilogue.
        body = relay.nn.relu(body)
    with tvm.transform.PassContext(opt_level=3):
        built = relay.build(AbsorbEpilogues()(tvm.IRModule.from_expr(body)), target=target)
    return built, data_shape, weight.size if kernel == DENSE else int(np.count_nonzero(weight))


def in_tiles(image: relay.Expr) -> tuple[relay.Expr, tuple[int, ...]]:
    """A Winograd convolution without the conversions around it, which stay away in a network; shape of its data."""
    convolution = image.args[0]
    plan = winograd_plan_of(convolution.attrs)
    shape = plan.layout.shape(plan.geometry.batch, plan.geometry.in_channels)
    arguments = [relay.var("x", shape=shape), *convolution.args[1:]]
    return relay.Call(convolution.op, arguments, convolution.attrs), shape


def seconds(built, data_shape: tuple[int, ...], repeat: int) -> float:
    """The least processor time of one run, which other programs on the machine disturb less than the clock's."""
    executor = graph_executor.GraphModule(built["default"](tvm.cpu()))
    executor.set_input("x", np.random.default_rng(1).standard_normal(data_shape).astype(np.float32))
    executor.run()
    number = max(1, int(2e-4 / timed(executor.run, 1)))
    return min(timed(executor.run, number) for _ in range(repeat))


def timed(run: Callable[[], None], number: int) -> float:
    start = time.thread_time()
    for _ in range(number):
        run()
    return (time.thread_time() - start) / number


def measurements(target: tvm.target.Target, repeat: int) -> Iterator[dict]:
    """One record for each layer, kernel and sparsity."""
    for geometry in LAYERS:
        kernels = [DENSE, DIRECT, *(k for m, k in WINOGRAD.items() if why_not_winograd(geometry, m) is None)]
        for kernel in kernels:
            for sparsity in SPARSITIES if kernel != DENSE else (0.0,):
                built, shape, nonzeros = library(kernel, geometry, sparsity, target)
                record = {
                    "kernel": kernel,
                    "geometry": geometry,
                    "sparsity": sparsity,
                    "nonzeros": nonzeros,
                    "seconds": seconds(built, shape, repeat),
                }
                print(
                    f"{kernel:12} {geometry.weight_shape} at {geometry.in_height}x{geometry.in_width}, stride "
                    f"{geometry.strides[0]}, {sparsity:.0%} zeros: {1e3 * record['seconds']:.3f} ms",
                    file=sys.stderr,
                    flush=True,
                )
                yield record


def fit(records: list[dict], target: tvm.target.Target) -> tuple[Coefficients, dict[str, float]]:
    """Coefficients by kind of kernel, and the mean relative error of each."""
    cpu = cpu_facts(target)
    coefficients, errors = {}, {}
    for name, terms in TERMS.items():
        mine = [r for r in records if kind(r["kernel"], r["geometry"]) == name]
        rows = [counts(r["kernel"], r["geometry"], r["nonzeros"], cpu) for r in mine]
        nanoseconds = np.array([1e9 * r["seconds"] for r in mine])
        amounts = np.array([[row[term] for term in terms] for row in rows], float) / nanoseconds[:, None]
        # Columns of like size, for the solver's sake.
        scale = np.linalg.norm(amounts, axis=0)
        start = nnls(amounts / scale, np.ones(len(mine)))[0]
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


def regret(records: list[dict], coefficients: Coefficients, target: tvm.target.Target) -> list[float]:
    """For each layer and sparsity: the time of the kernel that the model would choose over the least time."""
    model = LinearCostModel({family(cpu_facts(target)): coefficients})
    by_geometry: dict[ConvGeometry, list[dict]] = {}
    for record in records:
        by_geometry.setdefault(record["geometry"], []).append(record)
    ratios = []
    for geometry, mine in by_geometry.items():
        dense = [r for r in mine if r["kernel"] == DENSE]
        for sparsity in SPARSITIES:
            rivals = dense + [r for r in mine if r["kernel"] != DENSE and r["sparsity"] == sparsity]
            chosen = min(rivals, key=lambda r: model.cost(r["kernel"], geometry, r["nonzeros"], target))
            ratios.append(chosen["seconds"] / min(r["seconds"] for r in rivals))
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default=f"llvm -mcpu={tvm.target.codegen.llvm_get_system_cpu()}")
    parser.add_argument("--repeat", type=int, default=60, help="timings, of which the least counts")
    parser.add_argument("--json", type=Path, help="write every measurement here")
    parser.add_argument("--fit", type=Path, help="fit measurements written by --json before, instead of measuring")
    arguments = parser.parse_args()
    target = tvm.target.Target(arguments.target)
    if arguments.fit:
        plain = json.loads(arguments.fit.read_text())
        records = [r | {"geometry": ConvGeometry(**r["geometry"])} for r in plain]
    else:
        records = list(measurements(target, arguments.repeat))
    if arguments.json:
        plain = [r | {"geometry": vars(r["geometry"])} for r in records]
        arguments.json.write_text(json.dumps(plain, indent=1))
    coefficients, errors = fit(records, target)
    print(f'    "{family(cpu_facts(target))}": {{')
    for name, terms in coefficients.items():
        print(f'        "{name}": {json.dumps(terms)},  # mean error {errors[name]:.0%}')
    print("    },")
    ratios = regret(records, coefficients, target)
    print(
        f"# Chosen by this model against the best: {np.exp(np.mean(np.log(ratios))):.3f} times its time on average, "
        f"{max(ratios):.2f} at worst, within 5 % in {np.mean(np.array(ratios) <= 1.05):.0%} of {len(ratios)} cases."
    )


if __name__ == "__main__":
    main()
