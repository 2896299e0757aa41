"""Importing, pruning and running small networks, for the tests of the passes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import tvm
from numpy.typing import NDArray
from torch import nn
from tvm import relay
from tvm.contrib import graph_executor

from jointsparse.passes import sparsify
from jointsparse.passes.plan import Plan
from tests.host import HOST
from tests.reference import relative_rms

# fp32 against fp64, relative RMS. F(4x4) loses about a digit; chains of layers accumulate.
TOLERANCE = {"dense": 5e-6, "spatial": 5e-6, "winograd": 5e-5, "auto": 5e-5}


def import_torch(net: nn.Module, shape: tuple[int, ...]) -> tuple[tvm.IRModule, dict[str, Any]]:
    """Relay of a network in evaluation mode, and its parameters by their names in the network."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated, and what TVM's importer reads
        traced = torch.jit.trace(net.eval().float(), torch.zeros(shape))
    return relay.frontend.from_pytorch(traced, [("x", shape)], preserve_pytorch_scopes=True)


def in_fp64(net: nn.Module, x: NDArray[Any]) -> NDArray[np.float64]:
    """The network's output in fp64."""
    with torch.no_grad():
        output = net.eval().double()(torch.from_numpy(x.astype(np.float64))).numpy()
    net.float()
    return output


def data(shape: tuple[int, ...], seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def build_and_run(mod: tvm.IRModule, params: Mapping[str, Any], x: NDArray[Any], target: str = HOST) -> NDArray[Any]:
    """What a user does with the result of sparsify, no more."""
    with tvm.transform.PassContext(opt_level=3):
        library = relay.build(mod, target=target, params=dict(params))
    executor = graph_executor.GraphModule(library["default"](tvm.cpu()))
    executor.set_input("x", x)
    executor.run()
    return executor.get_output(0).numpy()


def prune(net: nn.Module, sparsity: float) -> nn.Module:
    """Zero the smallest weights of each convolution, in place."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight.data
            count = int(sparsity * weight.numel())
            if count:
                weight[weight.abs() <= weight.abs().flatten().kthvalue(count).values] = 0
    return net


def settle(net: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights, and BatchNorm statistics as training leaves them: scales of both signs, offsets, variances."""
    torch.manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.weight.data[::3] *= -1
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return net.eval()


def check_domain(net: nn.Module, shape: tuple[int, ...], domain: str, target: str = HOST, **options: Any) -> Plan:
    """Sparsify for one domain, build, run and compare with fp64."""
    mod, params = import_torch(net, shape)
    x = data(shape)
    result, left, plan = sparsify(mod, params, target, domain, **options)
    assert left == {}
    assert relative_rms(build_and_run(result, left, x, target), in_fp64(net, x)) < TOLERANCE[domain]
    return plan
