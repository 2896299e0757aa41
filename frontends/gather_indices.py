"""Gather of constant channels, as TVM's importer leaves it, in plain form.

The importer guards every index against being negative, at run time and by the shape of the data: a chain of operators
that constant folding has to compile, one by one, for each Gather. A network of a hundred of them took minutes.
"""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relay
from tvm.relay.dataflow_pattern import DFPatternCallback, is_constant, is_op, rewrite, wildcard


def plain(mod: tvm.IRModule) -> tvm.IRModule:
    """``@main`` without guards of indices that are constant and not negative; the module is changed."""
    mod["main"] = rewrite(_Guarded(), mod["main"])
    return mod


class _Guarded(DFPatternCallback):
    def __init__(self) -> None:
        super().__init__()
        self.negative, self.indices = is_constant(), is_constant()
        guarded = is_op("where")(self.negative, wildcard(), self.indices)
        self.data = wildcard()
        self.pattern = is_op("take")(self.data, guarded)

    def callback(self, pre: relay.Call, post: relay.Call, found: tvm.ir.container.Map) -> relay.Expr:
        data, negative, indices = (found[part][0] for part in (self.data, self.negative, self.indices))
        if np.any(negative.data.numpy()):
            return post
        return relay.Call(post.op, [data, indices], post.attrs, post.type_args, post.span)
