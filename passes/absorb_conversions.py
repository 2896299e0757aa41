"""Let sparse Winograd convolutions read and write images NCHW."""

from __future__ import annotations

from dataclasses import asdict, replace

import tvm
from tvm import relay

from ..schedules.attributes import winograd_plan_of
from ..schedules.operators import FROM_TILES, TO_TILES, WINOGRAD, WINOGRAD_ADD
from ..schedules.registration import attributes_of, plain, unpack
from ..schedules.registration import call as call_of
from ..schedules.tile_images import ImageEnds, prefers_images, why_not_images
from .straight_graphs import Rewriter, is_call, rewrite_straight

_WINOGRAD = (WINOGRAD, WINOGRAD_ADD)


@tvm.transform.module_pass(opt_level=0, name="AbsorbConversions")
class AbsorbConversions:
    """Conversions of layout before or behind a Winograd convolution become part of it.

    A ``@main`` with control flow or functions inside is handed back unchanged.

    Args:
        preferred: only where a convolution is faster with images NCHW, but there even if others read what was
            converted; otherwise where nothing else does, so that the conversion is gone.
    """

    def __init__(self, *, preferred: bool = False) -> None:
        self.preferred = preferred

    def transform_module(self, mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        return rewrite_straight(mod, _WINOGRAD, lambda nodes: _Rewriter(nodes, self.preferred))


class _Rewriter(Rewriter):
    def __init__(self, nodes: list[relay.Expr], preferred: bool) -> None:
        self.preferred = preferred
        super().__init__(nodes)

    def call(self, call: relay.Call) -> relay.Expr | None:
        if is_call(call, FROM_TILES) and is_call(call.args[0], *_WINOGRAD) and self.uses[call.args[0]] == 1:
            return self._with_result(call.args[0]) or super().call(call)
        value = super().call(call)
        if value is not None and is_call(call, *_WINOGRAD) and self._is_to_absorb(call, call.args[0]):
            image = self.value(call.args[0].args[0])
            return _with_ends(value, [image, *value.args[1:]], nchw_data=True)
        return value

    def _with_result(self, call: relay.Call) -> relay.Call | None:
        """A convolution that writes NCHW, if it can: its residual has to be there like that."""
        if not self._is_possible(call):
            return None
        convolution = self.value(call)
        arguments = list(convolution.args)
        if is_call(call, WINOGRAD_ADD):
            if not self._is_to_absorb(call, call.args[-1]):
                return None
            arguments[-1] = self.value(call.args[-1].args[0])
        return _with_ends(convolution, arguments, nchw_result=True)

    def _is_to_absorb(self, convolution: relay.Call, source: relay.Expr) -> bool:
        """Whether a convolution is to read, as data or residual, what this converts into tiles."""
        is_conversion = is_call(source, TO_TILES) and plain(source.attrs["offset"]) == (0, 0)
        return is_conversion and (self.preferred or self.uses[source] == 1) and self._is_possible(convolution)

    def _is_possible(self, convolution: relay.Call) -> bool:
        plan = winograd_plan_of(convolution.attrs)
        return prefers_images(plan) if self.preferred else why_not_images(plan) is None


def _with_ends(convolution: relay.Call, arguments: list[relay.Expr], **changes: bool) -> relay.Call:
    ends = replace(unpack(ImageEnds, convolution.attrs), **changes)
    return call_of(convolution.op.name, arguments, **{**attributes_of(convolution), **asdict(ends)})
