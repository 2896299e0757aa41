"""Make TVM 0.19 generate code for float and vector `let`s with LLVM 21 and newer.

TVM describes every `let` variable to the debugger with ``llvm.dbg.declare``, which asks for an address; newer LLVM
rejects the module when the variable is a float or a vector ("location of #dbg_declare must be a pointer or int").
TVM's common subexpression elimination makes such variables out of any kernel. The debug information is of no use
here, so the function that attaches it, ``CodeGenLLVM::AddDebugInformation(llvm::Value*, const tir::Var&,
llvm::Instruction*)``, is made to return at once, in this process. Nothing on disk is touched.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import warnings

import tvm
from tvm._ffi.base import _LIB

_SYMBOL = "_ZN3tvm7codegen11CodeGenLLVM19AddDebugInformationEPN4llvm5ValueERKNS_3tir3VarEPNS2_11InstructionE"
_TVM_VERSION = "0.19.0"
# Seen with 21 and 22. LLVM 19 brought the debug records that the message speaks of; before it, nothing is touched.
_FIRST_BAD_LLVM = 19
_RETURN = {"x86_64": b"\xc3", "aarch64": b"\xc0\x03\x5f\xd6", "arm64": b"\xc0\x03\x5f\xd6"}
_MAP_FIXED = 0x10  # Linux, on every processor of _RETURN; the module mmap does not name it
_applied = False


def needed() -> bool:
    """Whether this TVM and this LLVM disagree on debug information."""
    if not tvm.__version__.startswith(_TVM_VERSION) or tvm.get_global_func("target.llvm_version_major", True) is None:
        return False
    return tvm.target.codegen.llvm_version_major() >= _FIRST_BAD_LLVM


def apply() -> bool:
    """Disarm the function in this process, once; True if it is disarmed.

    False, with nothing changed, when it is not needed. Also, with a warning, when the library does not export the
    function, on a processor that is not known here, and when the system is not Linux or forbids changing code.
    """
    global _applied
    if not _applied and needed():
        _applied = _return_at_once(_SYMBOL)
        if not _applied:
            warnings.warn(
                "TVM's debug information could not be switched off in this process: where a kernel fails to compile "
                "with 'location of #dbg_declare must be a pointer or int', use TVM with LLVM 18 or older",
                RuntimeWarning,
                stacklevel=2,
            )
    return _applied


def _return_at_once(symbol: str) -> bool:
    code = _RETURN.get(platform.machine())
    try:
        address = ctypes.cast(getattr(_LIB, symbol), ctypes.c_void_p).value
    except AttributeError:
        return False
    if code is None or address is None:
        return False
    return _write_code(address, code)


def _write_code(address: int, code: bytes) -> bool:
    """Put a changed copy of the pages in the place of the pages.

    The system swaps them in one step or refuses, so that the code stays executable throughout, and no page is ever
    writable and executable: that is forbidden under systemd's MemoryDenyWriteExecute and PR_SET_MDWE.
    """
    start = address - address % mmap.PAGESIZE
    end = -(-(address + len(code)) // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = bytearray(ctypes.string_at(start, end - start))
    pages[address - start : address - start + len(code)] = code
    try:
        copy = os.fdopen(os.memfd_create("jointsparse"), "wb")
    except (AttributeError, OSError):  # AttributeError: not Linux
        return False
    map_pages = ctypes.CDLL(None).mmap
    map_pages.restype = ctypes.c_void_p
    map_pages.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    with copy:
        copy.write(pages)
        copy.flush()
        flags = mmap.MAP_PRIVATE | _MAP_FIXED
        return map_pages(start, len(pages), mmap.PROT_READ | mmap.PROT_EXEC, flags, copy.fileno(), 0) == start
