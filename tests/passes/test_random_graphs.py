"""Property: whatever the graph of convolutions, every domain computes what fp64 computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.passes.relay_nets import check_domain, prune, settle

ACTIVATIONS = {"none": nn.Identity, "relu": nn.ReLU, "sigmoid": nn.Sigmoid, "leaky": lambda: nn.LeakyReLU(0.2)}


@dataclass(frozen=True)
class Step:
    """A convolution, what follows it, and whether its input is added to its output where shapes allow."""

    outputs: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    pad: tuple[int, int, int, int]
    grouped: bool
    bias: bool
    norm: bool
    activation: str
    residual: bool


class Graph(nn.Module):
    """The steps one after the other, each concatenated with nothing but added to its input where it can be."""

    def __init__(self, inputs: int, steps: list[Step]) -> None:
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleList()
        for step in steps:
            groups = next(g for g in (inputs, 3, 2, 1) if inputs % g == 0 and step.outputs % g == 0)
            convolution = nn.Conv2d(
                inputs,
                step.outputs,
                step.kernel,
                step.stride,
                dilation=step.dilation,
                groups=groups if step.grouped else 1,
                bias=step.bias,
            )
            norm = nn.BatchNorm2d(step.outputs) if step.norm else nn.Identity()
            left, right, top, bottom = step.pad
            self.layers.append(
                nn.Sequential(
                    nn.ZeroPad2d((left, right, top, bottom)), convolution, norm, ACTIVATIONS[step.activation]()
                )
            )
            inputs = step.outputs

    def forward(self, x: Tensor) -> Tensor:
        for step, layer in zip(self.steps, self.layers, strict=True):
            y = layer(x)
            x = x + y if step.residual and x.shape == y.shape else y
        return x


def pairs(values: list[int]) -> st.SearchStrategy[tuple[int, int]]:
    """Mostly square, as convolutions are."""
    return st.sampled_from(values).flatmap(lambda v: st.tuples(st.just(v), st.sampled_from([v, v, *values])))


steps = st.builds(
    Step,
    outputs=st.sampled_from([1, 4, 6, 9, 16]),
    kernel=st.sampled_from([(3, 3), (3, 3), (5, 5), (1, 1)]) | pairs([1, 2, 3, 5]),
    stride=st.just((1, 1)) | pairs([1, 2, 3]),
    dilation=st.just((1, 1)) | pairs([1, 2]),
    pad=st.just((1, 1, 1, 1)) | st.tuples(*[st.integers(0, 3)] * 4),
    grouped=st.booleans(),
    bias=st.booleans(),
    norm=st.sampled_from([False, False, True]),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    residual=st.booleans(),
)


@settings(max_examples=14, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    shape=st.tuples(st.sampled_from([1, 3]), st.sampled_from([2, 3, 6]), st.integers(16, 40), st.integers(16, 40)),
    steps=st.lists(steps, min_size=1, max_size=3),
    sparsity=st.sampled_from([0.0, 0.5, 0.9]),
    domain=st.sampled_from(["spatial", "winograd", "auto"]),
)
def test_every_graph_computes_what_it_did(shape, steps, sparsity, domain):
    net = prune(settle(Graph(shape[1], steps)), sparsity)
    with torch.no_grad():
        try:
            net(torch.zeros(shape))
        except RuntimeError:  # an image smaller than the filter
            return
    plan = check_domain(net, shape, domain)
    assert len(plan) == len(steps)
    if domain != "auto":
        assert all(layer.sparse for layer in plan)
