"""The cure for LLVM's refusal of float and vector `let`s, each time in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from jointsparse.schedules import llvm_workaround

PROGRAM = """
import numpy as np, tvm
from tvm.script import tir as T

@T.prim_func
def lets(a: T.Buffer((64,), "float32"), b: T.Buffer((64,), "float32")):
    T.func_attr({"global_symbol": "lets"})
    for i in range(16):
        x = a[i] * T.float32(2)
        b[i] = x * x + x
    for i in range(12):
        v = a[T.ramp(i * 4 + 16, 1, 4)]
        b[T.ramp(i * 4 + 16, 1, 4)] = v * v

library = tvm.build(lets, target="llvm")
a, b = tvm.nd.array(np.arange(64, dtype="float32")), tvm.nd.array(np.zeros(64, "float32"))
library(a, b)
x = np.arange(64.0)
np.testing.assert_array_equal(b.numpy(), np.where(x < 16, 4 * x * x + 2 * x, x * x))
"""

CHECKED = "from jointsparse.schedules import llvm_workaround\nassert llvm_workaround.apply()\n"

needed = pytest.mark.skipif(not llvm_workaround.needed(), reason="TVM and LLVM agree here")


def run(tmp_path, program: str) -> subprocess.CompletedProcess:
    file = tmp_path / "program.py"  # TVMScript reads its own source
    file.write_text(program)
    return subprocess.run([sys.executable, str(file)], capture_output=True, text=True)


@needed
def test_without_it_llvm_refuses(tmp_path) -> None:
    result = run(tmp_path, PROGRAM)
    assert result.returncode != 0
    assert "dbg_declare" in result.stderr


@needed
def test_with_it_the_program_builds_and_is_right(tmp_path) -> None:
    result = run(tmp_path, CHECKED + PROGRAM)
    assert result.returncode == 0, result.stderr


def test_importing_the_operators_applies_it(tmp_path) -> None:
    result = run(tmp_path, "import jointsparse.schedules.operators\n" + PROGRAM)
    assert result.returncode == 0, result.stderr


@needed
def test_twice_is_once(tmp_path) -> None:
    result = run(tmp_path, CHECKED + CHECKED + PROGRAM)
    assert result.returncode == 0, result.stderr


@needed
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_code_pages_are_executable_and_not_writable_afterwards(tmp_path) -> None:
    program = CHECKED + (
        "maps = [line.split() for line in open('/proc/self/maps') if 'libtvm.so' in line or 'jointsparse' in line]\n"
        "assert maps and not any('w' in line[1] and 'x' in line[1] for line in maps), maps\n"
        "import ctypes\n"
        "from tvm._ffi.base import _LIB\n"
        "at = ctypes.cast(getattr(_LIB, llvm_workaround._SYMBOL), ctypes.c_void_p).value\n"
        "[page] = [l for l in maps if int(l[0].split('-')[0], 16) <= at < int(l[0].split('-')[1], 16)]\n"
        "assert page[1].startswith('r-x') and 'memfd' in page[5], page\n"
    )
    result = run(tmp_path, program)
    assert result.returncode == 0, result.stderr


# What systemd's MemoryDenyWriteExecute=yes asks for a service; kernels before 6.3 do not know it.
DENIED = """
import ctypes, sys
PR_SET_MDWE, REFUSE_EXEC_GAIN = 65, 1
if ctypes.CDLL(None).prctl(PR_SET_MDWE, REFUSE_EXEC_GAIN, 0, 0, 0) != 0:
    sys.exit(77)
"""

# No just-in-time compilation: LLVM's own is what such a process may not do.
AS_A_FILE = PROGRAM.replace(
    'library = tvm.build(lets, target="llvm")\n',
    "import os, tempfile\n"
    "path = os.path.join(tempfile.mkdtemp(), 'lets.so')\n"
    "tvm.build(lets, target='llvm').export_library(path)\n"
    "library = tvm.runtime.load_module(path)\n",
)


@needed
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a Linux system call")
def test_where_pages_written_may_never_be_executed(tmp_path) -> None:
    result = run(tmp_path, DENIED + "import jointsparse.schedules.operators\n" + CHECKED + AS_A_FILE)
    if result.returncode == 77:
        pytest.skip("this kernel cannot deny it")
    assert result.returncode == 0, result.stderr


@needed
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="without it there is no copy that could fail")
def test_where_the_copy_fails_nothing_is_changed_and_a_line_says_so(tmp_path) -> None:
    program = """
import resource, warnings
import numpy as np, tvm
from tvm import relay
from jointsparse.schedules import llvm_workaround

_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (0, most))
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    assert not llvm_workaround.apply()
resource.setrlimit(resource.RLIMIT_NOFILE, (64, most))
[told] = told
assert "\\n" not in str(told.message) and "could not be switched off" in str(told.message)
x = relay.var("x", shape=(1, 4, 8, 8))
body = relay.nn.conv2d(x, relay.const(np.ones((4, 4, 3, 3), "float32")))
relay.build(tvm.IRModule.from_expr(body), "llvm")
"""
    result = run(tmp_path, program)
    assert result.returncode == 0, result.stderr


def test_a_library_without_the_function_is_left_alone() -> None:
    assert llvm_workaround._return_at_once("no_such_function_in_any_library") is False


def test_other_versions_of_tvm_are_left_alone(tmp_path) -> None:
    program = (
        "import tvm\n"
        "tvm.__version__ = '0.18.0'\n"
        "from jointsparse.schedules import llvm_workaround\n"
        "assert not llvm_workaround.needed() and not llvm_workaround.apply()\n"
    )
    result = run(tmp_path, program)
    assert result.returncode == 0, result.stderr
