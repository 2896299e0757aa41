"""Have LLVM keep an address, or a vector, in a register of its own.

Left to itself it makes base and index part of every instruction that reads there, which costs a plain load nothing. But
a fused multiply-add whose operand's address is the sum of two registers is split before it is issued ("un-lamination")
by Intel's CPUs, which issue four to six operations a cycle: on Emerald Rapids eight of them, with 16 other
instructions, took 7.0 cycles, and 4.7 with the address in one register. Where the other thread of a core is busy, there
is half of that. Measured there only, with AVX-512 and AVX2; elsewhere it costs an instruction for each weight.

Of a vector and a number to be broadcast, both in memory, a multiply-add can read one. LLVM takes the vector, which
leaves a load that broadcasts; with AVX-512 it can broadcast itself, and its operand's address, unlike that of a vector
found by an index, needs no sum.

Inline assembly that does nothing, of which LLVM does not know it, stands between what is kept and those who use it.
"""

from __future__ import annotations

import tvm
from tvm import tir

_HOLD_ADDRESS = "jointsparse_hold_address"
_FUNCTIONS = """
define ptr @jointsparse_hold_address(ptr %p) {{
  %q = call ptr asm "", "=r,0"(ptr %p)
  ret ptr %q
}}
define float @jointsparse_load_1(ptr %address, i64 %floats) {{
  %place = getelementptr float, ptr %address, i64 %floats
  %value = load float, ptr %place, align 4
  ret float %value
}}
define <{lanes} x float> @jointsparse_load_{lanes}(ptr %address, i64 %floats) {{
  %place = getelementptr float, ptr %address, i64 %floats
  %value = load <{lanes} x float>, ptr %place, align 4
  ret <{lanes} x float> %value
}}"""
_HOLD_VECTOR = """
define <{lanes} x float> @jointsparse_hold_{lanes}(<{lanes} x float> %v) {{
  %w = call <{lanes} x float> asm "", "=v,0"(<{lanes} x float> %v)
  ret <{lanes} x float> %w
}}"""


def import_functions(ib: tvm.tir.ir_builder.IRBuilder, lanes: int, *, vectors: bool) -> None:
    """What the others call, once for a whole kernel, before anything else of it: every import costs LLVM a look through
    all that it has. TVM inlines what it imports and leaves no symbol of it.

    Args:
        lanes: of the kernel's vectors, more than one. vectors: whether they can be held, as AVX-512's can.
    """
    text = (_FUNCTIONS + (_HOLD_VECTOR if vectors else "")).format(lanes=lanes)
    ib.scope_attr(tir.const(0, "int32"), "pragma_import_llvm", tir.StringImm(text))


def hold_address(ib: tvm.tir.ir_builder.IRBuilder, place: tir.BufferLoad) -> tir.PrimExpr:
    """The address of an element of a buffer, in a register."""
    return ib.let("address", tir.call_extern("handle", _HOLD_ADDRESS, tir.address_of(place)))


def load_behind(address: tir.PrimExpr, floats: int, lanes: int) -> tir.PrimExpr:
    """A vector of float32, or one number, so many floats behind an address."""
    return tir.call_extern(_dtype(lanes), f"jointsparse_load_{lanes}", address, tir.const(floats, "int64"))


def hold_vector(value: tir.PrimExpr, lanes: int) -> tir.PrimExpr:
    """A vector of float32, in a register."""
    return tir.call_extern(_dtype(lanes), f"jointsparse_hold_{lanes}", value)


def _dtype(lanes: int) -> str:
    return f"float32x{lanes}" if lanes > 1 else "float32"
