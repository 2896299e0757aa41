"""Have LLVM keep an address, or a vector, in a register of its own.

Left to itself it makes base and index part of every instruction that reads there, which costs a plain load nothing. But
a fused multiply-add whose operand's address is the sum of two registers is split before it is issued ("un-lamination")
by Intel's CPUs, which issue four to six operations a cycle: on Emerald Rapids eight of them, with 16 other
instructions, took 7.0 cycles, and 4.7 with the address in one register. Where the other thread of a core is busy, there
is half of that.

Of a vector and a number to be broadcast, both in memory, a multiply-add can read one. LLVM takes the vector, which
leaves a load that broadcasts; with AVX-512 it can broadcast itself, and its operand's address, unlike that of a vector
found by an index, needs no sum.

Inline assembly that does nothing, of which LLVM does not know it, stands between what is kept and those who use it.
"""

from __future__ import annotations

import tvm
from tvm import tir


def hold_address(ib: tvm.tir.ir_builder.IRBuilder, place: tir.PrimExpr) -> tir.PrimExpr:
    """The address of an element of a buffer, in a register. For targets whose CodeFeatures say so."""
    name = "jointsparse_hold_address"
    _import(ib, f'define ptr @{name}(ptr %p) {{ %q = call ptr asm "", "=r,0"(ptr %p) ret ptr %q }}')
    return ib.let("address", tir.call_extern("handle", name, tir.address_of(place)))


def load_behind(ib: tvm.tir.ir_builder.IRBuilder, address: tir.PrimExpr, floats: int, lanes: int) -> tir.PrimExpr:
    """A vector of float32, or one number, so many floats behind an address."""
    name, kind = f"jointsparse_load_{lanes}_behind", f"<{lanes} x float>" if lanes > 1 else "float"
    _import(
        ib,
        f"""
        define {kind} @{name}(ptr %address, i64 %floats) {{
          %place = getelementptr float, ptr %address, i64 %floats
          %value = load {kind}, ptr %place, align 4
          ret {kind} %value
        }}""",
    )
    return tir.call_extern(_dtype(lanes), name, address, tir.const(floats, "int64"))


def hold_vector(ib: tvm.tir.ir_builder.IRBuilder, value: tir.PrimExpr, lanes: int) -> tir.PrimExpr:
    """A vector of float32, in a register of AVX-512."""
    name, kind = f"jointsparse_hold_{lanes}", f"<{lanes} x float>"
    _import(ib, f'define {kind} @{name}({kind} %v) {{ %w = call {kind} asm "", "=v,0"({kind} %v) ret {kind} %w }}')
    return tir.call_extern(_dtype(lanes), name, value)


def _dtype(lanes: int) -> str:
    return f"float32x{lanes}" if lanes > 1 else "float32"


def _import(ib: tvm.tir.ir_builder.IRBuilder, function: str) -> None:
    """Into the code that follows. TVM inlines what it imports and leaves no symbol of it."""
    ib.scope_attr(tir.const(0, "int32"), "pragma_import_llvm", tir.StringImm(function))
