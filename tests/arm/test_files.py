"""Files decode to the same bits on aarch64, where codes are coded in plain Python, and are written the same."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ARM = ROOT / "build" / "arm"

pytestmark = pytest.mark.arm


def run_python(*arguments: str) -> str:
    """Standard output of the emulated Python."""
    assert (ARM / "ready").exists(), "make test-arm sets up what these tests need"
    site = str(ARM / "site")
    command = ["qemu-aarch64", "-L", str(ARM / "root"), "-E", f"PYTHONPATH={site}", str(ARM / "python")]
    environment = os.environ | {"PYTHONPATH": site, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_it_is_another_machine_with_the_coder_in_python() -> None:
    script = """
import platform
from jointsparse.frontends.coding import ans, portable
print(platform.machine(), ans.Coder is portable.Coder)
"""
    assert run_python("-c", script).split() == ["aarch64", "True"]


def test_golden_files() -> None:
    out = run_python("-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "-q", "tests/frontends/test_golden.py")
    assert " passed" in out
    assert "skipped" not in out
