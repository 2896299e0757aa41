"""Targets as typed: what is refused, and that the refusal is one line that names the fault."""

from __future__ import annotations

import json
import platform

import pytest

from jointsparse.frontends.errors import InputError
from jointsparse.frontends.target_strings import architecture, find_compiler, host_target, parse_target

ARM = "llvm -mtriple=aarch64-linux-gnu -mcpu=cortex-a72"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        ("   ", "empty"),
        ("bogus", "bogus"),
        ("llvm -no-such-option=1", "no-such-option"),
        ("llvm mcpu=generic", "mcpu=generic"),
        ("llvm -mcpu=nonsense", "nonsense"),
        ("llvm -mcpu", "-mcpu=1"),
        ("llvm -mtriple=vax-dec-vms", "vax-dec-vms"),
        ("llvm -mtriple=aarch64-linux-gnu -mcpu=skylake", "skylake"),
        ('{"kind": "llvm", "mcpu": "nonsense"}', "nonsense"),
        ('{"kind": 3}', "kind"),
        ("[1, 2]", "[1, 2]"),
    ],
)
def test_refused_in_one_line(text: str, said: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError) as caught:
        parse_target(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_json_inline_and_in_a_file(tmp_path) -> None:
    fields = {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a72"}
    file = tmp_path / "board.json"
    file.write_text(json.dumps(fields))
    assert str(parse_target(json.dumps(fields))) == str(parse_target(str(file))) == str(parse_target(ARM))


def test_file_that_is_no_text(tmp_path) -> None:
    file = tmp_path / "board.json"
    file.write_bytes(b"\x7fELF\xff\xfe")
    with pytest.raises(InputError, match=r"board\.json: not readable as text"):
        parse_target(str(file))


def test_longer_than_a_file_name() -> None:
    features = ",".join(["+neon", "+fp-armv8"] * 40)
    target = parse_target(f"{ARM} -mattr={features}")
    assert len(str(target)) > 255
    assert architecture(target) == "aarch64"


def test_tag() -> None:
    assert architecture(parse_target("raspberry-pi/4b-aarch64")) == "aarch64"


def test_host_target_is_understood_and_linked_by_the_host() -> None:
    target = parse_target(host_target())
    assert target.attrs["mcpu"]
    assert architecture(target) == {"arm64": "aarch64"}.get(platform.machine(), platform.machine())
    assert find_compiler(target, None) is None


def test_foreign_target_needs_a_compiler() -> None:
    other = ARM if platform.machine() == "x86_64" else "llvm -mtriple=x86_64-linux-gnu"
    with pytest.raises(InputError, match="--cross-compiler"):
        find_compiler(parse_target(other), None)


def test_compiler_must_exist() -> None:
    target = parse_target(ARM)
    assert find_compiler(target, "sh") == "sh"
    with pytest.raises(InputError, match="no-such-compiler"):
        find_compiler(target, "no-such-compiler")


def test_host_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(InputError, match=r"install g\+\+"):
        find_compiler(parse_target("llvm"), None)
