"""Straight-line vector code: right in exact rationals, and nothing computed twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
import tvm
from tvm import te, tir

from jointsparse.schedules import operators  # noqa: F401  (readies LLVM)
from jointsparse.schedules.targets import PLAIN_CODE, CodeFeatures, code_features, cpu_facts
from jointsparse.schedules.vector_code import VectorCode, even_odd
from jointsparse.schedules.winograd import KERNELS, TILES, Matrix, transform
from tests.host import TARGETS

MATRICES = {
    f"{name} of F({m}, {r})": getattr(transform(m, r), name) for m in TILES for r in KERNELS for name in ("AT", "BT")
}
each_matrix = pytest.mark.parametrize("name", MATRICES)


class Counting:
    """Numbers that count the arithmetic done on them, in place of vectors."""

    def __init__(self, value: Fraction, counts: Counter[str]) -> None:
        self.value = value
        self.counts = counts

    def _of(self, name: str, value: Fraction) -> Counting:
        self.counts[name] += 1
        return Counting(value, self.counts)

    def __add__(self, other: Counting) -> Counting:
        return self._of("sum", self.value + other.value)

    def __sub__(self, other: Counting) -> Counting:
        return self._of("sum", self.value - other.value)

    def __mul__(self, other: Counting) -> Counting:
        return self._of("product", self.value * other.value)


class Rationals(VectorCode):
    """The same products in exact rationals."""

    def __init__(self) -> None:
        super().__init__(tvm.tir.ir_builder.create(), 1)
        self.counts: Counter[str] = Counter()

    def keep(self, value: Counting) -> Counting:  # type: ignore[override]
        return value

    def splat(self, value: float, dtype: str = "float32") -> Counting:  # type: ignore[override]
        return Counting(Fraction(value), self.counts)

    def load_number(self, values: list[Fraction]) -> Callable[[int], Counting]:
        def operand(i: int) -> Counting:
            self.counts["load"] += 1
            return Counting(values[i], self.counts)

        return operand


def exact(matrix: Matrix, values: list[Fraction]) -> list[Fraction]:
    return [sum((w * v for w, v in zip(row, values, strict=True)), Fraction(0)) for row in matrix]


def numbers(count: int) -> list[Fraction]:
    return [Fraction(int(n), 7) for n in np.random.default_rng(0).integers(-99, 100, count)]


def test_even_and_odd() -> None:
    one, two = Fraction(1), Fraction(2)
    assert even_odd([one, two], [one, -two]) == ([one, 0], [0, two])
    assert even_odd([one, two], [one, two]) is None, "no odd half"
    assert even_odd([one, two], [-one, -two]) is None, "no even half"
    assert even_odd([one, two], [two, one]) is None, "halves overlap"


@each_matrix
def test_halves_give_the_rows_back(name: str) -> None:
    rows = MATRICES[name]
    found = 0
    for i in range(len(rows) - 1):
        first, second = rows[i : i + 2]
        halves = even_odd(first, second)
        if halves is not None:
            found += 1
            even, odd = halves
            assert [a + b for a, b in zip(even, odd, strict=True)] == list(first)
            assert [a - b for a, b in zip(even, odd, strict=True)] == list(second)
    if name.startswith("BT"):
        assert found == (len(rows) - 2) // 2, "one pair for each pair of points a, -a"


@each_matrix
def test_products_are_exact(name: str) -> None:
    matrix = MATRICES[name]
    code, values = Rationals(), numbers(len(matrix[0]))
    result = code.product(matrix, code.load_number(values))
    assert [result[i].value for i in range(len(matrix))] == exact(matrix, values)


@each_matrix
def test_products_of_some_columns_are_exact(name: str) -> None:
    """As they are left where the others are known to be zero."""
    matrix, values = MATRICES[name], numbers(len(MATRICES[name][0]))
    for count in range(1, len(values)):
        for columns in combinations(range(len(values)), count):
            code, some = Rationals(), [values[i] for i in columns]
            left = tuple(tuple(row[i] for i in columns) for row in matrix)
            result = code.product(left, code.load_number(some))
            assert [one.value for one in result] == exact(left, some)


@each_matrix
def test_an_operand_is_loaded_once_and_pairs_save_sums(name: str) -> None:
    matrix = MATRICES[name]
    code = Rationals()
    code.product(matrix, code.load_number(numbers(len(matrix[0]))))
    assert code.counts["load"] == len(matrix[0])
    plain = sum(sum(map(bool, row)) - 1 for row in matrix)
    assert code.counts["sum"] < plain or name in ("AT of F(2, 3)", "BT of F(2, 3)", "AT of F(2, 5)")
    assert code.counts["sum"] <= plain
    assert code.counts["product"] <= sum(abs(weight) not in (0, 1) for row in matrix for weight in row)


@pytest.mark.parametrize(
    ("name", "sums"),
    [("BT of F(2, 3)", 4), ("AT of F(2, 3)", 4), ("BT of F(4, 3)", 12), ("AT of F(4, 3)", 10)],
)
def test_sums_of_the_published_filters(name: str, sums: int) -> None:
    """Every sum that rows share is there once."""
    code = Rationals()
    code.product(MATRICES[name], code.load_number(numbers(len(MATRICES[name][0]))))
    assert code.counts["sum"] == sums


@pytest.mark.parametrize("fetch", [False, True])
def test_fetches_ahead_where_the_target_can(fetch: bool) -> None:
    """Beyond the end, too."""

    def emit(ins: Sequence[tir.Buffer], outs: Sequence[tir.Buffer]) -> tir.Stmt:
        code = VectorCode(tvm.tir.ir_builder.create(), 4, features=CodeFeatures(fetch=fetch))
        with code.loop(3, "i") as i:
            code.fetch(ins[0], i * 4 + 5000)
            code.store(outs[0], code.load(ins[0], i * 4), i * 4)
        return code.ib.get()

    source = te.placeholder((12,), name="source")
    target = te.extern([source.shape], [source], emit, dtype="float32")
    function = tvm.build(te.create_schedule(target.op), [source, target], "llvm")
    assert ("call void @llvm.prefetch" in function.get_source("ll")) == fetch
    data, result = np.arange(12, dtype=np.float32), tvm.nd.array(np.zeros(12, np.float32))
    function(tvm.nd.array(data), result)
    np.testing.assert_array_equal(result.numpy(), data)


@pytest.mark.parametrize("lanes", [1, 4, 8, 16])
def test_shifted(lanes: int) -> None:
    """A vector out of two that follow each other, from any element of the first on."""

    def emit(ins: Sequence[tir.Buffer], outs: Sequence[tir.Buffer]) -> tir.Stmt:
        code = VectorCode(tvm.tir.ir_builder.create(), lanes)
        first, second = (code.load(ins[0], i * lanes) for i in (0, 1))
        for count in range(lanes + 1):
            code.store(outs[0], code.shifted(first, second, count), count * lanes)
        return code.ib.get()

    source = te.placeholder((2 * lanes,), name="source")
    target = te.extern([((lanes + 1) * lanes,)], [source], emit, dtype="float32")
    function = tvm.build(te.create_schedule(target.op), [source, target], "llvm")
    data, result = np.arange(2 * lanes, dtype=np.float32), tvm.nd.array(np.zeros((lanes + 1) * lanes, np.float32))
    function(tvm.nd.array(data), result)
    want = [np.arange(count, count + lanes) for count in range(lanes + 1)]
    np.testing.assert_array_equal(result.numpy(), np.concatenate(want))


@pytest.mark.parametrize("lanes", [1, 4, 16])
def test_compiled(lanes: int) -> None:
    """A product of vectors, in a loop, through the array that vectors are kept in."""
    matrix, count = transform(4, 5).BT, 3
    n = len(matrix)

    def emit(ins: Sequence[tir.Buffer], outs: Sequence[tir.Buffer]) -> tir.Stmt:
        code = VectorCode(tvm.tir.ir_builder.create(), lanes)
        with code.loop(count, "i") as i:
            place = code.let(i * lanes)
            for row, value in enumerate(code.product(matrix, lambda j: code.load(ins[0], tir.const(j), place))):
                code.store(outs[0], value, tir.const(row), place)
        return code.ib.get()

    source = te.placeholder((n, count * lanes), name="source")
    target = te.extern([source.shape], [source], emit, dtype="float32")
    function = tvm.build(te.create_schedule(target.op), [source, target], "llvm")
    data = np.random.default_rng(0).standard_normal((n, count * lanes)).astype(np.float32)
    result = tvm.nd.array(np.zeros_like(data))
    function(tvm.nd.array(data), result)
    want = np.array(matrix, np.float64) @ data.astype(np.float64)
    np.testing.assert_allclose(result.numpy(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lanes", [1, 4, 8, 16])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_columns_split_and_joined(lanes: int, count: int) -> None:
    """Of the second row of a matrix, from an odd place on, in a loop."""
    rounds, start = 2, 3
    length = rounds * lanes * count

    def emit(ins: Sequence[tir.Buffer], outs: Sequence[tir.Buffer]) -> tir.Stmt:
        code, row = VectorCode(tvm.tir.ir_builder.create(), lanes), tir.const(1, "int32")
        with code.loop(rounds, "i") as i:
            columns = code.split_columns(ins[0], count, row, i * (lanes * count) + start)
            assert len(columns) == count
            for j, column in enumerate(columns):
                code.store(outs[0], column, tir.const(j, "int32"), i * lanes)
            code.join_columns([column + column for column in columns], outs[1], row, i * (lanes * count) + start)
        return code.ib.get()

    source = te.placeholder((2, length + start), name="source")
    shapes = [(count, rounds * lanes), (2, length + start)]
    targets = te.extern(shapes, [source], emit, dtype=["float32", "float32"])
    function = tvm.build(te.create_schedule(targets[0].op), [source, *targets], "llvm")
    data = np.random.default_rng(0).standard_normal((2, length + start)).astype(np.float32)
    split, joined = (tvm.nd.array(np.zeros(shape, np.float32)) for shape in shapes)
    function(tvm.nd.array(data), split, joined)
    np.testing.assert_array_equal(split.numpy(), data[1, start:].reshape(-1, count).T)
    want = np.zeros_like(data)
    want[1, start:] = 2 * data[1, start:]
    np.testing.assert_array_equal(joined.numpy(), want)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("features", [PLAIN_CODE, None], ids=["plain", "of the target"])
def test_what_is_behind_an_index(features: CodeFeatures | None, target: str) -> None:
    """Vectors and numbers, in whatever way the target's code reads them."""
    lanes, features = cpu_facts(target).lanes, features or code_features(target)

    def emit(ins: Sequence[tir.Buffer], outs: Sequence[tir.Buffer]) -> tir.Stmt:
        code = VectorCode(tvm.tir.ir_builder.create(), lanes, features=features)
        with code.loop(3, "i") as i:
            vectors, numbers = code.behind(ins[0], i, i * 4), code.splats_behind(ins[1], i)
            product = vectors(7) * numbers(2) + code.hold(vectors(0)) * numbers(0)
            code.store(outs[0], product, i * lanes)
        return code.ib.get()

    data = [np.random.default_rng(0).standard_normal(shape).astype(np.float32) for shape in ((3, 40), (5,))]
    sources = [te.placeholder(array.shape, name=f"source{i}") for i, array in enumerate(data)]
    product = te.extern([(3 * lanes,)], sources, emit, dtype="float32")
    result = tvm.nd.array(np.zeros(3 * lanes, np.float32))
    tvm.build(te.create_schedule(product.op), [*sources, product], target)(*map(tvm.nd.array, data), result)
    rows, numbers = data
    want = [rows[i, 4 * i + 7 :][:lanes] * numbers[i + 2] + rows[i, 4 * i :][:lanes] * numbers[i] for i in range(3)]
    np.testing.assert_allclose(result.numpy(), np.concatenate(want), rtol=1e-5, atol=1e-6)
