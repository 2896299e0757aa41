"""Whole networks, sparse, against dense engines: the table of ``make bench``.

    python -m benchmarks.against_peers [--network NAME ...] [--sparsity S ...] [--engine NAME ...] [--threads N ...]
        [--isa native|avx2 ...] [--seconds S] [--rounds N] [--layers] [--json FILE]

Networks, weights and pruning are those of ``networks.py``; dense engines run the dense weights, once for each network.
Every engine runs in a process of its own, pinned to as many cores as it has threads, one at a time, and is compared
with a reference in double precision before it is timed; one that is wrong, or cannot take part, is listed with the
reason. All engines are measured in turn, in several rounds; of each engine the fastest round counts.
Results are kept in FILE as they come: the same command again goes on where it stopped, and measures again only what is
missing, was left out, was measured for a shorter time or in fewer rounds, or is of another version (for the sparse
builds, of other sources).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import groupby, product
from pathlib import Path

import onnx
from onnx import ModelProto

from benchmarks import networks
from benchmarks.report import show
from benchmarks.results import Results
from benchmarks.rows import CASES, Case, case_of
from jointsparse.frontends.engines import ENGINES, ISAS, OURS, Engine, LeftOut
from jointsparse.frontends.engines.measuring import Setting, Workbench, check_setting
from jointsparse.frontends.errors import InputError

DOMAINS = {"spatial": networks.SPATIAL, "winograd": networks.WINOGRAD, "auto": networks.JOINT}
"""What each sparse build gets; everything else gets the dense model."""

BUSY = 0.5
"""Load average at the start from which times are not to be trusted."""


@dataclass
class Models:
    """The models of one row of the table, made when first asked for, in a folder.

    Attributes:
        dense: makes the dense one.
    """

    case: Case
    folder: Path
    dense: Callable[[], ModelProto]
    _benches: dict[str, Workbench] = field(default_factory=dict)

    def workbench(self, domain: str) -> Workbench:
        """The model pruned in a domain of ``networks.DOMAINS``."""
        if domain not in self._benches:
            folder = self.folder / domain
            folder.mkdir(parents=True)
            onnx.save_model(networks.sparse_model(self.dense(), self.case.sparsity, domain), folder / "model.onnx")
            self._benches[domain] = Workbench(folder / "model.onnx", folder)
        return self._benches[domain]


def run(cases: list[Case], engines: list[Engine], settings: list[Setting], results: Results, rounds: int = 1) -> None:
    """Measure what the results lack, network by network, all of a network once in every round: a slow spell of the
    machine does not meet one engine alone."""
    for network, of_network in groupby(cases, key=lambda case: case.network):
        dense = cache(partial(networks.dense_model, networks.NETWORKS[network]))
        with tempfile.TemporaryDirectory() as folder:
            models = [Models(case, Path(folder, f"{case.sparsity}"), dense) for case in of_network]
            for number, setting, one, engine in product(range(rounds), settings, models, engines):
                _measure(one, engine, setting, results, number)


def _measure(models: Models, engine: Engine, setting: Setting, results: Results, before: int) -> None:
    """Measure an engine once, unless it has been measured more often than ``before``."""
    network, sparsity = models.case.network, models.case.sparsity if engine.name in OURS else 0.0
    found = results.rounds(network, sparsity, engine.name, setting, _version(engine))
    # What failed in the first round is not tried again in this run.
    if found > before or (before and not found):
        return
    bench = models.workbench(DOMAINS.get(engine.name, networks.DENSE))
    measurement = bench.measure(engine, replace(setting, layers=setting.layers and not found))
    results.add(network, sparsity, measurement, again=found > 0)
    said = measurement.left_out or f"{measurement.min_ms:.2f} ms, median {measurement.median_ms:.2f}"
    print(
        f"{network} {sparsity:.0%} zeros, {setting.isa}, {setting.threads} threads, {engine.name}: {said}",
        file=sys.stderr,
        flush=True,
    )


def _warn_if_busy() -> None:
    load = os.getloadavg()[0]
    if load > BUSY:
        print(f"other programs are running (load {load:.1f}): times will be too long", file=sys.stderr)


def _version(engine: Engine) -> str | None:
    try:
        return engine.version()
    except LeftOut:
        return None


def cases(names: list[str], sparsities: list[float] | None) -> Iterator[Case]:
    """The rows of the table for some networks; at other sparsities than the table's, rows without requirements."""
    for name in names:
        for sparsity in sparsities or [case.sparsity for case in CASES if case.network == name]:
            yield case_of(name, sparsity)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", choices=list(networks.NETWORKS), default=list(networks.NETWORKS))
    parser.add_argument("--sparsity", type=float, nargs="+", help="by default those of the table")
    parser.add_argument("--engine", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--isa", nargs="+", choices=ISAS, default=list(ISAS))
    parser.add_argument("--seconds", type=float, default=1.0, help="for one measurement, warming up not counted")
    parser.add_argument("--rounds", type=int, default=3, help="in each of which everything is measured once")
    parser.add_argument("--layers", action="store_true", help="time every operator of our builds as well")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the results here, and go on from them")
    arguments = parser.parse_args()
    settings = [
        Setting(threads, isa, arguments.seconds, arguments.layers)
        for isa in arguments.isa
        for threads in arguments.threads
    ]
    chosen = list(dict.fromkeys(cases(arguments.network, arguments.sparsity)))
    engines = [ENGINES[name] for name in dict.fromkeys(arguments.engine)]
    try:
        for case in chosen:
            case.check()
        for setting in settings:
            check_setting(setting)
        if arguments.rounds < 1:
            raise InputError(f"{arguments.rounds} rounds; give 1 or more")
        results = Results.open(arguments.json)
        _warn_if_busy()
        run(chosen, engines, settings, results, arguments.rounds)
    except InputError as error:
        sys.exit(f"against_peers: {error}")
    show(results, chosen, engines, settings)


if __name__ == "__main__":
    main()
