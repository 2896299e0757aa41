"""The coder of quantised weights: what comes out is what went in, and it takes few bits."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from jointsparse.frontends.coding import ans, fixed_point, floats, magnitudes, portable, tensors
from jointsparse.frontends.coding.magnitudes import _first_of, class_of, parts
from jointsparse.frontends.coding.significance import stripes
from jointsparse.frontends.coding.tallies import Grid

SHAPES = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple) | st.sampled_from(
    [(300,), (40, 70), (1, 64, 9, 9), (64, 1, 9, 9), (33, 17, 3, 3), (128, 5)]
)


def random_codes(rng: np.random.Generator, shape: tuple[int, ...], density: float, spread: float) -> NDArray[np.int32]:
    """Geometric magnitudes, some filters and channels without any."""
    codes = np.minimum(rng.geometric(1 / (1 + spread), shape), 2**31 - 1) * rng.choice([-1, 1], shape)
    codes = np.where(rng.random(shape) < density, codes, 0)
    codes[rng.random(shape[0]) < 0.2] = 0
    return codes.astype(np.int32)


@given(SHAPES, st.integers(0, 2**32 - 1), st.sampled_from([0, 0.05, 0.3, 1]), st.sampled_from([0, 0.5, 8, 1e3, 1e9]))
@settings(max_examples=150, deadline=None, derandomize=True)
@example((2, 3), 0, 0.0, 0.0)
def test_there_and_back(shape: tuple[int, ...], seed: int, density: float, spread: float) -> None:
    codes = random_codes(np.random.default_rng(seed), shape, density, spread)
    data = tensors.encode(codes)
    assert tensors.encode(codes.copy()) == data
    assert codes.size <= tensors.most(len(data))
    assert len(data) <= tensors.longest(codes.size)
    decoded, _ = tensors.decode(data, shape)
    assert decoded.dtype == np.int32
    np.testing.assert_array_equal(decoded, codes)


def test_the_largest_codes() -> None:
    codes = np.array([[2**31 - 1, -(2**31), 0, 1, 15, 16, 17, -19, 20, 65536]], np.int32)
    np.testing.assert_array_equal(tensors.decode(tensors.encode(codes), codes.shape)[0], codes)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_stripes_have_every_weight_once(rows: int, columns: int, taps: int) -> None:
    seen = np.zeros((taps, rows, columns), int)
    for stripe in stripes(Grid(rows, columns, taps)):
        stripe.put(seen[stripe.tap], stripe.take(seen[stripe.tap]) + 1)
    assert (seen == 1).all()


@pytest.mark.parametrize("count", [0, 1, 2, 31, 32, 33, 1000])
def test_parts_have_every_weight_once(count: int) -> None:
    assert sorted(i for part in parts(count) for i in range(count)[part]) == list(range(count))


def test_classes_of_magnitudes() -> None:
    values = np.unique(np.concatenate([np.arange(5000), 2 ** np.arange(31), 2 ** np.arange(1, 32) - 1]))
    classes = class_of(values)
    assert (np.diff(classes) >= 0).all()
    first, bits = _first_of(classes)
    assert ((first <= values) & (values < first + (1 << bits))).all()
    assert classes[values < 16].tolist() == list(range(16))


def test_logarithms_and_probabilities() -> None:
    numbers = np.array([1, 2, 3, 5, 100, 4095, 4096, 4097, 10**6, 2**40 + 12345])
    exact = np.log2(numbers.astype(float)) * fixed_point.BIT
    assert np.abs(fixed_point.log2(numbers) - exact).max() < 0.6
    for eighths in range(-64, 65):
        assert abs(fixed_point.logistic(eighths, 3) - fixed_point.ONE / (1 + 2 ** (-eighths / 8))) <= 0.51
        assert math.isclose(fixed_point.power_of_two(eighths, 3), 2 ** (32 + eighths / 8), rel_tol=1e-6)


def test_bits_are_few() -> None:
    """Below what a coder without contexts could reach, where filters differ; hardly above it where they do not."""
    rng = np.random.default_rng(0)
    even = random_even(rng, np.full((64, 64, 1, 1), 0.2))
    assert 8 * len(tensors.encode(even)) < 1.02 * even.size * entropy(even)
    uneven = random_even(rng, np.broadcast_to(rng.beta(0.3, 1, (64, 64, 1, 1)), (64, 64, 1, 1)))
    assert 8 * len(tensors.encode(uneven)) < 0.9 * uneven.size * entropy(uneven)
    nothing = np.zeros((512, 512, 3, 3), np.int32)
    assert len(tensors.encode(nothing)) < nothing.size / 5000


@pytest.mark.parametrize("shape", [(1000, 1000), (64, 64, 9, 9), (300_000,), (2, 100_000), (100_000, 2, 1, 1)])
def test_codes_that_cost_little_are_within_what_a_stream_may_hold(shape: tuple[int, ...]) -> None:
    for value in (0, 1, -1, 7):
        codes = np.full(shape, value, np.int32)
        for change in (0, 1, -1):
            codes.flat[0] += change
            data = tensors.encode(codes)
            assert codes.size <= tensors.most(len(data))
            np.testing.assert_array_equal(tensors.decode(data, shape)[0], codes)


def test_many_taps_take_no_longer_than_many_channels() -> None:
    assert Grid.of((64, 8, 10_000)) == Grid.of((64, 80_000))
    assert Grid.of((64, 1, 3, 3)) == Grid.of((64, 9))
    assert Grid.of((64, 4, 3, 3)).taps == 9


def test_sums_are_the_same_in_every_python() -> None:
    assert magnitudes._sum(np.full(10, 0.1)) == 0.9999999999999999


def random_even(rng: np.random.Generator, density: NDArray[np.float64]) -> NDArray[np.int32]:
    shape = (64, 64, 3, 3)
    codes = rng.geometric(0.4, shape) * rng.choice([-1, 1], shape)
    return np.where(rng.random(shape) < density, codes, 0).astype(np.int32)


def entropy(codes: NDArray[np.int32]) -> float:
    shares = np.unique(codes, return_counts=True)[1] / codes.size
    return float(-np.sum(shares * np.log2(shares)))


HEADS = [
    b"",
    b"\0\0\0\0",
    b"\0\5\7\x20",
    b"\3\x90\1\x0a\x51",
    b"\x80\x80\x80\x80\4\xff\xff\xff\xff\3\x40\0",
    b"\0\0\0\x7f",
]


@given(st.sampled_from(HEADS), st.binary(max_size=200), SHAPES)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_bytes_are_codes_or_refused(head: bytes, body: bytes, shape: tuple[int, ...]) -> None:
    try:
        codes, _ = tensors.decode(head + body, shape)
    except ValueError:
        return
    assert codes.shape == shape


def test_a_stream_that_goes_on_is_refused() -> None:
    codes = random_codes(np.random.default_rng(1), (8, 8, 3, 3), 0.5, 3)
    data = tensors.encode(codes)
    for damaged in (data + b"\0", data + b"\1\2\3\4\5", data[:4] + b"\1\2\3\4" + data[4:], data[:-5], data[:3]):
        with pytest.raises(ValueError, match="stream"):
            tensors.decode(damaged, codes.shape)


@pytest.fixture
def in_plain_python(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Coder", "bernoulli", "categorical", "uniform"):
        monkeypatch.setattr(ans, name, getattr(portable, name))


CASES = [((16, 12, 3, 3), 0.2, 3), ((40, 30), 0.5, 1e4), ((9,), 1, 1e9), ((7, 2, 1, 2), 0, 1)]


@pytest.fixture(scope="module")
def coded() -> list[bytes]:
    return [tensors.encode(random_codes(np.random.default_rng(5), *case)) for case in CASES]


@pytest.mark.usefixtures("in_plain_python")
def test_plain_python_codes_the_same(coded: list[bytes]) -> None:
    for data, case in zip(coded, CASES, strict=True):
        codes = random_codes(np.random.default_rng(5), *case)
        assert tensors.encode(codes) == data
        np.testing.assert_array_equal(tensors.decode(data, case[0])[0], codes)


@given(st.lists(st.integers(1, 2**32 - 1), max_size=6), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_plain_python_decodes_anything_the_same(words: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    coders = [make(np.array(words, np.uint32)) for make in (ans.Coder, portable.Coder)]
    for _ in range(4):
        shares, chance, bits = rng.random(rng.integers(2, 60)) ** 4 + 1e-9, rng.random(), int(rng.integers(1, 17))
        models = [
            (module.categorical(shares), module.bernoulli(chance), module.uniform(1 << bits))
            for module in (ans, portable)
        ]
        for pair in zip(*models, strict=True):
            first, second = (coder.decode(model, 20) for coder, model in zip(coders, pair, strict=True))
            np.testing.assert_array_equal(first, second)
    assert coders[0].is_empty() == coders[1].is_empty()


# --- floats ----------------------------------------------------------------------------------------------------------

FLOATS = hnp.arrays(np.uint32, st.integers(0, 70), elements=st.integers(0, 2**32 - 1)).map(lambda x: x.view(np.float32))


@given(FLOATS | hnp.arrays(np.float32, st.integers(0, 70), elements=st.floats(-4, 4, width=32)), st.integers(0, 23))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_floats_there_and_back(values: NDArray[np.float32], digits: int) -> None:
    """Any bits at all; rounded ones too."""
    for given_values in (values, floats.shortened(values, digits)):
        data = floats.encode(given_values)
        assert floats.decode(data, len(values)).tobytes() == given_values.tobytes()
        codes = np.arange(len(values) * 3, dtype=np.int32).reshape(-1, 3) % 5
        if len(values):
            found, scale = tensors.decode(tensors.encode(codes, given_values), codes.shape, len(values))
            np.testing.assert_array_equal(found, codes)
            assert scale is not None
            assert scale.tobytes() == given_values.tobytes()


@given(hnp.arrays(np.float32, 20, elements=st.floats(width=32, allow_nan=False)), st.integers(0, 22))
@settings(deadline=None)
def test_shortened_floats_are_the_nearest(values: NDArray[np.float32], digits: int) -> None:
    short = floats.shortened(values, digits)
    assert not (short.view(np.uint32) & ((1 << 23 - digits) - 1))[np.isfinite(values) & (np.abs(values) < 1e38)].any()
    normal = np.isfinite(values) & (np.abs(values) > 1e-37)
    error = np.abs(short[normal].astype(np.float64) - values[normal])
    assert (error <= 2.0 ** -(digits + 1) * np.abs(values[normal]).astype(np.float64)).all()


def test_short_floats_are_short() -> None:
    values = np.random.default_rng(0).normal(size=500).astype(np.float32)
    assert len(floats.encode(floats.shortened(values, 8))) < 12 * 500 / 8
    assert len(floats.encode(values)) < 27 * 500 / 8


@pytest.mark.parametrize("head", [b"", b"\0\1", bytes([24, 1, 0]), bytes([64, 1, 0]), bytes([8, 1, 2])])
def test_damaged_floats_are_refused(head: bytes) -> None:
    with pytest.raises(ValueError, match="head"):
        floats.decode(head, 4)
    data = floats.encode(np.arange(9, dtype=np.float32))
    for count in (0, 8, 10, 60_000):
        with pytest.raises(ValueError, match="end"):
            floats.decode(data, count)
