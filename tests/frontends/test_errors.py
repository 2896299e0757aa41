"""InputError: one printable line whatever goes into it."""

from __future__ import annotations

import pytest

from jointsparse.frontends.errors import InputError


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("m.onnx: no such file", "m.onnx: no such file"),
        ("two\nlines\r\n and\ttabs", "two lines and tabs"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07", "\N{REPLACEMENT CHARACTER}]0;title\N{REPLACEMENT CHARACTER}"),
        ("snow \N{SNOWMAN}", "snow \N{SNOWMAN}"),
    ],
)
def test_message_is_one_printable_line(message: str, expected: str) -> None:
    assert str(InputError(message)) == expected
