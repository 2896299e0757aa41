"""The operators inside Relay: types, refusals, what follows them, and TVM's own passes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tvm
from numpy.typing import NDArray
from tvm import relay
from tvm.contrib import graph_executor

from jointsparse.passes.absorb_epilogues import AbsorbEpilogues
from jointsparse.schedules.constructors import (
    conv2d_sparse_direct,
    conv2d_sparse_winograd,
    out_of_tiles,
    why_not_direct,
    why_not_winograd,
)
from jointsparse.schedules.geometry import ConvGeometry
from jointsparse.schedules.operators import DIRECT, DIRECT_ADD, FROM_TILES, WINOGRAD, WINOGRAD_ADD
from jointsparse.schedules.targets import why_not_target
from jointsparse.schedules.tiles import tile_layout
from tests import reference
from tests.host import HASWELL, needs_avx2
from tests.schedules.libraries import (
    BOTH,
    LLVM,
    SMALL,
    build,
    close,
    data_of,
    expected,
    kernels,
    module,
    run,
    sparse,
    weights,
)

# --- types


@BOTH
@pytest.mark.parametrize(
    "kind", [((1, 4, 11, 12), "float32"), ((1, 4, 11, 13), "float16"), ((relay.Any(), 4, 11, 13), "float32")]
)
def test_other_data_than_the_operator_was_made_for_is_refused(tile: int, kind: tuple) -> None:
    x = relay.var("x", shape=kind[0], dtype=kind[1])
    mod = tvm.IRModule.from_expr(relay.Function([x], sparse(x, weights(SMALL, tile), SMALL, tile)))
    with pytest.raises((tvm.TVMError, TypeError), match=r"is made for float32 data of shape \(1, 4, 11, 13\), got"):
        relay.transform.InferType()(mod)


@pytest.mark.parametrize(
    "kind",
    [((1, 6, 257), "float32"), ((1, 6, 256), "float16"), ((1, 6, relay.Any()), "float32"), ((6,), "float32")],
)
def test_other_tiles_than_an_operator_was_made_for_are_refused(kind: tuple) -> None:
    layout = tile_layout(11, 13, 4, 1, 4)
    assert layout.shape(1, 6) == (1, 6, 256)
    back = module(SMALL, lambda y: y, 4)["main"].body
    operators = [back.op, back.args[0].op]
    assert [operator.name for operator in operators] == [FROM_TILES, WINOGRAD]
    x = relay.var("x", shape=kind[0], dtype=kind[1])
    calls = [
        relay.Call(back.op, [x], out_of_tiles(x, layout).attrs),
        relay.Call(back.args[0].op, [x, *back.args[0].args[1:]], back.args[0].attrs),
    ]
    for call in calls:
        with pytest.raises((tvm.TVMError, TypeError), match="is made for float32 data of "):
            relay.transform.InferType()(tvm.IRModule.from_expr(relay.Function([x], call)))


@BOTH
@pytest.mark.parametrize(
    ("bias", "residual", "message"),
    [
        ((5,), None, r"float32 bias of shape \(6,\), got"),
        ((1, 6), None, r"float32 bias of shape \(6,\), got"),
        ((6,), (1, 5, 11, 13), r"float32 residual of shape \(1, 6, .*\), got"),
        ((6,), (6, 1, 1), r"float32 residual of shape \(1, 6, .*\), got"),
    ],
    ids=["short bias", "deep bias", "other residual", "broadcast residual"],
)
def test_bias_and_residual_of_another_shape_are_refused(
    tile: int, bias: tuple[int, ...], residual: tuple[int, ...] | None, message: str
) -> None:
    body = module(SMALL, lambda y: y, tile)["main"].body
    convolution = body.args[0] if tile else body
    *arguments, _ = convolution.args
    arguments.append(relay.const(np.zeros(bias, np.float32)))
    names = (WINOGRAD, WINOGRAD_ADD) if tile else (DIRECT, DIRECT_ADD)
    if residual is not None:
        arguments.append(relay.const(np.zeros(residual, np.float32)))
    call = relay.Call(relay.op.get(names[residual is not None]), arguments, convolution.attrs)
    with pytest.raises((tvm.TVMError, TypeError), match=f"is made for {message}"):
        relay.transform.InferType()(tvm.IRModule.from_expr(relay.Function(relay.analysis.free_vars(call), call)))


@BOTH
def test_text_and_json_round_trip(tile: int) -> None:
    mod = relay.transform.InferType()(module(SMALL, relay.nn.relu, tile))
    assert (WINOGRAD if tile else DIRECT) in mod.astext(show_meta_data=False)
    again = tvm.ir.load_json(tvm.ir.save_json(mod))
    assert tvm.ir.structural_equal(again, mod)
    data = data_of(SMALL)
    np.testing.assert_array_equal(run(build(again), x=data), run(build(mod), x=data))


def test_attributes_are_part_of_equality() -> None:
    """Equal shapes, other dilation: must never share a kernel."""
    near = ConvGeometry(1, 2, 9, 9, 2, (3, 3), padding=(1, 1, 1, 1))
    far = ConvGeometry(1, 2, 9, 9, 2, (3, 3), padding=(2, 2, 2, 2), dilation=(2, 2))
    assert near.out_shape == far.out_shape
    x, data = relay.var("x", shape=(1, 2, 9, 9)), data_of(near)
    weight = weights(near, sparsity=0)
    a, b = conv2d_sparse_direct(x, weight, near), conv2d_sparse_direct(x, weight, far)
    assert not tvm.ir.structural_equal(a, b)
    result = run(build(tvm.IRModule.from_expr(relay.Function([x], relay.concatenate([a, b], 1)))), x=data)
    both = [reference.conv2d(data, weight, near), reference.conv2d(data, weight, far)]
    close(result, np.concatenate(both, 1))


@BOTH
def test_layers_of_equal_shape_keep_their_own_nonzeros(tile: int) -> None:
    geometry = ConvGeometry(1, 6, 10, 10, 6, (3, 3), padding=(1, 1, 1, 1))
    layers = [weights(geometry, tile, sparsity=0.5, seed=seed) for seed in range(3)]
    data = data_of(geometry)
    y = x = relay.var("x", shape=data.shape)
    want = data.astype(np.float64)
    for weight in layers:
        y, want = sparse(y, weight, geometry, tile), expected(want, weight, geometry, tile)
    library = build(tvm.IRModule.from_expr(relay.Function([x], y)))
    close(run(library, x=data), want)
    assert len({name for name in kernels(library) if "conv2d" in name}) == 1, "like layers should share one kernel"


# --- constructors


def test_reasons() -> None:
    assert why_not_direct(SMALL) is None
    assert why_not_winograd(SMALL, 4) is None
    strided = ConvGeometry(1, 4, 11, 13, 6, (3, 3), strides=(2, 1))
    dilated = ConvGeometry(1, 4, 11, 13, 6, (3, 3), dilation=(1, 2))
    assert "stride 2x1" in str(why_not_winograd(strided, 4))
    assert "dilation 1x2" in str(why_not_winograd(dilated, 4))
    assert "filter 1x3" in str(why_not_winograd(ConvGeometry(1, 4, 11, 13, 6, (1, 3)), 4))
    assert "F(3x3)" in str(why_not_winograd(SMALL, 3))
    assert why_not_target(LLVM) is None
    assert "opencl" in str(why_not_target("opencl"))


def test_constructors_refuse() -> None:
    x = relay.var("x", shape=(1, 4, 11, 13))
    strided = ConvGeometry(1, 4, 11, 13, 6, (3, 3), strides=(2, 2))
    with pytest.raises(ValueError, match="stride"):
        conv2d_sparse_winograd(x, weights(SMALL, 4), strided, 4)
    with pytest.raises(ValueError, match="6 x 6"):
        conv2d_sparse_winograd(x, weights(SMALL, 2), SMALL, 4)
    with pytest.raises(ValueError, match="the geometry says"):
        conv2d_sparse_direct(x, weights(SMALL)[:5], SMALL)


def test_a_target_without_schedule_is_refused_in_words() -> None:
    with pytest.raises(Exception, match="no sparse schedule for target kind opencl"):
        build(module(SMALL, lambda y: y), "opencl")


@BOTH
def test_arguments_are_not_changed(tile: int) -> None:
    weight = weights(SMALL, tile)
    before = weight.copy()
    weight.flags.writeable = False
    sparse(relay.var("x", shape=(1, 4, 11, 13)), weight, SMALL, tile)
    np.testing.assert_array_equal(weight, before)


# --- fusion


def _after() -> dict[str, Callable[[relay.Expr], relay.Expr]]:
    half = relay.const(np.float32(0.5))
    column = relay.const(np.linspace(-1, 1, 6, dtype=np.float32).reshape(6, 1, 1))
    return {
        "relu": relay.nn.relu,
        "used twice": lambda y: relay.nn.relu(y) + relay.nn.relu(relay.negative(y)) * half,
        "used inside and outside": lambda y: relay.concatenate([relay.nn.relu(y), y], 1),
        "broadcast to a larger shape": lambda y: relay.add(y, relay.const(np.ones((3, 1, 1, 1), np.float32))),
        "expand_dims": lambda y: relay.nn.relu(relay.expand_dims(relay.add(y, column), 0)),
        "reshape": lambda y: relay.reshape(relay.nn.relu(y), (1, -1)),
        "transpose": lambda y: relay.nn.relu(relay.transpose(y, (0, 2, 3, 1))),
        "transpose to the same shape": lambda y: relay.transpose(
            relay.strided_slice(y, [0, 0, 0, 0], [1, 6, 11, 11]), (0, 1, 3, 2)
        ),
        "slice": lambda y: relay.strided_slice(relay.nn.relu(y), [0, 1, 2, 3], [1, 5, 9, 12]),
        "split": lambda y: relay.split(relay.nn.relu(y), 2, 1)[1],
        "pad": lambda y: relay.nn.pad(y, ((0, 0), (0, 0), (1, 2), (0, 1))),
        "sum": lambda y: relay.sum(relay.nn.relu(y), (2, 3)),
        "softmax": lambda y: relay.nn.softmax(y, 1),
        "max_pool": lambda y: relay.nn.max_pool2d(relay.nn.relu(y), (2, 2), (2, 2)),
        "upsampling": lambda y: relay.nn.upsampling(relay.nn.relu(y), 2, 2),
        "cast": lambda y: relay.cast(relay.round(y), "int8"),
        "where": lambda y: relay.where(relay.greater(y, half), y, relay.zeros_like(y)),
        "batch_flatten": lambda y: relay.nn.batch_flatten(relay.tanh(y)),
        "dense after": lambda y: relay.nn.dense(
            relay.nn.batch_flatten(y), relay.const(np.full((3, 6 * 11 * 13), 0.01, np.float32))
        ),
        "layout_transform": lambda y: relay.layout_transform(relay.nn.relu(y), "NCHW", "NCHW2c"),
        "depth_to_space": lambda y: relay.nn.depth_to_space(relay.concatenate([y, y], 1), 2),
        "nothing": lambda y: y,
    }


@pytest.fixture(scope="module", params=[0, 4], ids=["direct", "winograd"])
def followed(request: pytest.FixtureRequest) -> dict[str, tuple[NDArray, NDArray]]:
    """Of what follows a convolution: its result, and that of the same graph with the convolution's result fed in.

    All in one library, where the convolutions share a kernel.
    """
    tile, data = request.param, data_of(SMALL)
    x = relay.var("x", shape=data.shape)
    inputs, parameters, results, wanted = {"x": data}, [x], [], []
    for seed, after in enumerate(_after().values()):
        weight = weights(SMALL, tile, seed=seed)
        y = relay.var(f"y{seed}", shape=SMALL.out_shape)
        inputs[y.name_hint] = expected(data, weight, SMALL, tile).astype(np.float32)
        parameters.append(y)
        results.append(after(sparse(x, weight, SMALL, tile)))
        wanted.append(after(y))
    body = relay.Tuple([*results, *wanted])
    library = build(tvm.IRModule.from_expr(relay.Function(parameters, body)))
    executor = graph_executor.GraphModule(library["default"](tvm.cpu()))
    executor.set_input(**inputs)
    executor.run()
    outputs = [executor.get_output(i).numpy() for i in range(executor.get_num_outputs())]
    return dict(zip(_after(), zip(outputs[: len(results)], outputs[len(results) :], strict=True), strict=True))


@pytest.mark.parametrize("name", _after())
def test_whatever_follows(name: str, followed: dict[str, tuple[NDArray, NDArray]]) -> None:
    got, want = followed[name]
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)


@BOTH
def test_bias_residual_and_activation_make_one_kernel(tile: int) -> None:
    """Through AbsorbEpilogues; for Winograd with conversions of data, residual and result."""
    data, residual = data_of(SMALL), np.random.default_rng(2).standard_normal(SMALL.out_shape).astype(np.float32)
    x, r = relay.var("x", shape=data.shape), relay.var("r", shape=residual.shape)
    y = relay.nn.bias_add(sparse(x, weights(SMALL, tile), SMALL, tile), relay.const(np.ones(6, np.float32)))
    mod = tvm.IRModule.from_expr(relay.Function([x, r], relay.nn.relu(relay.add(y, r))))
    library = build(AbsorbEpilogues()(mod))
    names = kernels(library)
    assert [name for name in names if "tiles" not in name] == [name for name in names if "conv2d" in name]
    assert len(names) == (4 if tile else 1)
    want = np.maximum(expected(data, weights(SMALL, tile), SMALL, tile) + 1 + residual, 0)
    close(run(library, x=data, r=residual), want)


@BOTH
def test_relay_fuses_nothing_into_it(tile: int) -> None:
    """What is not absorbed is a kernel of its own."""
    names = kernels(build(module(SMALL, lambda y: relay.nn.relu(relay.tanh(y)), tile)))
    assert [name for name in names if "tanh" in name] == ["tvmgen_default_fused_tanh_nn_relu"]
    assert len(names) == (4 if tile else 2)


def test_two_convolutions_added() -> None:
    data = data_of(SMALL)
    x = relay.var("x", shape=data.shape)
    y = relay.add(sparse(x, weights(SMALL), SMALL, 0), sparse(x, weights(SMALL, 4), SMALL, 4))
    want = expected(data, weights(SMALL), SMALL, 0) + expected(data, weights(SMALL, 4), SMALL, 4)
    close(run(build(tvm.IRModule.from_expr(relay.Function([x], y))), x=data), want)


# --- passes


@BOTH
def test_a_constant_convolution_folds(tile: int) -> None:
    data = data_of(SMALL)
    mod = tvm.IRModule.from_expr(relay.Function([], sparse(relay.const(data), weights(SMALL, tile), SMALL, tile)))
    folded = relay.transform.FoldConstant()(relay.transform.InferType()(mod))
    assert isinstance(folded["main"].body, relay.Constant)
    close(folded["main"].body.data.numpy(), expected(data, weights(SMALL, tile), SMALL, tile))


@needs_avx2
@BOTH
def test_between_dense_convolutions_whose_layout_is_altered(tile: int) -> None:
    geometry = ConvGeometry(1, 16, 12, 12, 16, (3, 3), padding=(1, 1, 1, 1))
    rng = np.random.default_rng(2)
    first, last = (rng.standard_normal((16, 16, 3, 3)).astype(np.float32) for _ in range(2))
    weight, data = weights(geometry, tile), data_of(geometry)
    x = relay.var("x", shape=data.shape)
    dense = {"channels": 16, "kernel_size": (3, 3), "padding": (1, 1)}
    y = relay.nn.relu(relay.nn.conv2d(x, relay.const(first), **dense))
    y = relay.nn.relu(sparse(y, weight, geometry, tile))
    y = relay.nn.conv2d(y, relay.const(last), **dense)
    hidden = np.maximum(reference.conv2d(data, first, geometry), 0)
    hidden = np.maximum(expected(hidden, weight, geometry, tile), 0)
    library = build(tvm.IRModule.from_expr(relay.Function([x], y)), HASWELL)
    assert any("NCHWc" in name for name in kernels(library)), "the neighbours should have been altered"
    close(run(library, x=data), reference.conv2d(hidden, last, geometry))


@BOTH
def test_mixed_precision_leaves_it_alone(tile: int) -> None:
    mod = relay.transform.InferType()(module(SMALL, relay.nn.relu, tile))
    mixed = relay.transform.InferType()(relay.transform.ToMixedPrecision("float16")(mod))
    found = []

    def visit(node: relay.Expr) -> None:
        if isinstance(node, relay.Call) and getattr(node.op, "name", "") in (DIRECT, WINOGRAD):
            found.append(node.checked_type.dtype)

    relay.analysis.post_order_visit(mixed["main"], visit)
    assert found == ["float32"]


@BOTH
def test_standard_passes_keep_it(tile: int) -> None:
    passes = tvm.transform.Sequential(
        [
            relay.transform.InferType(),
            relay.transform.SimplifyInference(),
            relay.transform.FoldConstant(),
            relay.transform.FoldScaleAxis(),
            relay.transform.CanonicalizeOps(),
            relay.transform.EliminateCommonSubexpr(),
            relay.transform.CombineParallelConv2D(),
            relay.transform.ConvertLayout({"nn.conv2d": ["NHWC", "default"]}),
            relay.transform.ToANormalForm(),
            relay.transform.ToGraphNormalForm(),
            relay.transform.FuseOps(3),
            relay.transform.InferType(),
            relay.transform.DefuseOps(),
            relay.transform.InferType(),
        ]
    )
    with tvm.transform.PassContext(opt_level=3):
        mod = passes(module(SMALL, lambda y: relay.nn.relu(relay.nn.relu(y)), tile))
    data = data_of(SMALL)
    close(run(build(mod), x=data), np.maximum(expected(data, weights(SMALL, tile), SMALL, tile), 0))
