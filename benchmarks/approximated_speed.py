"""How fast approximated networks run: at ImageNet shapes, against the networks as they were.

    python -m benchmarks.approximated_speed [--network NAME ...] [--kept SHARE] [--sparsity S] [--threads N]
        [--seconds S]

Every convolution and fully-connected layer but the first becomes a sum of parts as ``frontends.approximate`` makes
them, with random weights: the share KEPT of its channels is kept, and the rank is that at which the layer has RATIO
times fewer weights, the ratio of Ma et al., arXiv 1807.10119. Then all are measured turn by turn: the network as it was
and the approximated one, both by TVM's dense kernels, and the approximated one by the kernels chosen for it, as it is
and with the share S of each part's weights pruned.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import ModelProto
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import networks
from jointsparse.frontends import batch_norm, exporting, onnx_graph
from jointsparse.frontends.approximation.modules import assemble
from jointsparse.frontends.approximation.regression import Factors
from jointsparse.frontends.approximation.structures import Shape, Structure, shape_of
from jointsparse.frontends.benchmark import ratio
from jointsparse.frontends.engines import ENGINES
from jointsparse.frontends.engines.measuring import Entry, Measurement, Setting, Workbench, check_setting, compare
from jointsparse.frontends.errors import InputError

RATIOS = {"vgg16": 4.4, "alexnet": 4.9, "googlenet": 2.9}
"""Of weights, before and after: the paper's."""


@dataclass(frozen=True)
class Build:
    """A line of the table: a model, pruned or not, by an engine."""

    title: str
    approximated: bool
    engine: str
    domain: str = networks.DENSE


BUILDS = (
    Build("as it was, dense kernels", False, "tvm"),
    Build("approximated, dense kernels", True, "tvm"),
    Build("approximated", True, "auto"),
    Build("approximated and pruned", True, "auto", networks.JOINT),
)


def structure_of(shape: Shape, kept: float, ratio: float) -> Structure | None:
    """With the rank for a ratio; None where that leaves no rank."""
    units = int(kept * shape.units)
    left = shape.weights / ratio - shape.cost(Structure(units, 0))
    rank = int(left / (shape.cost(Structure(units, 1)) - shape.cost(Structure(units, 0))))
    return Structure(units, min(rank, shape.outputs)) if rank > 0 else None


def random_factors(shape: Shape, structure: Structure) -> Factors:
    """Of a structure. What weights are is of no account."""
    units = torch.stack([torch.randperm(shape.units)[: structure.kept].sort().values for _ in range(shape.groups)])
    kept, rest = shape.columns_of(units), shape.columns_of(shape.other_units(units))
    sizes = (
        (shape.outputs, kept.shape[1]),
        (shape.outputs, structure.rank),
        (structure.rank, rest.shape[1]),
    )
    return Factors(kept, rest, *(torch.zeros(shape.groups, *size) for size in sizes))


def approximated(network: networks.Network, kept: float, ratio: float) -> nn.Module:
    """The network with parts in the place of its layers, and random weights."""
    torch.manual_seed(networks.SEED)
    module = network.make()
    _, *layers = [(n, m) for n, m in module.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for name, layer in layers:
        shape = shape_of(layer)
        structure = structure_of(shape, kept, ratio)
        if structure is None:
            continue
        parent, _, own = name.rpartition(".")
        bias: Any = layer.bias
        factors = random_factors(shape, structure)
        setattr(module.get_submodule(parent), own, assemble(layer, shape, factors, None if bias is None else bias.data))
    networks.randomise(module)
    return module


def exported(module: nn.Module, network: networks.Network) -> ModelProto:
    """As ONNX, BatchNorm folded."""
    model = exporting.export(module, torch.zeros(network.shape))
    onnx_graph.tidy(model, network.title)
    batch_norm.fold(model)
    return model


def measure(name: str, kept: float, sparsity: float, setting: Setting) -> list[tuple[Build, Measurement, int]]:
    """Every build of a network, and how many weights its layers have."""
    network = networks.NETWORKS[name]
    module = approximated(network, kept, RATIOS[name])
    models = {False: networks.dense_model(network), True: exported(module, network)}
    with tempfile.TemporaryDirectory() as folder:
        entries, weights = [], []
        for number, build in enumerate(BUILDS):
            model = networks.sparse_model(models[build.approximated], sparsity, build.domain)
            place = Path(folder, str(number))
            place.mkdir()
            onnx.save_model(model, place / "model.onnx")
            entries.append(Entry(Workbench(place / "model.onnx", place), ENGINES[build.engine], setting))
            weights.append(sum(map(Tensor.numel, _weights(model))))
        return list(zip(BUILDS, compare(entries), weights, strict=True))


def _weights(model: ModelProto) -> Iterator[Tensor]:
    layers = onnx_graph.layers(model)
    return (torch.from_numpy(onnx_graph.array(one).copy()) for one in model.graph.initializer if one.name in layers)


def table(name: str, rows: list[tuple[Build, Measurement, int]]) -> Table:
    """For people."""
    made = Table(title=networks.NETWORKS[name].title, box=None, pad_edge=False, header_style="")
    for column in ("build", "weights", "least, ms", "median, ms", "speed-up", "layers", "merged", "sparse"):
        made.add_column(column, justify="left" if column == "build" else "right")
    for build, one, weights in rows:
        if one.left_out is not None:
            made.add_row(build.title, one.left_out)
            continue
        plan = one.plan or []
        merged = sum("one layer again" in layer["reason"] for layer in plan)
        sparse = sum(layer["kernel"] != "dense" for layer in plan)
        gain = ratio(rows[0][1], one)
        times = f"{one.min_ms:.2f}", f"{one.median_ms:.2f}", "" if gain is None else f"{gain:.2f}x"
        made.add_row(build.title, f"{weights:,}", *times, str(len(plan)), str(merged), str(sparse))
    return made


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", choices=list(RATIOS), default=list(RATIOS))
    parser.add_argument("--kept", type=float, default=0.125, help="share of the channels that stay")
    parser.add_argument("--sparsity", type=float, default=0.8, help="of the pruned build, in both domains")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0)
    given = parser.parse_args()
    setting = Setting(given.threads, seconds=given.seconds)
    try:
        check_setting(setting)
    except InputError as error:
        sys.exit(f"approximated_speed: {error}")
    for name in given.network:
        Console(width=130, highlight=False).print(table(name, measure(name, given.kept, given.sparsity, setting)))


if __name__ == "__main__":
    main()
