"""Have LLVM give an address a register of its own.

Left to itself it makes base and index part of every instruction that reads there, which costs a plain load nothing. But
a fused multiply-add whose operand's address is the sum of two registers is split before it is issued ("un-lamination")
by Intel's CPUs, which issue four to six operations a cycle: on Emerald Rapids eight of them, with 16 other
instructions, took 7.0 cycles, and 4.7 with the address in one register. Where the other thread of a core is busy, there
is half of that. Inline assembly that does nothing, of which LLVM does not know it, stands between the sum and those who
read.
"""

from __future__ import annotations

import tvm
from tvm import tir

_HOLD = "jointsparse_hold_address"


def hold_address(ib: tvm.tir.ir_builder.IRBuilder, place: tir.PrimExpr) -> tir.PrimExpr:
    """The address of an element of a buffer, in a register. For targets whose CodeFeatures say so."""
    _import(ib, f'define ptr @{_HOLD}(ptr %p) {{ %q = call ptr asm "", "=r,0"(ptr %p) ret ptr %q }}')
    return ib.let("address", tir.call_extern("handle", _HOLD, tir.address_of(place)))


def load_behind(ib: tvm.tir.ir_builder.IRBuilder, address: tir.PrimExpr, floats: int, lanes: int) -> tir.PrimExpr:
    """A vector of float32 so many floats behind an address."""
    name, vector = f"jointsparse_load_{lanes}_behind", f"<{lanes} x float>"
    _import(
        ib,
        f"""
        define {vector} @{name}(ptr %address, i64 %floats) {{
          %place = getelementptr float, ptr %address, i64 %floats
          %value = load {vector}, ptr %place, align 4
          ret {vector} %value
        }}""",
    )
    return tir.call_extern(f"float32x{lanes}", name, address, tir.const(floats, "int64"))


def _import(ib: tvm.tir.ir_builder.IRBuilder, function: str) -> None:
    """Into the code that follows. TVM inlines what it imports and leaves no symbol of it."""
    ib.scope_attr(tir.const(0, "int32"), "pragma_import_llvm", tir.StringImm(function))
