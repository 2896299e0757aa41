"""Convolutions drawn at random, built through relay.build, run, and compared with tests/reference.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relay
from tvm.contrib import graph_executor

from jointsparse.passes.absorb_conversions import AbsorbConversions
from jointsparse.passes.absorb_epilogues import AbsorbEpilogues
from jointsparse.passes.keep_tiles import KeepTiles
from jointsparse.schedules.constructors import conv2d_sparse_direct, conv2d_sparse_winograd
from jointsparse.schedules.geometry import ConvGeometry
from jointsparse.schedules.winograd import transform
from tests import reference

T = TypeVar("T")

TOLERANCE = {0: 1e-5, 2: 1e-5, 4: 5e-5}
"""Relative root mean square error by tile size; 0 is direct."""


@dataclass(frozen=True)
class Epilogue:
    """What follows a convolution, in Relay and in numpy. Both take (convolution, channel vector, residual)."""

    name: str
    build: Callable[[relay.Expr, relay.Expr, relay.Expr], relay.Expr]
    compute: Callable[[NDArray, NDArray, NDArray], NDArray]

    def __repr__(self) -> str:
        return self.name


def _column(vector: relay.Expr) -> relay.Expr:
    return relay.expand_dims(vector, 1, 2)


EPILOGUES = (
    Epilogue("nothing", lambda y, v, r: y, lambda y, v, r: y),
    Epilogue("bias", lambda y, v, r: relay.nn.bias_add(y, v), lambda y, v, r: y + v),
    Epilogue("bias_relu", lambda y, v, r: relay.nn.relu(relay.nn.bias_add(y, v)), lambda y, v, r: np.maximum(y + v, 0)),
    Epilogue(
        "bias_residual_relu",
        lambda y, v, r: relay.nn.relu(relay.add(r, relay.nn.bias_add(y, v))),
        lambda y, v, r: np.maximum(r + y + v, 0),
    ),
    Epilogue(
        "add_relu_of_residual", lambda y, v, r: relay.add(y, relay.nn.relu(r)), lambda y, v, r: y + np.maximum(r, 0)
    ),
    Epilogue("clip", lambda y, v, r: relay.clip(y, -0.5, 1.0), lambda y, v, r: np.clip(y, -0.5, 1.0)),
    Epilogue("leaky", lambda y, v, r: relay.nn.leaky_relu(y, 0.1), lambda y, v, r: np.where(y > 0, y, 0.1 * y)),
    Epilogue("prelu", lambda y, v, r: relay.nn.prelu(y, v), lambda y, v, r: np.where(y > 0, y, v * y)),
    Epilogue("silu", lambda y, v, r: y * relay.sigmoid(y), lambda y, v, r: y / (1 + np.exp(-y))),
    Epilogue(
        "scale_and_shift",
        lambda y, v, r: relay.add(relay.multiply(y, _column(v)), _column(v)),
        lambda y, v, r: y * v + v,
    ),
    Epilogue(
        "product_with_residual",
        lambda y, v, r: relay.multiply(relay.tanh(y), r),
        lambda y, v, r: np.tanh(y) * r,
    ),
)


@dataclass(frozen=True)
class Case:
    """One convolution; tile 0 is direct."""

    geometry: ConvGeometry
    tile: int
    sparsity: float
    empty_filters: bool
    epilogue: Epilogue
    seed: int


def direct_case(rng: np.random.Generator, large: bool = False) -> Case:
    """Any direct convolution; a large one has enough input to be computed in blocks."""
    kernels = [(1, 1), (3, 3), (5, 5), (9, 9), (7, 7), (1, 3), (3, 1), (2, 5), (4, 2)]
    strides = (_between(rng, 1, 4), _between(rng, 1, 4))
    dilation = _one_of(rng, [(1, 1), (1, 1), (2, 2), (1, 3), (3, 2)])
    return _case(rng, _geometry(rng, _one_of(rng, kernels), strides, dilation, large), 0)


def winograd_case(rng: np.random.Generator, large: bool = False) -> Case:
    """Any Winograd convolution; a large one has enough tiles to be computed in blocks."""
    size = _one_of(rng, [3, 5])
    geometry = _geometry(rng, (size, size), (1, 1), (1, 1), large)
    if rng.random() < 0.6:  # most networks keep the size of their images, and there are layouts for it
        geometry = replace(geometry, padding=(size // 2,) * 4)
        if rng.random() < 0.5:  # rows of whole vectors can be read as they are
            geometry = replace(geometry, in_width=-(-geometry.in_width // 8) * 8)
    return _case(rng, geometry, _one_of(rng, [2, 4]))


def _geometry(
    rng: np.random.Generator,
    kernel: tuple[int, int],
    strides: tuple[int, int],
    dilation: tuple[int, int],
    large: bool,
) -> ConvGeometry:
    padding = (_between(rng, 0, 5), _between(rng, 0, 5), _between(rng, 0, 5), _between(rng, 0, 5))
    groups = _one_of(rng, [1, 1, 1, 2, 3])
    least = [max(1, dilation[i] * (kernel[i] - 1) + 1 - padding[i] - padding[i + 2]) for i in range(2)]
    if large:
        sizes = [size + _between(rng, 50, 100) for size in least]
        in_channels = _between(rng, 12, 30)
    else:
        sizes = [size + _between(rng, 0, _one_of(rng, [3, 17, 40])) for size in least]
        in_channels = _between(rng, 1, 7)
    return ConvGeometry(
        batch=_one_of(rng, [1, 1, 2, 3]),
        in_channels=groups * (-(-in_channels // groups) if large else in_channels),
        in_height=sizes[0],
        in_width=sizes[1],
        out_channels=groups * _between(rng, 1, 7),
        kernel=kernel,
        strides=strides,
        padding=padding,
        dilation=dilation,
        groups=groups,
    )


def _case(rng: np.random.Generator, geometry: ConvGeometry, tile: int) -> Case:
    return Case(
        geometry=geometry,
        tile=tile,
        sparsity=_one_of(rng, [*[0.0, 0.5, 0.8, 0.9, 0.95] * 4, 1.0]),
        empty_filters=_one_of(rng, [False, False, True]),
        epilogue=_one_of(rng, EPILOGUES),
        seed=_between(rng, 0, 2**16),
    )


def _between(rng: np.random.Generator, least: int, most: int) -> int:
    return int(rng.integers(least, most + 1))


def _one_of(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[_between(rng, 0, len(options) - 1)]


def weights_of(case: Case) -> NDArray[np.float32]:
    """Spatial or Winograd weights, pruned in their own domain; one stays, unless none is to."""
    rng = np.random.default_rng(case.seed)
    dense = rng.standard_normal(case.geometry.weight_shape)
    if case.tile:
        dense = transform(case.tile, case.geometry.kernel[0]).filters(dense)
    dense[rng.random(dense.shape) < case.sparsity] = 0
    if case.empty_filters:
        dense[::2] = 0
    if not dense.any() and case.sparsity < 1:
        dense.reshape(-1)[-1] = 1
    return dense.astype(np.float32)


def operator_of(case: Case, data: relay.Expr, target: str) -> relay.Expr:
    if case.tile:
        return conv2d_sparse_winograd(data, weights_of(case), case.geometry, case.tile, target)
    return conv2d_sparse_direct(data, weights_of(case), case.geometry, target)


def inputs_of(case: Case) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Data, one number a channel, residual."""
    rng = np.random.default_rng(case.seed + 1)
    shape = case.geometry
    data = rng.standard_normal((shape.batch, shape.in_channels, shape.in_height, shape.in_width))
    vector, residual = rng.standard_normal(shape.out_channels), rng.standard_normal(shape.out_shape)
    return data.astype(np.float32), vector.astype(np.float32), residual.astype(np.float32)


def expected_of(case: Case) -> NDArray[np.float64]:
    data, vector, residual = inputs_of(case)
    if case.tile:
        plain = reference.winograd(data, weights_of(case), case.geometry, case.tile)
    else:
        plain = reference.conv2d(data, weights_of(case), case.geometry)
    return case.epilogue.compute(plain, vector[:, None, None].astype(np.float64), residual.astype(np.float64))


def module_of(cases: Sequence[Case], target: str) -> tvm.IRModule:
    """One module with all the convolutions side by side; inputs x0, r0, x1, r1, ..."""
    parameters, results = [], []
    for i, case in enumerate(cases):
        data, vector, residual = inputs_of(case)
        x, r = relay.var(f"x{i}", shape=data.shape), relay.var(f"r{i}", shape=residual.shape)
        parameters += [x, r]
        results.append(case.epilogue.build(operator_of(case, x, target), relay.const(vector), r))
    return tvm.IRModule.from_expr(relay.Function(parameters, relay.Tuple(results)))


def run_module(library: tvm.runtime.Module, cases: Sequence[Case]) -> list[NDArray[np.float32]]:
    executor = graph_executor.GraphModule(library["default"](tvm.cpu()))
    for i, case in enumerate(cases):
        data, _, residual = inputs_of(case)
        executor.set_input(f"x{i}", data)
        executor.set_input(f"r{i}", residual)
    executor.run()
    return [executor.get_output(i).numpy() for i in range(len(cases))]


def check(cases: Sequence[Case], target: str, opt_level: int = 3) -> None:
    """Build all in one library and compare each with the reference; kernels absorb what they can."""
    mod = AbsorbConversions(preferred=True)(AbsorbEpilogues()(module_of(cases, target)))
    mod = AbsorbConversions()(KeepTiles()(mod))
    with tvm.transform.PassContext(opt_level=opt_level):
        library = relay.build(mod, target)
    for case, result in zip(cases, run_module(library, cases), strict=True):
        error = reference.relative_rms(result, expected_of(case))
        assert error <= TOLERANCE[case.tile], f"{error:.2e} {case}"
