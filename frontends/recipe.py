"""Recipes: TOML files that say how a network is trained. Neither torch nor TVM is needed to read one.

A recipe has the tables ``[run]``, ``[network]``, ``[data]``, ``[optimiser]`` and, where layers are to become sums of a
sparse and a low-rank part, ``[approximation]``, where the model is to become sparse, ``[sparsity]``, and where it is to
be quantised and written to one file, ``[quantisation]``; the classes below are their keys. An unknown key or a value of
the wrong kind is an error, so that a misspelt option cannot pass unnoticed.
"""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import InputError
from .ranges import check_increase, check_quantiser

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "ApproximationTable",
    "DataTable",
    "NetworkTable",
    "OptimiserTable",
    "QuantisationTable",
    "Recipe",
    "RunTable",
    "SparsityTable",
    "read_recipe",
]


@dataclass(frozen=True)
class RunTable:
    """``[run]``. precision: "fp32", or "bf16" (autocast; the regularisers stay in fp32). threads: of the processor, 0
    for torch's choice. evaluate_every: measure on the test data every so many epochs, 0 only at the end.
    evaluate_start: measure the weights started from as well."""

    epochs: int
    seed: int = 0
    precision: str = "fp32"
    threads: int = 0
    evaluate_every: int = 0
    evaluate_start: bool = True


@dataclass(frozen=True)
class NetworkTable:
    """``[network]``. name and options: of ``networks.build``. pretrained: weights to start from must be given."""

    name: str
    pretrained: bool = False
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataTable:
    """``[data]``. kind: "super-resolution" or "classification". train, test: folders (super-resolution) or splits.
    batch: over all processes. The rest is for super-resolution: patch in pixels, steps an epoch, shrink as in
    ``data.PatchBatches``."""

    kind: str
    train: str
    test: list[str]
    batch: int
    scale: int = 3
    patch: int = 41
    steps: int = 1000
    shrink: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class OptimiserTable:
    """``[optimiser]``: AdamW, linear warm-up over the share ``warmup`` of all steps, then half a cosine to nought.
    clip: largest gradient norm, 0 for none."""

    rate: float
    warmup: float = 0.02
    weight_decay: float = 0.0
    clip: float = 0.0


@dataclass(frozen=True)
class ApproximationTable:
    """``[approximation]``, before training. ratio, budget, units, exclude, positions, iterations: of ``approximate``.
    images: that it looks at, of the training data."""

    ratio: float
    budget: str = "parameters"
    units: str = "channels"
    exclude: list[str] = field(default_factory=list)
    positions: int = 10_000
    iterations: int = 60
    images: int = 1024


@dataclass(frozen=True)
class SparsityTable:
    """``[sparsity]``. spatial, winograd, tile, weighted, alpha, floor, speed, exclude: of ``JointSparsity``; a domain
    at 0 is left out of training. ramp: share of all steps over which the targets rise. hold: final share of the steps
    for which spatially pruned weights stay zero. prune_spatial, prune_winograd: what is pruned at the end, whatever was
    trained.
    """

    spatial: float = 0.8
    winograd: float = 0.8
    tile: int = 4
    weighted: bool = True
    alpha: float = 1.0
    floor: float = 1e-4
    speed: float = 100.0
    exclude: list[str] = field(default_factory=list)
    ramp: float = 0.4
    hold: float = 0.2
    prune_spatial: float = 0.8
    prune_winograd: float = 0.8


@dataclass(frozen=True)
class QuantisationTable:
    """``[quantisation]``, after training and pruning. increase: of the loss, for ``quantize_within_``, on so many
    calibration batches as in training. Or one step for all layers: bits, of the largest weight's code, 2 to 16, or
    step, in units of the weights; dither: as in ``quantize_``, from the run's seed; tuning_steps: of codebook
    fine-tuning, batches as in training; rate: of ``CodebookTuner``, in units of the step."""

    increase: float = 0.0
    calibration: int = 32
    bits: int = 8
    step: float = 0.0
    dither: bool = False
    tuning_steps: int = 0
    rate: float = 1e-2


@dataclass(frozen=True)
class Recipe:
    """A whole recipe; ``table`` is it as plain data, overrides applied, for the record."""

    run: RunTable
    network: NetworkTable
    data: DataTable
    optimiser: OptimiserTable
    approximation: ApproximationTable | None
    sparsity: SparsityTable | None
    quantisation: QuantisationTable | None
    table: dict[str, Any]


_CHOICES = {
    ("data", "kind"): ("super-resolution", "classification"),
    ("run", "precision"): ("fp32", "bf16"),
    ("approximation", "budget"): ("parameters", "multiplications"),
    ("approximation", "units"): ("channels", "columns"),
}
_SHARES = ("ramp", "hold", "warmup")
_SPARSITIES = ("spatial", "winograd", "prune_spatial", "prune_winograd")
_NOT_NEGATIVE = ("threads", "evaluate_every", "weight_decay", "clip", "tuning_steps", "increase", "iterations")
_POSITIVE = (
    *("epochs", "batch", "calibration", "scale", "patch", "steps", "rate"),
    *("alpha", "floor", "speed", "positions", "images"),
)


def read_recipe(path: Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read and check a recipe.

    Args:
        path: TOML file. overrides: values to put in its place by dotted name, ``{"sparsity.spatial": 0.0}``.

    Raises:
        InputError: naming the file, the table and the key at fault.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot read the recipe ({error.strerror or error})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a TOML file ({error})") from error
    known = {f.name for f in dataclasses.fields(Recipe)} - {"table"}
    for name, value in (overrides or {}).items():
        section, _, key = name.partition(".")
        if not key or section not in known or not isinstance(table.setdefault(section, {}), dict):
            raise InputError(f'{path}: cannot set "{name}"; write TABLE.KEY, TABLE one of {", ".join(sorted(known))}')
        table[section][key] = value
    if unknown := set(table) - known:
        raise InputError(f"{path}: unknown table [{min(unknown)}]; there are {', '.join(sorted(known))}")
    return Recipe(
        run=_section(RunTable, "run", table, path),
        network=_section(NetworkTable, "network", table, path),
        data=_section(DataTable, "data", table, path),
        optimiser=_section(OptimiserTable, "optimiser", table, path),
        approximation=_approximation(table, path) if "approximation" in table else None,
        sparsity=_section(SparsityTable, "sparsity", table, path) if "sparsity" in table else None,
        quantisation=_quantisation(table, path) if "quantisation" in table else None,
        table=table,
    )


def _approximation(table: Mapping[str, Any], path: Path) -> ApproximationTable:
    read: ApproximationTable = _section(ApproximationTable, "approximation", table, path)
    if read.ratio <= 1:
        raise InputError(f"{path}: approximation.ratio is {read.ratio:g}; it must be greater than 1")
    return read


def _quantisation(table: Mapping[str, Any], path: Path) -> QuantisationTable:
    read: QuantisationTable = _section(QuantisationTable, "quantisation", table, path)
    given = table["quantisation"]
    try:
        check_quantiser(given.get("step"), given.get("bits"))
        if read.increase:
            check_increase(read.increase)
    except InputError as error:
        raise InputError(f"{path}: [quantisation]: {error}") from None
    if "calibration" in given and not read.increase:
        raise InputError(f"{path}: quantisation.calibration goes with quantisation.increase; give both or neither")
    if read.increase and (alone := sorted({"bits", "step", "dither", "tuning_steps", "rate"} & given.keys())):
        raise InputError(f"{path}: quantisation.{alone[0]} is for one step for all layers; leave it or increase out")
    return read


def _section(kind: type, name: str, table: Mapping[str, Any], path: Path) -> Any:
    given = table.get(name)
    if not isinstance(given, dict):
        raise InputError(f"{path}: the table [{name}] is missing")
    hints = typing.get_type_hints(kind)
    if unknown := set(given) - set(hints):
        raise InputError(f"{path}: unknown key {name}.{min(unknown)}; there are {', '.join(hints)}")
    for entry in dataclasses.fields(kind):
        required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if required and entry.name not in given:
            raise InputError(f"{path}: {name}.{entry.name} is missing")
    values = {key: _value(hints[key], value, f"{path}: {name}.{key}") for key, value in given.items()}
    for key, value in values.items():
        _check_range(name, key, value, f"{path}: {name}.{key}")
    return kind(**values)


def _value(hint: Any, value: Any, where: str) -> Any:
    """``value`` if it is of the kind ``hint``; whole numbers pass as floats."""
    if isinstance(hint, types.GenericAlias):
        outer: Any = typing.get_origin(hint)
        inner = typing.get_args(hint)[-1]
        if not isinstance(value, outer):
            raise InputError(f"{where} must be a {outer.__name__}, not {value!r}")
        if outer is list:
            return [_value(inner, item, where) for item in value]
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise InputError(f"{where} must be a {hint.__name__}, not {value!r}")
    return value


def _check_range(table: str, key: str, value: Any, where: str) -> None:
    choices = _CHOICES.get((table, key))
    if choices and value not in choices:
        raise InputError(f'{where} is "{value}"; choose {" or ".join(choices)}')
    if key in _SHARES and not 0 <= value <= 1:
        raise InputError(f"{where} is {value}; it is a share from 0 to 1")
    if key in _SPARSITIES and not 0 <= value < 1:
        raise InputError(f"{where} is {value}; a sparsity is at least 0 and below 1")
    if key in _NOT_NEGATIVE and not value >= 0:
        raise InputError(f"{where} is {value}; it must be at least 0")
    if key in _POSITIVE and not value > 0:
        raise InputError(f"{where} is {value}; it must be greater than 0")
