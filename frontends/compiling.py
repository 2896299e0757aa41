"""From a model file to TVM's package: read, choose kernels, build, link."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import model_file
from .container import Library
from .errors import InputError
from .outputs import check_output, replacing
from .ranges import check_sparsity
from .target_strings import find_compiler, parse_target

if TYPE_CHECKING:
    from onnx import ModelProto

    from ..passes.plan import Plan

Shapes = tuple[int, ...] | Mapping[str, tuple[int, ...]]


def compile_model(
    model: Path,
    target: str,
    output: Path,
    *,
    domain: str = "auto",
    winograd_sparsity: float = 0.0,
    cross_compiler: str | None = None,
    tuning_records: Path | None = None,
    input_shapes: Shapes | None = None,
    embed_library: bool = False,
    progress: Callable[[str], None] = lambda stage: None,
) -> Plan:
    """Compile a .jsm or .onnx file for `target` into `output`, a package that ``tvmc run`` runs too.

    Args:
        model: a .jsm or .onnx file. target: as ``target_strings.parse_target`` takes it.
        output: the PACKAGE.tar to write; with `embed_library` the MODEL.jsm.
        domain: where the zeros are used: auto, spatial, winograd or dense, as in ``passes.sparsify``.
        winograd_sparsity: share in [0, 1) of Winograd weights to prune in a model that carries no threshold.
        cross_compiler: C++ compiler that links for a foreign target.
        tuning_records: a log of auto_scheduler or AutoTVM, applied while building.
        input_shapes: for inputs of an ONNX model with open axes: by name, or the shape of the one input.
        embed_library: write the .jsm file with the package in it, beside the weights and what is in it already.
        progress: told the name of each stage as it starts.

    Returns:
        what was decided for every convolution and fully-connected layer.

    Raises:
        InputError: for a bad model, target, compiler, log or output, and for what TVM cannot build.
    """
    # What is wrong with files is found before TVM is imported.
    check_output(output)
    _check_model(model)
    if embed_library and not model.suffix.lower() == output.suffix.lower() == ".jsm":
        raise InputError(f"{model}, {output}: only .jsm files hold libraries; leave --embed-library out, or give two")
    check_sparsity(winograd_sparsity, "Winograd")
    tvm_target = parse_target(target)
    compiler = find_compiler(tvm_target, cross_compiler)
    progress(f"reading {model}")
    mod, params = read_model(model, input_shapes)

    import tvm
    from tvm.driver.tvmc.model import TVMCModel

    from .. import passes

    progress("choosing a kernel for every layer")
    try:
        mod, params, plan = passes.sparsify(mod, params, tvm_target, domain, winograd_sparsity=winograd_sparsity)
    except ValueError as error:  # options that contradict each other or the model's own thresholds
        raise InputError(f"{model}: {error}") from error
    progress(f"building {len(plan)} layers for {tvm_target}")
    with _records(tuning_records) as config, tvm.transform.PassContext(opt_level=3, config=config):
        library = _build(mod, params, tvm_target, model)
    progress("linking")
    with replacing(output) as temporary:
        package = temporary.with_suffix(".tar")
        try:
            TVMCModel(mod, params).export_package(library, str(package), cross=compiler)
        except RuntimeError as error:  # the compiler's own output
            raise InputError(
                f"{compiler or 'the C++ compiler'} could not link the library: {_first_line(error)}"
            ) from error
        if embed_library:
            model_file.embed(Library(str(tvm_target), domain, package.read_bytes()), model, temporary)
        else:
            package.replace(temporary)
    return plan


def _build(mod: Any, params: Mapping[str, Any], target: Any, model: Path) -> Any:
    import tvm

    from . import onnx_graph

    try:
        return tvm.relay.build(mod, target=target, params=params)
    # TVM checks some options of operators as late as here, by assertions and errors of all kinds.
    except Exception as error:
        raise InputError(
            f"{model}: TVM cannot build it for {target.kind.name}: {onnx_graph.first_line(error)}; export the model "
            "without the operator or option named, or use -v to see where"
        ) from error


def read_model(path: Path, input_shapes: Shapes | None = None) -> tuple[Any, dict[str, Any]]:
    """Relay module and parameters of a .jsm or .onnx file.

    Raises:
        InputError: if it is neither, or is broken, or the shapes do not suit it.
    """
    from .onnx_import import to_relay

    return to_relay(read_onnx(path, input_shapes), str(path))


def read_onnx(path: Path, input_shapes: Shapes | None = None) -> ModelProto:
    """The same file as an ONNX model of fixed shapes, thresholds in its metadata.

    Raises:
        InputError: as ``read_model``, but for what TVM cannot import.
    """
    from . import onnx_graph

    _check_model(path)
    if path.suffix.lower() != ".jsm":
        model, name = onnx_graph.read(path)
        onnx_graph.fix_input_shapes(model, model_file.input_shapes(model, input_shapes, name), name)
        return model
    if input_shapes is not None:
        raise InputError(
            f"{path}: its shapes were fixed when it was saved; give shapes to jointsparse compress instead"
        )
    return model_file.read_model(path)


def _check_model(path: Path) -> None:
    if path.suffix.lower() not in (".jsm", ".onnx"):
        raise InputError(f"{path}: not a .jsm or .onnx file; export the model to ONNX or compress it first")
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; check the path")


@contextmanager
def _records(log: Path | None) -> Iterator[dict[str, Any]]:
    """Apply a tuning log, of either of TVM's tuners, and yield the build options that it needs."""
    if log is None:
        yield {}
        return
    from tvm import auto_scheduler, autotvm

    if not log.is_file():
        raise InputError(f"{log}: there is no such tuning log")
    if _readable(lambda: list(auto_scheduler.RecordReader(str(log)))):
        with auto_scheduler.ApplyHistoryBest(str(log)):
            yield {"relay.backend.use_auto_scheduler": True}
    elif _readable(lambda: list(autotvm.record.load_from_file(str(log)))):
        with autotvm.apply_history_best(str(log)):
            yield {}
    else:
        raise InputError(f"{log}: holds no records of auto_scheduler or AutoTVM")


def _readable(read: Callable[[], list[Any]]) -> bool:
    logger = logging.getLogger("autotvm")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return bool(read())
    except Exception:  # what a parser raises at another tuner's lines is not documented
        return False
    finally:
        logger.setLevel(level)


def _first_line(error: Exception) -> str:
    """The first line of a compiler's output that speaks of an error; TVM puts a heading above it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() not in ("", "Compilation error:")]
    return next((line for line in lines if "error" in line.lower()), (lines or ["it said nothing"])[0])
