"""Give sparse convolutions the bias, the residual and the activation that follow them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relay

from ..schedules.attributes import pooling_of, winograd_plan_of
from ..schedules.constructors import into_tiles, out_of_tiles
from ..schedules.epilogues import RELU, Activation
from ..schedules.operators import DIRECT, DIRECT_ADD, FROM_TILES, WINOGRAD, WINOGRAD_ADD
from ..schedules.registration import attributes_of, unpack
from ..schedules.registration import call as call_of
from ..schedules.tile_images import ImageEnds
from .straight_graphs import Rewriter, is_call, rebuilt, rewrite_straight

_ADDING = {DIRECT: DIRECT_ADD, WINOGRAD: WINOGRAD_ADD}
_ALL = (*_ADDING, *_ADDING.values())


@tvm.transform.module_pass(opt_level=0, name="AbsorbEpilogues")
class AbsorbEpilogues:
    """What a sparse operator can do to its result becomes part of it, unless something else reads the result as it is.

    A ``@main`` with control flow or functions inside is handed back unchanged.
    """

    def transform_module(self, mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        return rewrite_straight(mod, _ALL, _Rewriter)


class _Rewriter(Rewriter):
    def __init__(self, nodes: list[relay.Expr]) -> None:
        # By node, the sparse convolution that its value is the result of, which can still take something on.
        self.open: dict[relay.Expr, relay.Call] = {}
        super().__init__(nodes)

    def call(self, call: relay.Call) -> relay.Expr:
        convolution = self._with_bias(call) or self._with_residual(call) or self._with_activation(call)
        if convolution is not None:
            self._enter(call, convolution)
            return _result(convolution)
        value = rebuilt(call, [self.value(argument) for argument in call.args])
        made = value.args[0] if is_call(value, FROM_TILES) and self.uses[call.args[0]] == 1 else value
        if is_call(made, *_ALL):
            self._enter(call, made)
        return value

    def _enter(self, node: relay.Expr, convolution: relay.Call) -> None:
        if self.uses[node] == 1 and not unpack(Activation, convolution.attrs).activation:
            self.open[node] = convolution

    def _with_bias(self, call: relay.Call) -> relay.Call | None:
        for node, other in _either_way(call, "add", "nn.bias_add"):
            convolution = self.open.get(node)
            if convolution is None:
                continue
            place = _place(convolution, "bias")
            bias = convolution.args[place]
            added = _by_channel(call, other, bias.data.shape[0])
            if added is not None:
                arguments = list(convolution.args)
                arguments[place] = relay.const(bias.data.numpy() + added)
                return rebuilt(convolution, arguments)
        return None

    def _with_residual(self, call: relay.Call) -> relay.Call | None:
        pairs = [(self.open[node], node, other) for node, other in _either_way(call, "add") if node in self.open]
        # Winograd first: its result stays in tiles, and is likely to be read there.
        for convolution, node, other in sorted(pairs, key=lambda pair: not is_call(pair[0], WINOGRAD)):
            if not is_call(convolution, *_ADDING) or node.checked_type != other.checked_type or _pools(convolution):
                continue
            residual = self.value(other)
            if is_call(convolution, WINOGRAD) and not unpack(ImageEnds, convolution.attrs).nchw_result:
                shape = [int(size) for size in other.checked_type.shape]
                residual = into_tiles(residual, shape, winograd_plan_of(convolution.attrs).layout)
            return call_of(_ADDING[convolution.op.name], [*convolution.args, residual], **attributes_of(convolution))
        return None

    def _with_activation(self, call: relay.Call) -> relay.Call | None:
        activation = activation_of(call)
        convolution = self.open.get(call.args[0]) if activation is not None else None
        if activation is None or convolution is None:
            return None
        return call_of(convolution.op.name, convolution.args, **{**attributes_of(convolution), **asdict(activation)})


def activation_of(call: relay.Call) -> Activation | None:
    """What a call applies to each element, if a sparse operator can."""
    if is_call(call, "nn.relu"):
        return RELU
    if is_call(call, "clip"):
        return Activation("clip", float(call.attrs.a_min), float(call.attrs.a_max))
    if is_call(call, "nn.leaky_relu"):
        return Activation("leaky_relu", float(call.attrs.alpha))
    return None


def _pools(convolution: relay.Call) -> bool:
    """Whether this pools, before which a residual would be added."""
    return is_call(convolution, DIRECT) and pooling_of(convolution.attrs) is not None


def _result(convolution: relay.Call) -> relay.Expr:
    """In NCHW."""
    if is_call(convolution, DIRECT, DIRECT_ADD) or unpack(ImageEnds, convolution.attrs).nchw_result:
        return convolution
    return out_of_tiles(convolution, winograd_plan_of(convolution.attrs).layout)


def _place(call: relay.Call, argument: str) -> int:
    """Of a named argument among all."""
    return [str(info.name) for info in call.op.arguments].index(argument)


def _either_way(call: relay.Call, *names: str) -> Sequence[tuple[relay.Expr, relay.Expr]]:
    """The operands of one of these operators, in both orders."""
    if not is_call(call, *names):
        return []
    return [(call.args[0], call.args[1]), (call.args[1], call.args[0])]


def _by_channel(call: relay.Call, constant: relay.Expr, channels: int) -> NDArray[np.float32] | None:
    """The constant that is added to each channel, if it is one number for all its pixels."""
    if not isinstance(constant, relay.Constant):
        return None
    value = constant.data.numpy()
    if call.op.name == "nn.bias_add":
        return value if int(call.attrs.axis) == 1 else None
    shape = (1,) * (4 - value.ndim) + value.shape
    if shape not in ((1, channels, 1, 1), (1, 1, 1, 1)):
        return None
    return np.broadcast_to(value.reshape(-1), channels)
