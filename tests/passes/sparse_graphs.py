"""Small graphs of sparse convolutions, for the tests of the passes that come after them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relay
from tvm.contrib import graph_executor

from jointsparse.schedules.constructors import conv2d_sparse_direct, conv2d_sparse_winograd
from jointsparse.schedules.geometry import ConvGeometry
from jointsparse.schedules.operators import DIRECT, DIRECT_ADD, FROM_TILES, TO_TILES, WINOGRAD, WINOGRAD_ADD
from jointsparse.schedules.winograd import transform

TARGET = "llvm"
SHAPE = (1, 4, 9, 10)
Expr = relay.Expr

_SHORT = {
    TO_TILES: "to",
    FROM_TILES: "from",
    DIRECT: "direct",
    DIRECT_ADD: "direct_add",
    WINOGRAD: "winograd",
    WINOGRAD_ADD: "winograd_add",
}


def conv(x: Expr, tile: int = 2, seed: int = 0, size: int = 3, padding: tuple[int, ...] | None = None) -> Expr:
    """Four sparse filters of any image; tile 0 is direct."""
    shape = [int(s) for s in relay.transform.InferTypeLocal(x).shape]
    geometry = ConvGeometry(*shape, 4, (size, size), padding=padding or (size // 2,) * 4)  # type: ignore[arg-type]
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(geometry.weight_shape) / (size * shape[1] ** 0.5)
    filters = transform(tile, size).filters(weight) if tile else weight
    # As many zeros in each, for like layers to share a kernel.
    filters.reshape(-1)[rng.permutation(filters.size)[: filters.size // 3]] = 0
    if tile:
        return conv2d_sparse_winograd(x, filters.astype(np.float32), geometry, tile, TARGET)
    return conv2d_sparse_direct(x, filters.astype(np.float32), geometry, TARGET)


def constant(*shape: int) -> Expr:
    return relay.const(np.random.default_rng(9).uniform(0.2, 0.9, shape).astype(np.float32))


def image(name: str) -> relay.Var:
    return relay.var(name, shape=SHAPE)


def twice(y: Expr, use: Callable[[Expr], Expr]) -> Expr:
    """Something done to an image that has another reader."""
    return relay.Tuple([use(y), y])


def main(*parameters: relay.Var, body: Expr) -> tvm.IRModule:
    return relay.transform.InferType()(tvm.IRModule.from_expr(relay.Function(list(parameters), body)))


@dataclass(frozen=True)
class Case:
    """A graph of two images, and the operators that it has after the pass tested."""

    build: Callable[[Expr, Expr], Expr]
    after: str


def graph(case: Case) -> tvm.IRModule:
    x, r = image("x"), image("r")
    return main(x, r, body=case.build(x, r))


def operators(mod: tvm.IRModule) -> list[str]:
    """Names of all calls."""
    names: list[str] = []

    def visit(node: Expr) -> None:
        if isinstance(node, relay.Call):
            names.append(_SHORT.get(node.op.name, node.op.name))

    relay.analysis.post_order_visit(mod["main"].body, visit)
    return names


def run(mod: tvm.IRModule, **inputs: NDArray) -> list[NDArray]:
    with tvm.transform.PassContext(opt_level=3):
        library = relay.build(mod, TARGET)
    executor = graph_executor.GraphModule(library["default"](tvm.cpu()))
    executor.set_input(**inputs)
    executor.run()
    return [executor.get_output(i).numpy() for i in range(executor.get_num_outputs())]


def run_both(
    mod: tvm.IRModule, change: Callable[[tvm.IRModule], tvm.IRModule], **inputs: NDArray
) -> tuple[list[NDArray], list[NDArray]]:
    """Outputs of a module as it is and changed; of one library, where like kernels compile once."""
    before, after = mod["main"], change(mod)["main"]
    changed = relay.bind(after.body, dict(zip(after.params, before.params, strict=True)))
    plain = _results(before.body)
    outputs = run(main(*before.params, body=relay.Tuple([*plain, *_results(changed)])), **inputs)
    return outputs[: len(plain)], outputs[len(plain) :]


def _results(body: Expr) -> list[Expr]:
    return list(body.fields) if isinstance(body, relay.Tuple) else [body]


Results = dict[str, tuple[list[NDArray], list[NDArray]]]


def before_and_after(
    builds: dict[str, Callable[[Expr, Expr], Expr]], change: Callable[[tvm.IRModule], tvm.IRModule]
) -> Results:
    """Outputs of each graph of two images, as it is and changed."""
    rng = np.random.default_rng(0)
    inputs, bodies, parameters = {}, [], []
    for i, build in enumerate(builds.values()):
        x, r = image(f"x{i}"), image(f"r{i}")
        parameters += [x, r]
        body = build(x, r)
        bodies.append(_results(body))
        inputs |= {var.name_hint: rng.standard_normal(SHAPE).astype(np.float32) for var in (x, r)}
    mod = main(*parameters, body=relay.Tuple([y for body in bodies for y in body]))
    plain, changed = (iter(results) for results in run_both(mod, change, **inputs))
    return {
        name: ([next(plain) for _ in body], [next(changed) for _ in body])
        for name, body in zip(builds, bodies, strict=True)
    }
