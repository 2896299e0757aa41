"""Give sparse direct convolutions the max pooling that follows them."""

from __future__ import annotations

import tvm
from tvm import relay

from ..schedules.attributes import direct_plan_of, pooled_attributes, pooling_of
from ..schedules.epilogues import Activation
from ..schedules.max_pool import PoolGeometry
from ..schedules.operators import DIRECT, MAX_POOL
from ..schedules.pooled_direct import why_not_pooled
from ..schedules.registration import attributes_of, unpack
from ..schedules.registration import call as call_of
from .straight_graphs import Rewriter, is_call, rewrite_straight


@tvm.transform.module_pass(opt_level=0, name="AbsorbPooling")
class AbsorbPooling:
    """Where nothing else reads the result, and where the convolution gains by it.

    A ``@main`` with control flow or functions inside is handed back unchanged.
    """

    def transform_module(self, mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        return rewrite_straight(mod, (MAX_POOL,), _Rewriter)


class _Rewriter(Rewriter):
    def call(self, call: relay.Call) -> relay.Expr | None:
        if is_call(call, MAX_POOL) and is_call(call.args[0], DIRECT) and self.uses[call.args[0]] == 1:
            convolution, pool = self.value(call.args[0]), unpack(PoolGeometry, call.attrs)
            attrs = convolution.attrs
            takes = pooling_of(attrs) is None
            if takes and why_not_pooled(direct_plan_of(attrs), pool, unpack(Activation, attrs)) is None:
                return call_of(DIRECT, convolution.args, **pooled_attributes(attributes_of(convolution), pool))
        return super().call(call)
