"""Models to ``.jsm`` files and back: ``save``, ``load``, ``decompress``, and the steps they share."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import ModelProto, helper

from . import batch_norm, container, container_decoder, container_encoder, onnx_graph, winograd_spec
from .container import Contents, Library, Record, Shared
from .errors import InputError
from .outputs import replacing
from .quantization import LayerQuantization

if TYPE_CHECKING:
    import torch
    import tvm

    from .joint_sparsity import JointSparsity

PathLike = str | os.PathLike[str]

# Smaller tensors than this cost more in the index than in the graph.
_IN_GRAPH_BYTES = 64


def save(
    model: torch.nn.Module | PathLike | ModelProto,
    example_input: Any,
    path: PathLike,
    objective: JointSparsity | None = None,
) -> None:
    """Write a model to a ``.jsm`` file, losslessly: weights as they are, quantised ones as codes.

    Args:
        model: a torch module (evaluation mode is used), or an ONNX file or ModelProto.
        example_input: for a torch module, a tensor or a tuple of tensors; for ONNX, None, a shape or array for its one
            input, or a dict of them by input name. It fixes every open axis; without it an open batch axis becomes 1.
        path: the file to write; replaced only when all is done.
        objective: its ``winograd_spec()`` becomes part of the function in the file. Without it, one that the ONNX
            model carries in its metadata does.

    Modules that ``quantize_`` has treated are stored as codes. BatchNorm is folded.

    Raises:
        InputError: the model cannot be exported or stored, the objective is of another module, quantised weights are
            not float32 or were changed after ``quantize_``, or the file cannot be written.
    """
    if isinstance(model, str | os.PathLike | ModelProto):
        proto, name = onnx_graph.read(model)
        onnx_graph.fix_input_shapes(proto, input_shapes(proto, example_input, name), name)
        quantised: dict[str, LayerQuantization] = {}
        parameters: set[str] = set()
    else:
        from . import exporting

        proto, name = exporting.export(model, example_input), type(model).__name__
        # A parameter that two modules share has two names; either may be an objective's or a quantiser's.
        parameters = {key for key, _ in model.named_parameters(remove_duplicate=False)}
        quantised = _quantisations(model)
        _check_names(quantised, parameters, name, "remove the parametrisation before quantize_")
    # Before names are looked up: the exporter puts Identity nodes where two tensors are equal.
    onnx_graph.tidy(proto, name)
    if objective is not None:
        parameters.update(onnx_graph.initializers(proto))
        spec = objective.winograd_spec()
        _check_names(spec, parameters, name, "build the objective on the very module you save (under DDP its .module)")
        _attach(proto, spec)
    write(pack(proto, quantised, name), path)


def load(path: PathLike) -> tuple[tvm.IRModule, dict[str, tvm.nd.NDArray]]:
    """Relay module and parameters of a ``.jsm`` file; the weights are ``params[name]``.

    Winograd thresholds are the module attribute ``jointsparse.winograd`` (see ``winograd_spec``).

    Raises:
        InputError: the file is damaged, foreign, too new or too large, or TVM cannot import its graph.
    """
    from .onnx_import import to_relay

    return to_relay(read_model(path), str(path))


def decompress(source: PathLike, destination: PathLike) -> None:
    """Turn a ``.jsm`` file into an ONNX file with the same weights, BatchNorm folded, thresholds in its metadata.

    Raises:
        InputError: as ``load``, or the destination cannot be written.
    """
    model = read_model(source)
    with replacing(Path(destination)) as temporary:
        onnx.save_model(model, temporary)


def read_model(path: PathLike) -> ModelProto:
    """The ONNX model a ``.jsm`` file holds, checked.

    Raises:
        InputError: the file is damaged, foreign, too new or too large.
    """
    model = unpack(read(path))
    onnx_graph.check(model, str(path))
    return model


def read(path: PathLike) -> Contents:
    """The contents of a ``.jsm`` file.

    Raises:
        InputError: the file is damaged, foreign, too new or too large.
    """
    return container_decoder.decode(_read_bytes(Path(path)), str(path))


def embed(library: Library, source: PathLike, destination: PathLike) -> None:
    """Write a ``.jsm`` file with a library more, in the place of one of the same target and domain.

    Raises:
        InputError: as ``read`` and ``write``.
    """
    contents = read(source)
    others = [one for one in contents.libraries if (one.target, one.domain) != (library.target, library.domain)]
    libraries = tuple(sorted([*others, library], key=lambda one: (one.target, one.domain)))
    write(replace(contents, libraries=libraries), destination)


def write(contents: Contents, path: PathLike) -> None:
    """Write contents to a ``.jsm`` file, which appears only when complete and after reading it back.

    Raises:
        InputError: a limit of the format is exceeded, or the file cannot be written.
    """
    data = container_encoder.encode(contents)
    found = container_decoder.decode(data, str(path))
    again = unpack(found).SerializeToString(deterministic=True)
    if again != unpack(contents).SerializeToString(deterministic=True) or found.libraries != contents.libraries:
        raise RuntimeError("the file does not decode to what was encoded; please report this with the model")
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(data)


def pack(
    model: ModelProto, quantised: Mapping[str, LayerQuantization], name: str, digits: int | None = None
) -> Contents:
    """An ONNX model as the contents of a file; ``model`` is changed.

    BatchNorm is folded; a folded tensor is kept as its unscaled values and a scale, so that codes stay codes.

    Args:
        model: thresholds in its metadata are for its unscaled weights.
        quantised: codes of initializers by name; each must give exactly the initializer's value.
        name: of the model, for messages.
        digits: binary digits, behind the point, to which scales and biases are rounded; None for all.

    Raises:
        InputError: codes and weights differ, or the metadata is no specification for this model.
    """
    onnx_graph.tidy(model, name)
    onnx_graph.strip(model)
    tensors = onnx_graph.initializers(model)
    codes = _checked_codes(quantised, model, name)
    shapes = {key: tuple(tensor.dims) for key, tensor in tensors.items()}
    text = onnx_graph.metadata(model, winograd_spec.KEY)
    spec = winograd_spec.parse(text, shapes, name) if text else {}
    originals = {key: onnx_graph.array(tensors[key]) for key in onnx_graph.weight_uses(model)}
    scalings = batch_norm.fold(model)
    if digits is not None:
        scalings = batch_norm.shorten(model, scalings, digits)
    records: dict[str, Record] = {}
    holders: dict[str, str] = {}
    for tensor in model.graph.initializer:
        scaling = scalings.get(tensor.name)
        source = scaling.source if scaling else tensor.name
        value = originals[source] if scaling else onnx_graph.array(tensor)
        if source not in codes and source not in spec and not _belongs_in_index(value):
            continue
        if not container.can_hold(value):
            raise InputError(f"{name}: weight {source!r} is {value.dtype.name}; call model.float() before saving it")
        base: Any = Shared(holders[source]) if source in holders else codes.get(source, value)
        holders.setdefault(source, tensor.name)
        records[tensor.name] = Record(
            tensor.name, value.shape, base, scaling.scale if scaling else None, scaling.axis if scaling else 0
        )
    winograd = {
        key: spec[source] for key in records if (source := scalings[key].source if key in scalings else key) in spec
    }
    _remove_tensors(model, records)
    onnx_graph.set_metadata(model, winograd_spec.KEY, None)
    return Contents(model, tuple(records.values()), winograd)


def unpack(contents: Contents) -> ModelProto:
    """The ONNX model with its weights, and the thresholds, scaled, in its metadata.

    W = float32(base * scale), one product an entry, so that every platform gets the same bits.
    """
    model = ModelProto()
    model.CopyFrom(contents.graph)
    bases: dict[str, np.ndarray] = {}
    shared = {record.base.of for record in contents.records if isinstance(record.base, Shared)}
    spec = dict(contents.winograd)
    for record in contents.records:
        value = base_values(record, bases)
        if record.name in shared:
            bases[record.name] = value
        if record.scale is not None:
            value = batch_norm.scaled(value, record.scale, record.axis)
        if record.scale is not None and record.name in spec:
            spec[record.name] = spec[record.name].scaled(record.scale)
        tensor = model.graph.initializer.add(
            name=record.name, dims=value.shape, data_type=helper.np_dtype_to_tensor_dtype(value.dtype)
        )
        # Each of these may be as large as the model: one at a time.
        data = value.astype(value.dtype.newbyteorder("<"), copy=False).tobytes()
        del value
        tensor.raw_data = data
        del data
    if spec:
        onnx_graph.set_metadata(model, winograd_spec.KEY, winograd_spec.dump(spec))
    return model


def base_values(record: Record, bases: Mapping[str, np.ndarray]) -> np.ndarray:
    """The unscaled values of a record; ``bases`` has those of the records that others share."""
    if isinstance(record.base, Shared):
        return bases[record.base.of]
    return record.base.dequantize() if isinstance(record.base, LayerQuantization) else record.base


def input_shapes(model: ModelProto, example: Any, name: str) -> dict[str, tuple[int, ...]] | None:
    """Shapes by input name from what a caller gives: None, a shape or array for the one input, or a dict of them.

    Raises:
        InputError: one shape for a model of several inputs.
    """
    if example is None:
        return None
    if isinstance(example, Mapping):
        return {key: _shape(value) for key, value in example.items()}
    names = [value.name for value in model.graph.input if value.name not in onnx_graph.initializers(model)]
    values = [example] if len(names) == 1 and not _is_sequence_of_arrays(example) else list(example)
    if len(values) != len(names):
        raise InputError(f"{name}: {len(names)} inputs ({', '.join(names)}), {len(values)} shapes; give a dict by name")
    return {key: _shape(value) for key, value in zip(names, values, strict=True)}


def _is_sequence_of_arrays(example: Any) -> bool:
    return isinstance(example, list | tuple) and bool(example) and not isinstance(example[0], int)


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in getattr(value, "shape", value))


def _quantisations(module: torch.nn.Module) -> dict[str, LayerQuantization]:
    """The codes that ``quantize_`` left on a module, by parameter name."""
    found = {f"{path}.weight" if path else "weight": part for path, part in module.named_modules()}
    return {
        name: part.quantization
        for name, part in found.items()
        if isinstance(getattr(part, "quantization", None), LayerQuantization)
    }


def _checked_codes(
    quantised: Mapping[str, LayerQuantization], model: ModelProto, name: str
) -> dict[str, LayerQuantization]:
    tensors = onnx_graph.initializers(model)
    for key, codes in quantised.items():
        if key not in tensors:
            warnings.warn(f"{name}: quantised weight {key!r} takes no part in the model; left out", stacklevel=4)
            continue
        weight = onnx_graph.array(tensors[key])
        if weight.dtype != np.float32:
            raise InputError(f"{name}: quantised weight {key!r} is {weight.dtype}; call model.float() before quantize_")
        if not np.array_equal(codes.dequantize(), weight):
            raise InputError(f"{name}: weight {key!r} was changed after quantize_; quantise again before saving")
    return {key: codes for key, codes in quantised.items() if key in tensors}


def _check_names(names: Iterable[str], parameters: AbstractSet[str], model: str, remedy: str) -> None:
    """Refuse names of weights that are no parameter of the model to be saved: their sparsity would be lost."""
    if foreign := sorted(set(names) - parameters):
        raise InputError(f"{model}: {foreign[0]!r} is no weight of the model to be saved; {remedy}")


def _attach(model: ModelProto, spec: Mapping[str, Any]) -> None:
    """Put an objective's thresholds into the metadata, those of layers the model does not use left out."""
    used = {name for node in model.graph.node for name in node.input}
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer if tensor.name in used}
    for key in spec.keys() - shapes.keys():
        warnings.warn(f"the objective's layer {key!r} takes no part in the model; left out", stacklevel=3)
    kept = {key: value for key, value in spec.items() if key in shapes}
    parsed = winograd_spec.parse(kept, shapes, "the objective")
    onnx_graph.set_metadata(model, winograd_spec.KEY, winograd_spec.dump(parsed) if parsed else None)


def _belongs_in_index(value: np.ndarray) -> bool:
    return value.nbytes > _IN_GRAPH_BYTES and container.can_hold(value)


def _remove_tensors(model: ModelProto, names: Mapping[str, Any]) -> None:
    kept = [onnx_graph.copied(tensor) for tensor in model.graph.initializer if tensor.name not in names]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def _read_bytes(path: Path) -> bytes:
    try:
        # A device or a pipe could be endless.
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: not a file; give a .jsm file")
        if path.stat().st_size > container.FILE_MOST:
            raise InputError(f"{path}: larger than a .jsm file can be ({container.FILE_MOST} bytes)")
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file; check the path") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
