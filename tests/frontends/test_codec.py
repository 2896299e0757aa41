"""Lossless coders: exact, bounded, and refusing what is damaged."""

from __future__ import annotations

import bz2
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jointsparse.frontends import codec
from jointsparse.frontends.errors import InputError

coders = pytest.mark.parametrize("number", sorted(codec.CODERS))


@coders
@settings(deadline=None)
@given(data=st.binary(max_size=2000))
def test_round_trip(number: int, data: bytes) -> None:
    if number == codec.Floats.number:
        data = data[: len(data) // 4 * 4]
    stream = codec.CODERS[number].encode(data)
    assert codec.decode(number, stream, len(data)) == data
    assert len(data) <= codec.CODERS[number].most(len(stream))


@coders
@pytest.mark.parametrize("wrong", [-1, 1])
def test_another_size_than_declared_is_refused(number: int, wrong: int) -> None:
    data = bytes(range(200)) * 5
    with pytest.raises(InputError):
        codec.decode(number, codec.CODERS[number].encode(data), len(data) + wrong)


def test_the_shorter_stream_wins() -> None:
    noise = np.random.default_rng(0).bytes(100)
    assert codec.encode(noise) == (0, noise)
    assert codec.encode(bytes(1000))[0] == 1


@pytest.mark.parametrize("count", [0, 1, 46_619_999, 46_620_001, 140_000_000])
def test_bound_on_expansion_holds_for_the_most_compressible_data(count: int) -> None:
    stream = bz2.compress(bytes(count))
    assert count <= codec.CODERS[1].most(len(stream))


def test_declared_size_beyond_the_possible_is_refused_before_decoding() -> None:
    with pytest.raises(InputError, match="cannot hold"):
        codec.decode(1, bz2.compress(bytes(10)), 2**40)


def test_a_bomb_is_cut_off_at_the_declared_size() -> None:
    bomb = bz2.compress(bytes(60_000_000))
    tracemalloc.start()
    with pytest.raises(InputError, match="declared"):
        codec.decode(1, bomb, 1_000_000)
    assert tracemalloc.get_traced_memory()[1] < 4_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("stream", [b"", b"BZh9", b"not bzip2", bz2.compress(b"abc") + b"x", bz2.compress(b"abc")[:-1]])
def test_damaged_bzip2_is_refused(stream: bytes) -> None:
    with pytest.raises(InputError):
        codec.decode(1, stream, 3)


def test_unknown_coder_is_refused() -> None:
    with pytest.raises(InputError, match="coder 200"):
        codec.decode(200, b"", 0)
