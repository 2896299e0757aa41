"""How results look: tables on a terminal, plain lines elsewhere, JSON where asked for."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from tvm.driver.tvmc.model import TVMCResult

    from ...passes.plan import Plan
    from ..benchmark import BenchResult
    from ..demo import DemoResult
    from ..inspection import ModelInfo


def show_file(info: ModelInfo, json: bool) -> None:
    """What a .jsm file holds."""
    if json:
        print(info.to_json())
    else:
        Console().print(info)


def show_size(info: ModelInfo) -> None:
    """One line about a file just written."""
    winograd = "" if info.winograd_sparsity is None else f", {info.winograd_sparsity:.1%} in the Winograd domain"
    zeros = f"{info.spatial_sparsity:.1%} zeros{winograd}"
    print(f"{info.path}: {info.file_bytes:,} bytes instead of {info.dense_bytes:,}, ratio {info.ratio:.1f}; {zeros}")


def show_written(path: Path) -> None:
    """One line about a file just written."""
    print(f"{path}: {path.stat().st_size:,} bytes")


def show_training(results: Mapping[str, Any], output: Path) -> None:
    """What was measured: a line for each build, a column for each test set."""
    builds = {"dense": "dense", "spatial": "spatial", "winograd": "Winograd"}
    references = {"baseline": "bicubic", "before": "before", "approximated": "approximated"}
    quantised = results.get("quantised", {})
    rows = {label: results[key] for key, label in (references | builds).items() if results.get(key)}
    rows |= {f"{label}, quantised": quantised[key] for key, label in builds.items() if key in quantised}
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    names = list(dict.fromkeys(name for metrics in rows.values() for name in metrics))
    for name in names:
        table.add_column(name, justify="right")
    for label, metrics in rows.items():
        table.add_row(label, *(f"{metrics[name]:.2f}" if name in metrics else "" for name in names))
    Console().print(table)
    if quantised:
        print(f"{output / 'model.jsm'}: {quantised['file_bytes']:,} bytes, ratio {quantised['ratio']:.1f}")
    print(f"weights and figures are in {output}")


def show_plan(plan: Plan, package: Path, *, explain: bool, json: bool) -> None:
    """The plan in full, or one line about the package."""
    if json:
        print(plan.to_json())
        return
    if explain:
        print(plan)
    sparse = sum(layer.sparse for layer in plan)
    print(f"{package}: {package.stat().st_size:,} bytes, {sparse} of {len(plan)} layers sparse")


def show_run(result: TVMCResult, threads: int, written: Path | None, json: bool) -> None:
    """Names, types and shapes of the outputs, and the times if they were measured."""
    outputs = {name: {"dtype": str(array.dtype), "shape": list(array.shape)} for name, array in result.outputs.items()}
    times = result.times
    if json:
        document: dict[str, Any] = {"format": "jointsparse.run", "version": 1, "outputs": outputs, "threads": threads}
        document["time_ms"] = None
        if times:
            names = ("mean", "median", "max", "min", "std")
            document["time_ms"] = {name: 1e3 * getattr(times, name) for name in names}
            document["time_ms"]["results"] = [1e3 * seconds for seconds in times.results]
        print(jsonlib.dumps(document, indent=2))
        return
    if times:
        plural = "" if threads == 1 else "s"
        print(f"{result.format_times().rstrip()}\non {threads} thread{plural}; TVM_NUM_THREADS sets another number")
    for name, output in outputs.items():
        print(f"{name}: {output['dtype']} {output['shape']}" + (f", in {written}" if written else ""))


def show_bench(result: BenchResult, json: bool) -> None:
    """A line an engine, fastest build against fastest dense engine, and what was left out and why."""
    if json:
        print(result.to_json())
        return
    from ..engines import ENGINES

    setting = result.setting
    threads = f"{setting.threads} thread" + ("" if setting.threads == 1 else "s")
    print(f"{result.model}, {threads}, {result.machine['cpu']} ({result.machine['llvm_cpu']}), {setting.isa}")
    table = Table(box=None, pad_edge=False, header_style="")
    for title in ("", "least", "median", "runs", "error", "version"):
        table.add_column(title, justify="left" if title in ("", "version") else "right")
    for one in result.measurements:
        if one.min_ms is not None:
            times = (f"{value:#.3g} ms" for value in (one.min_ms, one.median_ms))
            error = "" if one.error is None else f"{one.error:.1e}"
            table.add_row(ENGINES[one.engine].title, *times, f"{one.runs:,}", error, one.version)
    console = Console(highlight=False)
    console.print(table)
    for one in result.measurements:
        if one.left_out is not None:
            console.print(f"{ENGINES[one.engine].title} left out: {one.left_out}", markup=False, soft_wrap=True)
    if result.fastest_build and result.fastest_peer:
        build, peer = (ENGINES[one.engine].title for one in (result.fastest_build, result.fastest_peer))
        print(f"{build} is {result.speed_up:.2f} times as fast as {peer}, the fastest dense fp32 engine here")


def show_demo(result: DemoResult) -> None:
    """The demo's table and where its files are."""
    height, width = result.shape
    first = result.rows[0]
    assert first.psnr is not None
    table = Table(box=None, pad_edge=False, header_style="")
    for index, title in enumerate(("", "PSNR", "file", "ratio", "mult./pixel", "time")):
        table.add_column(title, justify="right" if index else "left")
    largest = max(row.file_bytes or 0 for row in result.rows)
    for row in result.rows:
        gain = "" if row is first or row.psnr is None else f" ({row.psnr - first.psnr:+.2f})"
        table.add_row(
            row.build,
            "" if row.psnr is None else f"{row.psnr:.2f} dB{gain}",
            "" if row.file_bytes is None else f"{row.file_bytes / 1000:.1f} kB",
            "" if row.file_bytes is None else f"{largest / row.file_bytes:.1f}",
            "" if row.multiplications is None else f"{row.multiplications:,.0f}",
            "" if row.milliseconds is None else f"{row.milliseconds:.0f} ms",
        )
    zeros = " and ".join(
        f"{share:.1%} zeros in the {domain.replace('w', 'W')} domain" for domain, share in result.sparsities.items()
    )
    threads = f"{result.threads} thread" + ("" if result.threads == 1 else "s")
    print(f"x3 enlargement to {width} x {height} pixels of a photograph never trained on, {threads},")
    print(f"{result.target}; one file with {zeros}")
    Console(width=110).print(table)
    print(f"pictures, models and packages are in {result.folder}; look at {result.folder / 'comparison.png'}")
