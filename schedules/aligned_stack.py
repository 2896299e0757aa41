"""Have LLVM align the stack frame of a kernel to whole vectors.

On x86 a frame is aligned to 16 bytes unless LLVM knows, before it allocates registers, of something in it that needs
more. The registers it spills are not known then: vectors of 32 or 64 bytes come to lie across lines of the cache, and
each store and load of one costs two. An object on the stack that is a vector's size and alignment, and that LLVM may
not remove since inline assembly is given its address, settles it.
"""

from __future__ import annotations

import tvm
from tvm import tir

_ABI = 16  # bytes that every frame is aligned to


def align_stack(ib: tvm.tir.ir_builder.IRBuilder, alignment: int) -> None:
    """Emit for the function around; costs an address in a register, wherever it is emitted.

    Args:
        alignment: bytes.
    """
    if alignment <= _ABI:
        return
    name = f"jointsparse_align_stack_{alignment}"
    # TVM inlines what it imports and leaves no symbol of it: every kernel of a library may bring its own.
    function = f"""
        define i32 @{name}() {{
          %object = alloca [{alignment} x i8], align {alignment}
          call void asm sideeffect "", "r"(ptr %object)
          ret i32 0
        }}"""
    ib.scope_attr(tir.const(0, "int32"), "pragma_import_llvm", tir.StringImm(function))
    ib.emit(tir.Evaluate(tir.call_extern("int32", name)))
