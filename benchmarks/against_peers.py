"""Whole networks, sparse, against dense engines: the table of ``make bench``.

    python -m benchmarks.against_peers [--network NAME ...] [--sparsity S ...] [--engine NAME ...] [--threads N ...]
        [--isa native|avx2 ...] [--seconds S] [--layers] [--json FILE]

Networks, weights and pruning are those of ``networks.py``; dense engines run the dense weights. Every engine runs in
a process of its own, pinned to as many cores as it has threads, and is compared with a reference in double precision
before it is timed; one that is wrong, or cannot take part, is listed with the reason. All engines of a row, with all
numbers of threads, are loaded and then measured turn by turn, one at a time.
Results are kept in FILE as they come: the same command again goes on where it stopped. A row of which something is
missing, was measured for a shorter time, or is of another version (for the sparse builds, of other sources) is
measured again as a whole.
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
from jointsparse.frontends.engines import ENGINES, ISAS, Engine
from jointsparse.frontends.engines.measuring import Entry, Setting, Workbench, check_setting, compare
from jointsparse.frontends.errors import InputError

DOMAINS = {"spatial": networks.SPATIAL, "winograd": networks.WINOGRAD, "auto": networks.JOINT}
"""What each sparse build gets; everything else gets the dense model."""

BUSY = 0.5
"""Load average at the start from which times are not to be trusted."""


@dataclass
class Models:
    """The models of one network, made when first asked for, in a folder.

    Attributes:
        dense: makes the dense one.
    """

    folder: Path
    dense: Callable[[], ModelProto]
    _benches: dict[tuple[str, float], Workbench] = field(default_factory=dict)

    def workbench(self, case: Case, engine: str) -> Workbench:
        """With what an engine gets in a row."""
        domain = DOMAINS.get(engine, networks.DENSE)
        sparsity = case.sparsity if engine in DOMAINS else 0.0
        if (domain, sparsity) not in self._benches:
            folder = self.folder / f"{domain}-{sparsity}"
            folder.mkdir()
            onnx.save_model(networks.sparse_model(self.dense(), sparsity, domain), folder / "model.onnx")
            self._benches[domain, sparsity] = Workbench(folder / "model.onnx", folder)
        return self._benches[domain, sparsity]


def run(cases: list[Case], engines: list[Engine], settings: list[Setting], results: Results) -> None:
    """Measure the rows that the results lack, network by network.

    Args:
        settings: those of one instruction set are measured together.
    """
    isas = dict.fromkeys(setting.isa for setting in settings)
    for network, of_network in groupby(cases, key=lambda case: case.network):
        dense = cache(partial(networks.dense_model, networks.NETWORKS[network]))
        with tempfile.TemporaryDirectory() as folder:
            models = Models(Path(folder), dense)
            for case, isa in product(of_network, isas):
                _measure(models, case, engines, [setting for setting in settings if setting.isa == isa], results)


def _measure(models: Models, case: Case, engines: list[Engine], settings: list[Setting], results: Results) -> None:
    """Measure a row unless it is there, with the engines and numbers of threads that it had before as well, and no less
    thoroughly."""
    if not any(results.lacks(case, engine, setting) for engine, setting in product(engines, settings)):
        return
    isa = settings[0].isa
    before = results.rows.get((case.network, case.sparsity, isa), [])
    names = {engine.name for engine in engines} | {one.engine for one in before}
    threads = sorted({setting.threads for setting in settings} | {one.threads for one in before})
    setting = replace(
        settings[0],
        seconds=max([settings[0].seconds, *(one.seconds for one in before)]),
        layers=settings[0].layers or any(one.operators is not None for one in before),
    )
    entries = [
        Entry(models.workbench(case, name), ENGINES[name], replace(setting, threads=number))
        for number, name in product(threads, [name for name in ENGINES if name in names])
    ]
    results.put(case, isa, compare(entries))
    for one in results.rows[case.network, case.sparsity, isa]:
        said = one.left_out or f"{one.min_ms:.2f} ms, median {one.median_ms:.2f}"
        _say(f"{case.network} {case.sparsity:.0%} zeros, {isa}, {one.threads} threads, {one.engine}: {said}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _warn_if_busy() -> None:
    load = os.getloadavg()[0]
    if load > BUSY:
        _say(f"other programs are running (load {load:.1f}): times will be too long")


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
    parser.add_argument("--seconds", type=float, default=3.0, help="for one measurement, all its turns together")
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
        results = Results.open(arguments.json)
        _warn_if_busy()
        run(chosen, engines, settings, results)
    except InputError as error:
        sys.exit(f"against_peers: {error}")
    show(results, chosen, engines, settings)


if __name__ == "__main__":
    main()
