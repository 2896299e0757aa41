"""What was decided for every layer of a model, and why. Neither TVM nor torch is needed to read it."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

JSON_FORMAT = "jointsparse.plan"
JSON_VERSION = 1

DENSE = "dense"
DIRECT = "direct"
WINOGRAD = {2: "winograd_f2", 4: "winograd_f4"}
"""Kernel names: TVM's own, sparse direct (for a fully-connected layer, sparse dot products), and sparse
Winograd by output tile size."""

TILE = {name: tile for tile, name in WINOGRAD.items()}


@dataclass(frozen=True)
class LayerPlan:
    """One convolution or fully-connected layer.

    Attributes:
        name: the weight's parameter name without ``.weight``, else the importer's name of the node, else the operator
            and its position. Unique in a plan.
        op: the Relay operator, for example ``nn.conv2d``.
        kernel: ``dense``, ``direct``, ``winograd_f2`` or ``winograd_f4``.
        reason: why this kernel; for a layer left alone, why it was.
        input_shape, weight_shape, output_shape: N C H W and K C/g R S (N C, K C and N K of a fully-connected
            layer); None where a shape is not static.
        strides, padding, dilation: two, four (top, left, bottom, right) and two numbers; None for other operators.
        groups: 1 for an ordinary convolution and a fully-connected layer, the number of channels for a depthwise one.
        spatial_sparsity: share of zero weights in [0, 1]; None without weights at hand.
        winograd_sparsity: the same in the Winograd domain, by kernel name, for the tiles allowed.
        costs: predicted milliseconds of one run on one thread, by kernel name, for the kernels supported.
        borrowed: by kernel name, the family of CPUs (``avx512``, ...) on which the prediction rests, for kernels not
            measured on CPUs like the target's.
        break_even: by sparse kernel, the sparsity (of its own domain) from which it beats dense by prediction;
            a kernel that never does is absent.
        overtaken: the same against the chosen kernel; equal to break_even where that is dense.
        unsupported: by kernel name, why it is not among the alternatives.
        multiplications: of the chosen kernel in one run (by non-zero weights if it is a sparse one, Winograd
            transforms not counted); None if unknown.
    """

    name: str
    op: str
    kernel: str
    reason: str
    input_shape: tuple[int, ...] | None = None
    weight_shape: tuple[int, ...] | None = None
    output_shape: tuple[int, ...] | None = None
    strides: tuple[int, int] | None = None
    padding: tuple[int, int, int, int] | None = None
    dilation: tuple[int, int] | None = None
    groups: int | None = None
    spatial_sparsity: float | None = None
    winograd_sparsity: dict[str, float] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)
    borrowed: dict[str, str] = field(default_factory=dict)
    break_even: dict[str, float] = field(default_factory=dict)
    overtaken: dict[str, float] = field(default_factory=dict)
    unsupported: dict[str, str] = field(default_factory=dict)
    multiplications: int | None = None

    @property
    def sparse(self) -> bool:
        """Whether a sparse kernel runs this layer."""
        return self.kernel != DENSE


@dataclass(frozen=True)
class Plan:
    """The convolutions and fully-connected layers of a model in the order in which they run.

    Attributes:
        target: the TVM target. domain: as asked of ``sparsify``.
        layers: every one of the module, those left alone as well.
        warnings: what the user should know beyond single layers, one line each.
    """

    target: str
    domain: str
    layers: tuple[LayerPlan, ...]
    warnings: tuple[str, ...] = ()

    def __iter__(self) -> Any:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> LayerPlan:
        """The layer of this name."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    @property
    def cost(self) -> float | None:
        """Predicted milliseconds of the layers as chosen; None if nothing could be predicted."""
        return _total(self.layers, lambda layer: layer.kernel)

    @property
    def dense_cost(self) -> float | None:
        """The same for the layers counted in ``cost``, all left dense."""
        return _total(self.layers, lambda _: DENSE)

    def to_json(self) -> str:
        """The plan as JSON text: stable, documented, nothing that only Python can read.

        An object with ``format`` ("jointsparse.plan"), ``version`` (1), ``target``, ``domain``, ``cost_ms`` and
        ``dense_cost_ms`` (numbers or null), ``warnings`` (strings) and ``layers``: one object a layer, in order,
        whose keys are the attributes of LayerPlan (costs in milliseconds; sparsities as shares in [0, 1]).
        A new version may add keys; a change to one of these raises ``version``.
        """
        document = {
            "format": JSON_FORMAT,
            "version": JSON_VERSION,
            "target": self.target,
            "domain": self.domain,
            "cost_ms": self.cost,
            "dense_cost_ms": self.dense_cost,
            "warnings": list(self.warnings),
            "layers": [asdict(layer) for layer in self.layers],
        }
        return json.dumps(document, indent=2, sort_keys=True, allow_nan=False)

    def __str__(self) -> str:
        """A table for people, one line a layer and a sum below; plain text, at most 160 columns.

        Then what predictions were borrowed from other CPUs, and the warnings.
        """
        text = io.StringIO()
        console = Console(file=text, width=160, color_system=None, legacy_windows=False)
        console.print(_table(self.layers))
        for line in [_sum_line(self), *_borrowed_lines(self), *self.warnings]:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        return "\n".join(line.rstrip() for line in text.getvalue().rstrip("\n").split("\n"))


def percent(share: float | None) -> str:
    """A share as ``72 %``, never rounded up to 100 %; empty for None."""
    if share is None:
        return ""
    return "100 %" if share >= 1 else f"{min(100 * share, 99.9):.3g} %"


def milliseconds(cost: float | None) -> str:
    """Milliseconds to three figures with the unit; empty for None."""
    return "" if cost is None else f"{cost:.3g} ms"


def _total(layers: tuple[LayerPlan, ...], kernel_of: Any) -> float | None:
    known = [layer.costs[kernel_of(layer)] for layer in layers if {DENSE, layer.kernel} <= layer.costs.keys()]
    return sum(known) if known else None


def _table(layers: tuple[LayerPlan, ...]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="")
    table.add_column("layer", overflow="fold")
    table.add_column("weights")
    table.add_column("input")
    table.add_column("how")
    table.add_column("zeros", justify="right")
    table.add_column("in Winograd", justify="right")
    table.add_column("kernel")
    table.add_column("predicted", justify="right")
    table.add_column("dense", justify="right")
    table.add_column("reason", overflow="fold", ratio=1)
    for layer in layers:
        table.add_row(
            layer.name,
            _by(layer.weight_shape),
            _by(layer.input_shape),
            _geometry(layer),
            percent(layer.spatial_sparsity),
            " ".join(f"F{TILE[kernel]} {percent(share)}" for kernel, share in sorted(layer.winograd_sparsity.items())),
            layer.kernel,
            milliseconds(layer.costs.get(layer.kernel)),
            milliseconds(layer.costs.get(DENSE)),
            layer.reason,
        )
    return table


def _by(shape: tuple[int, ...] | None) -> str:
    return "?" if shape is None else "x".join(map(str, shape))


def _geometry(layer: LayerPlan) -> str:
    """What sets the layer apart from a stride 1, undilated, ungrouped one."""
    words = []
    if layer.strides not in (None, (1, 1)):
        words.append(f"stride {_pair(layer.strides)}")
    if layer.dilation not in (None, (1, 1)):
        words.append(f"dilation {_pair(layer.dilation)}")
    if layer.groups not in (None, 1):
        words.append(f"groups {layer.groups}")
    return ", ".join(words)


def _pair(numbers: tuple[int, int] | None) -> str:
    assert numbers is not None
    return str(numbers[0]) if numbers[0] == numbers[1] else _by(numbers)


def _sum_line(plan: Plan) -> str:
    sparse = sum(layer.sparse for layer in plan.layers)
    line = f"{sparse} of {len(plan.layers)} layers sparse, domain {plan.domain}, target {plan.target}"
    if plan.cost is None:
        return line
    return f"{line}; predicted {milliseconds(plan.cost)} against {milliseconds(plan.dense_cost)} dense"


def _borrowed_lines(plan: Plan) -> list[str]:
    kernels: dict[str, set[str]] = {}
    for layer in plan.layers:
        for kernel, family in layer.borrowed.items():
            kernels.setdefault(family, set()).add(kernel)
    return [
        f"not measured on CPUs like the target's, predicted as on {family}: {', '.join(sorted(kernels[family]))}"
        for family in sorted(kernels)
    ]
