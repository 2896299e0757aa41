"""The results as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from benchmarks.networks import NETWORKS
from benchmarks.results import Results
from benchmarks.rows import MEMORY_AT_MOST, TWO_THREADS_AT_LEAST, Case
from jointsparse.frontends.benchmark import fastest, ratio
from jointsparse.frontends.engines import ENGINES, NATIVE, OURS, PEERS, Engine
from jointsparse.frontends.engines.measuring import Measurement, Setting

WIDTH = 132
"""Columns of the text where it goes to a file."""


def show(results: Results, cases: Sequence[Case], engines: Sequence[Engine], settings: Sequence[Setting]) -> None:
    """Print all tables that there are results for: times, threads, packages, operators, and what was left out."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    for name, value in results.machine.items():
        console.print(f"{name.replace('_', ' ')}: {value}")
    rows = Rows(results, cases, engines)
    for line in rows.versions(settings):
        console.print(line, markup=False)
    tables = [rows.times(setting) for setting in settings]
    tables += [table for setting in settings if setting.threads == 2 and (table := rows.threads(setting))]
    tables.append(rows.packages(settings[0]))
    if any(setting.layers for setting in settings):
        tables += rows.operators(settings)
    for table in tables:
        _print(console, table)
    for line in rows.left_out(settings):
        console.print(line, markup=False, soft_wrap=True)


class Rows:
    """Tables of some cases and engines."""

    def __init__(self, results: Results, cases: Sequence[Case], engines: Sequence[Engine]) -> None:
        self.results = results
        self.cases = cases
        self.engines = engines

    def row(self, case: Case, setting: Setting) -> list[Measurement]:
        """The measurements of a case that there are, of the engines chosen."""
        names = {engine.name for engine in self.engines}
        return [one for one in self.results.get(case, setting) if one.engine in names]

    def times(self, setting: Setting) -> Table:
        """Milliseconds, and the fastest sparse build against the fastest dense fp32 engine."""
        wanted = setting.threads == 1 and setting.isa == NATIVE
        plural = "" if setting.threads == 1 else "s"
        table = _table(f"{setting.isa}, {setting.threads} thread{plural}: least time over median, ms")
        for title in ("network", "zeros", *(engine.title for engine in self.engines), "speed-up"):
            table.add_column(title, justify="left" if title == "network" else "right")
        if wanted:
            table.add_column("at least", justify="right")
            table.add_column("aim", justify="right")
        for case in self.cases:
            row = self.row(case, setting)
            by_engine = {measurement.engine: measurement for measurement in row}
            cells = [_times(by_engine.get(engine.name)) for engine in self.engines]
            speed_up = ratio(fastest(row, PEERS), fastest(row, OURS))
            asked = [_times_as_fast(case.at_least), _times_as_fast(case.aim)] if wanted else []
            table.add_row(*_head(case), *cells, _times_as_fast(speed_up), *asked)
        return table

    def threads(self, setting: Setting) -> Table | None:
        """Two threads over one, build by build; None without results of one thread."""
        single = replace(setting, threads=1)
        table = _table(f"{setting.isa}: two threads over one (at least {TWO_THREADS_AT_LEAST:g} asked for ours)")
        for title in ("network", "zeros", *(engine.title for engine in self.engines)):
            table.add_column(title, justify="left" if title == "network" else "right")
        for case in self.cases:
            one, two = ({m.engine: m for m in self.row(case, s)} for s in (single, setting))
            ratios = [ratio(one.get(engine.name), two.get(engine.name)) for engine in self.engines]
            if any(ratios):
                table.add_row(*_head(case), *map(_times_as_fast, ratios))
        return table if table.row_count else None

    def packages(self, setting: Setting) -> Table:
        """Seconds to compile, size of the package and peak memory while running, of what is compiled here."""
        built = [engine for engine in self.engines if engine.name in (*OURS, "tvm")]
        table = _table(
            f"{setting.isa}: seconds to compile / package, MB / peak memory, MB "
            f"(at most {MEMORY_AT_MOST:g} of the dense build asked for)"
        )
        for title in ("network", "zeros", *(engine.title for engine in built)):
            table.add_column(title, justify="left" if title == "network" else "right")
        for case in self.cases:
            by_engine = {measurement.engine: measurement for measurement in self.row(case, setting)}
            table.add_row(*_head(case), *(_package(by_engine.get(engine.name)) for engine in built))
        return table

    def operators(self, settings: Sequence[Setting]) -> list[Table]:
        """One table a build: where its time goes."""
        measured = [
            (case, setting, one)
            for setting in settings
            for case in self.cases
            for one in self.row(case, setting)
            if one.operators
        ]
        return [_operators(case, setting, one) for case, setting, one in measured]

    def versions(self, settings: Sequence[Setting]) -> list[str]:
        """One line an engine."""
        found = {m.engine: m.version for s in settings for case in self.cases for m in self.row(case, s) if m.version}
        return [f"{ENGINES[name].title}: {version}" for name, version in found.items()]

    def left_out(self, settings: Sequence[Setting]) -> list[str]:
        """Engines without times and why, each reason once."""
        lines: dict[tuple[str, str, str], list[str]] = {}
        for setting in settings:
            for case in self.cases:
                for one in self.row(case, setting):
                    if one.left_out is not None:
                        key = (ENGINES[one.engine].title, setting.isa, one.left_out)
                        lines.setdefault(key, []).append(NETWORKS[case.network].title)
        return [
            f"left out: {title}, {isa} ({', '.join(dict.fromkeys(names))}): {reason}"
            for (title, isa, reason), names in lines.items()
        ]


def _table(title: str) -> Table:
    return Table(title=title, box=None, pad_edge=False, header_style="")


def _print(console: Console, table: Table) -> None:
    """The table below its title, which rich would break at the width of the table."""
    console.print(f"\n[bold]{table.title}[/]", soft_wrap=True)
    table.title = None
    console.print(table)


def _head(case: Case) -> tuple[str, str]:
    return NETWORKS[case.network].title, f"{case.sparsity:.0%}"


def _times(measurement: Measurement | None) -> str:
    if measurement is None or measurement.min_ms is None or measurement.median_ms is None:
        return "-"
    return f"{_digits(measurement.min_ms)}\n{_digits(measurement.median_ms)}"


def _digits(number: float) -> str:
    """Three figures, no exponent."""
    return f"{number:.0f}" if number >= 100 else f"{number:#.3g}"


def _times_as_fast(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _package(measurement: Measurement | None) -> str:
    if measurement is None or measurement.build_seconds is None or measurement.build_bytes is None:
        return "-"
    memory = "-" if measurement.peak_bytes is None else f"{measurement.peak_bytes / 1e6:.0f}"
    return f"{measurement.build_seconds:.0f} / {measurement.build_bytes / 1e6:.1f} / {memory}"


def _operators(case: Case, setting: Setting, measurement: Measurement) -> Table:
    network, zeros = _head(case)
    peak = measurement.peak_gmacs or 0.0
    table = _table(
        f"{network}, {zeros}, {ENGINES[measurement.engine].title}, {setting.isa}, {setting.threads} thread(s): "
        f"operators; peak {peak:.0f} G multiply-adds/s"
    )
    for title in ("operator", "layer", "ms", "M mult.-adds", "G/s", "of peak"):
        table.add_column(title, justify="left" if title in ("operator", "layer") else "right", overflow="fold")
    for one in measurement.operators or ():
        work = one["multiply_adds"]
        rate = None if work is None else work / one["ms"] / 1e6
        table.add_row(
            one["name"],
            one["layer"],
            f"{one['ms']:.4f}",
            "" if work is None else f"{work / 1e6:.2f}",
            "" if rate is None else f"{rate:.1f}",
            "" if rate is None or not peak else f"{rate / peak:.0%}",
        )
    return table
