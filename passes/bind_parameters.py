"""Parameters become constants, so that the standard passes can fold them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tvm
from tvm import relay

from .convolutions import MAIN, find_convolutions, weight_parameter


def convolution_weights(mod: tvm.IRModule) -> set[str]:
    """Names of the parameters that convolutions of ``@main`` take as weights."""
    names = (weight_parameter(found.call) for found in find_convolutions(mod) if found.elsewhere is None)
    return {name for name in names if name is not None}


@tvm.transform.module_pass(opt_level=0, name="BindParameters")
class BindParameters:
    """Bind the parameters of ``@main`` as constants.

    Weights of convolutions can stay named: their name is what the plan calls a layer by, and what a Winograd threshold
    refers to, and the threshold speaks of the weight before BatchNorm was folded into it.

    Args:
        params: by name, tvm NDArray or numpy array; names that ``@main`` does not have are passed over.
        keep_convolution_weights: leave these named.
    """

    def __init__(self, params: Mapping[str, Any], *, keep_convolution_weights: bool = False) -> None:
        self.params = params
        self.keep_convolution_weights = keep_convolution_weights

    def transform_module(self, mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        if not _has_main(mod):
            return mod
        keep = convolution_weights(mod) if self.keep_convolution_weights else set()
        names = {var.name_hint for var in mod[MAIN].params}
        bound = {name: value for name, value in self.params.items() if name in names and name not in keep}
        if not bound:
            return mod
        mod = mod.clone()
        mod[MAIN] = relay.build_module.bind_params_by_name(mod[MAIN], bound)
        return mod


def _has_main(mod: tvm.IRModule) -> bool:
    return MAIN in {var.name_hint for var in mod.get_global_vars()} and isinstance(mod[MAIN], relay.Function)
