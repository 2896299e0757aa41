"""Let sparse Winograd convolutions read and write images NCHW where they would be converted for them alone."""

from __future__ import annotations

from dataclasses import asdict, replace

import tvm
from tvm import relay

from ..schedules.attributes import winograd_plan_of
from ..schedules.operators import FROM_TILES, TO_TILES, WINOGRAD, WINOGRAD_ADD
from ..schedules.registration import attributes_of, plain, unpack
from ..schedules.registration import call as call_of
from ..schedules.tile_images import ImageEnds, why_not_images
from .straight_graphs import Rewriter, is_call, rewrite_straight

_WINOGRAD = (WINOGRAD, WINOGRAD_ADD)


@tvm.transform.module_pass(opt_level=0, name="AbsorbConversions")
class AbsorbConversions:
    """A conversion of layout before or behind a Winograd convolution becomes part of it, if nothing else reads what is
    in between.

    A ``@main`` with control flow or functions inside is handed back unchanged.
    """

    def transform_module(self, mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        return rewrite_straight(mod, _WINOGRAD, _Rewriter)


class _Rewriter(Rewriter):
    def call(self, call: relay.Call) -> relay.Expr | None:
        if is_call(call, FROM_TILES) and self.uses[call.args[0]] == 1 and is_call(call.args[0], *_WINOGRAD):
            convolution = self.value(call.args[0])
            if why_not_images(winograd_plan_of(convolution.attrs)) is None:
                return _with_ends(convolution, nchw_result=True)
        value = super().call(call)
        if is_call(value, *_WINOGRAD) and self._is_converted_alone(call):
            image = self.value(call.args[0].args[0])
            return _with_ends(value, image, nchw_data=True)
        return value

    def _is_converted_alone(self, convolution: relay.Call) -> bool:
        """Whether the data comes from a conversion that nothing else needs."""
        data = convolution.args[0]
        if not is_call(data, TO_TILES) or self.uses[data] != 1 or plain(data.attrs["offset"]) != (0, 0):
            return False
        return why_not_images(winograd_plan_of(convolution.attrs)) is None


def _with_ends(convolution: relay.Call, data: relay.Expr | None = None, **changes: bool) -> relay.Call:
    ends = replace(unpack(ImageEnds, convolution.attrs), **changes)
    arguments = [convolution.args[0] if data is None else data, *convolution.args[1:]]
    return call_of(convolution.op.name, arguments, **{**attributes_of(convolution), **asdict(ends)})
