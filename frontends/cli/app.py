"""The commands and their arguments. Each calls one function of ``jointsparse.frontends`` and prints what it returns."""

from __future__ import annotations

import sys
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from . import console, texts, values, views

app = typer.Typer(
    name="jointsparse",
    help=texts.APP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Verbose = Annotated[bool, typer.Option("-v", "--verbose", callback=console.set_verbose, help=texts.VERBOSE)]
Json = Annotated[bool, typer.Option("--json", help=texts.JSON)]


class Domain(str, Enum):
    """Choices of --domain."""

    auto = "auto"
    spatial = "spatial"
    winograd = "winograd"
    dense = "dense"


class Isa(str, Enum):
    """Choices of --isa."""

    native = "native"
    avx2 = "avx2"


class FillMode(str, Enum):
    """Choices of --fill-mode."""

    random = "random"
    zeros = "zeros"
    ones = "ones"


def main() -> None:
    """Entry point: run the command and turn failures into one line and an exit code."""
    try:
        app(prog_name="jointsparse")
    except Exception as error:
        console.report(error)
        sys.exit(1)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"jointsparse {version('jointsparse')}")
        raise typer.Exit


@app.callback()
def _common(
    verbose: Verbose = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help=texts.VERSION)
    ] = False,
) -> None:
    pass


@app.command(help=texts.DEMO)
def demo(
    output: Annotated[Path, typer.Option("--output", help=texts.OUTPUT_DIR)] = Path("demo-output"),
    verbose: Verbose = False,
) -> None:
    from ..demo import run_demo

    console.quieten_tvm()
    with console.stages() as progress:
        result = run_demo(output, progress=progress)
    views.show_demo(result)


@app.command(help=texts.TRAIN)
def train(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help=texts.RECIPE)],
    data: Annotated[Path, typer.Option("--data", help=texts.DATA)] = Path("data"),
    output: Annotated[Path, typer.Option("--output", help=texts.OUTPUT_DIR)] = Path("runs"),
    resume: Annotated[bool, typer.Option("--resume", help=texts.RESUME)] = False,
    weights: Annotated[Path | None, typer.Option("--weights", help=texts.WEIGHTS)] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="TABLE.KEY=VALUE", help=texts.SET)] = None,
    processes: Annotated[int, typer.Option("--processes", min=1, metavar="N", help=texts.PROCESSES)] = 1,
    verbose: Verbose = False,
) -> None:
    with values.usage(context):
        overrides = values.overrides(settings or [])
    from ..shipped import find_recipe
    from ..training import train

    results = train(
        find_recipe(recipe),
        data,
        output,
        resume,
        weights=weights,
        overrides=overrides,
        processes=processes,
    )
    # Other processes than the first run this as well, and have no results.
    if results:
        views.show_training(results, output)


@app.command(help=texts.COMPRESS)
def compress(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(metavar="MODEL", help=texts.MODEL_TO_COMPRESS)],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="MODEL.jsm", help=texts.OUTPUT_FILE)],
    spatial_sparsity: Annotated[float, typer.Option("--spatial-sparsity", help=texts.SPATIAL_SPARSITY)] = 0.0,
    winograd_sparsity: Annotated[float, typer.Option("--winograd-sparsity", help=texts.WINOGRAD_SPARSITY)] = 0.0,
    step: Annotated[float | None, typer.Option("--step", metavar="D", help=texts.STEP)] = None,
    bits: Annotated[int | None, typer.Option("--bits", metavar="B", help=texts.BITS)] = None,
    dither: Annotated[bool, typer.Option("--dither", help=texts.DITHER)] = False,
    seed: Annotated[int, typer.Option("--seed", help=texts.SEED)] = 0,
    tile: Annotated[int, typer.Option("--tile", metavar="M", help=texts.TILE)] = 4,
    network: Annotated[str | None, typer.Option("--network", help=texts.NETWORK)] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help=texts.NETWORK_SET)] = None,
    input_shapes: Annotated[str | None, typer.Option("--input-shapes", help=texts.INPUT_SHAPES)] = None,
    verbose: Verbose = False,
) -> None:
    from ..ranges import check_quantiser, check_sparsity, check_tile

    with values.usage(context):
        check_sparsity(spatial_sparsity, "spatial")
        check_sparsity(winograd_sparsity, "Winograd")
        check_quantiser(step, bits, seed)
        check_tile(tile)
        shapes = values.shapes(input_shapes)
        options = values.overrides(settings or [])
        if options and network is None:
            raise InputError("--set gives options of a network; name it with --network")
    from .. import compress, inspect
    from ..outputs import check_output

    check_output(output)
    compress(
        model,
        output,
        spatial_sparsity=spatial_sparsity,
        winograd_sparsity=winograd_sparsity,
        step=step,
        bits=bits,
        dither=dither,
        seed=seed,
        tile=tile,
        network=network,
        network_options=options,
        input_shape=shapes,
    )
    views.show_size(inspect(output))


@app.command(help=texts.INSPECT)
def inspect(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help=texts.JSM)],
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    from .. import inspect

    views.show_file(inspect(model), json)


@app.command(help=texts.DECOMPRESS)
def decompress(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help=texts.JSM)],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="MODEL.onnx", help=texts.OUTPUT_FILE)],
    verbose: Verbose = False,
) -> None:
    from .. import decompress

    decompress(model, output)
    views.show_written(output)


@app.command(help=texts.COMPILE)
def compile(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(metavar="MODEL", help=texts.MODEL_TO_COMPILE)],
    target: Annotated[str, typer.Option("--target", help=texts.TARGET)],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="PACKAGE.tar", help=texts.OUTPUT_FILE)],
    cross_compiler: Annotated[str | None, typer.Option("--cross-compiler", help=texts.CROSS_COMPILER)] = None,
    domain: Annotated[Domain, typer.Option("--domain", help=texts.DOMAIN)] = Domain.auto,
    winograd_sparsity: Annotated[
        float, typer.Option("--winograd-sparsity", help=texts.COMPILE_WINOGRAD_SPARSITY)
    ] = 0.0,
    tuning_records: Annotated[Path | None, typer.Option("--tuning-records", help=texts.TUNING_RECORDS)] = None,
    input_shapes: Annotated[str | None, typer.Option("--input-shapes", help=texts.INPUT_SHAPES)] = None,
    embed_library: Annotated[bool, typer.Option("--embed-library", help=texts.EMBED_LIBRARY)] = False,
    explain: Annotated[bool, typer.Option("--explain", help=texts.EXPLAIN)] = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    from ..ranges import check_sparsity

    with values.usage(context):
        check_sparsity(winograd_sparsity, "Winograd")
        shapes = values.shapes(input_shapes)
    from ..compiling import compile_model

    console.quieten_tvm()
    with console.stages() as progress:
        plan = compile_model(
            model,
            target,
            output,
            domain=domain.value,
            winograd_sparsity=winograd_sparsity,
            cross_compiler=cross_compiler,
            tuning_records=tuning_records,
            input_shapes=shapes,
            embed_library=embed_library,
            progress=progress,
        )
    views.show_plan(plan, output, explain=explain, json=json)


@app.command(help=texts.RUN)
def run(
    package: Annotated[Path, typer.Argument(metavar="PACKAGE", help=texts.PACKAGE)],
    inputs: Annotated[Path | None, typer.Option("-i", "--inputs", metavar="IN.npz", help=texts.INPUTS)] = None,
    outputs: Annotated[Path | None, typer.Option("-o", "--outputs", metavar="OUT.npz", help=texts.OUTPUTS)] = None,
    target: Annotated[str | None, typer.Option("--target", help=texts.RUN_TARGET)] = None,
    fill_mode: Annotated[FillMode, typer.Option("--fill-mode", help=texts.FILL_MODE)] = FillMode.random,
    print_time: Annotated[bool, typer.Option("--print-time", help=texts.PRINT_TIME)] = False,
    repeat: Annotated[int, typer.Option("--repeat", min=1, metavar="N", help=texts.REPEAT)] = 1,
    number: Annotated[int, typer.Option("--number", min=1, metavar="N", help=texts.NUMBER)] = 1,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    from ..outputs import check_output
    from ..running import read_inputs, run_package, threads, write_outputs

    console.quieten_tvm()
    if outputs:
        check_output(outputs)
    result = run_package(
        package,
        read_inputs(inputs) if inputs else None,
        target=target,
        fill_mode=fill_mode.value,
        time=print_time,
        repeat=repeat,
        number=number,
    )
    if outputs:
        write_outputs(result.outputs, outputs)
    views.show_run(result, threads(), outputs, json)


@app.command(help=texts.BENCH)
def bench(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(metavar="MODEL", help=texts.MODEL_TO_BENCH)],
    against: Annotated[str, typer.Option("--against", metavar="NAME,...", help=texts.AGAINST)] = (
        "onnxruntime,openvino,torch"
    ),
    threads: Annotated[int, typer.Option("--threads", min=1, metavar="N", help=texts.THREADS)] = 1,
    isa: Annotated[Isa, typer.Option("--isa", help=texts.ISA)] = Isa.native,
    seconds: Annotated[float, typer.Option("--seconds", metavar="S", help=texts.SECONDS)] = 5.0,
    input_shapes: Annotated[str | None, typer.Option("--input-shapes", help=texts.INPUT_SHAPES)] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    from ..benchmark import bench
    from ..engines import find_engine
    from ..engines.measuring import Setting

    with values.usage(context):
        if not seconds > 0:
            raise InputError(f"--seconds {seconds:g}: give more than 0")
        names = [name.strip() for name in against.split(",") if name.strip()]
        for name in names:
            find_engine(name)
        shapes = values.shapes(input_shapes)
    with console.stages() as progress:
        result = bench(model, names, Setting(threads, isa.value, seconds), input_shapes=shapes, progress=progress)
    views.show_bench(result, json)
