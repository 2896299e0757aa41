"""The main job on one page: a dense network in, one small file out, and that file compiled and run on a new photograph.

CT-SRCNN for x3 super-resolution (networks.CTSRCNN; its dense weights ship with the package, made by the recipe
``ct_srcnn_x3``) is fine-tuned jointly sparse on the photographs inside scikit-image, pruned, quantised and written to
one file, which is compiled for this CPU once for each domain and run on a photograph that was never trained on.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import data, shipped
from .compiling import compile_model
from .engines.onnx_runtime import open_session
from .errors import InputError
from .outputs import replacing
from .pictures import in_colour, side_by_side, to_pillow
from .running import package_inputs, run_package
from .state_dicts import load_weights
from .target_strings import host_target

if TYPE_CHECKING:
    from torch import nn

    from ..passes.plan import Plan
    from .joint_sparsity import JointSparsity

Progress = Callable[[str], None]
Image = NDArray[np.float32]

SCALE = 3
TEST_PHOTO = "astronaut.png"
"""Never trained on."""
TRAINING_PHOTOS = (
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "motorcycle_left.png",
    "rocket.jpg",
)
"""Photographs inside scikit-image's wheel; nothing is downloaded."""

DETAIL = (336, 120, 100, 100)
"""Top, left, height and width of the part of the test photograph that the picture shows."""


@dataclass(frozen=True)
class Settings:
    """How the demo trains and measures; the tests shorten it.

    Attributes:
        steps: optimiser steps in all. spatial, winograd: target sparsities. tile: of F(tile x tile, r x r).
        exclude: layers left alone: the last one has so few and so small weights that a common threshold takes all.
        rate: peak learning rate. ramp: share of the steps over which the targets rise. hold: share of the steps, at
            the end, with the pruned weights held at zero.
        increase: of the mean square error by quantisation, at most. calibration: batches to measure it on.
        repeat: measurements of each build, the fastest counts.
        crop: rows and columns of the test photograph to use, None for all.
    """

    steps: int = 2000
    spatial: float = 0.85
    winograd: float = 0.85
    tile: int = 4
    exclude: tuple[str, ...] = ("conv8",)
    patch: int = 36
    batch: int = 16
    rate: float = 1e-3
    ramp: float = 0.3
    hold: float = 0.5
    increase: float = 2e-5
    calibration: int = 24
    repeat: int = 10
    crop: tuple[int, int] | None = None


@dataclass(frozen=True)
class Row:
    """One line of the demo's table; None where a column does not apply.

    Attributes:
        build: what ran. psnr: of its output, dB. file_bytes: of the model's file.
        multiplications: per pixel of the image. milliseconds: of the fastest run.
    """

    build: str
    psnr: float | None = None
    file_bytes: int | None = None
    multiplications: float | None = None
    milliseconds: float | None = None


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured.

    Attributes:
        rows: of the table. shape: height and width of the photograph. threads: used by every engine.
        target: the TVM target. sparsities: shares of zeros in the file, by domain. folder: where the files are.
    """

    rows: tuple[Row, ...]
    shape: tuple[int, int]
    threads: int
    target: str
    sparsities: dict[str, float]
    folder: Path


def run_demo(output: Path, settings: Settings = Settings(), progress: Progress = lambda stage: None) -> DemoResult:
    """Fine-tune, compress, compile, run and compare.

    Args:
        output: folder for the models, packages, pictures and results.json; made where missing.
        settings: see Settings. progress: told the name of each stage as it starts.

    Raises:
        InputError: if `output` is not a folder, scikit-image's photographs are missing, or TVM_NUM_THREADS is no
            number.
    """
    import torch

    _make_folder(output)
    torch.manual_seed(0)
    threads = _set_threads()
    pair, colour = _test_photo(settings.crop)
    example = torch.from_numpy(pair.low)[None, None]

    from . import inspect, save
    from .model_file import decompress

    dense_jsm, sparse_jsm = output / "dense.jsm", output / "ct_srcnn.jsm"
    model = _dense_network()
    save(model, example, dense_jsm)
    decompress(dense_jsm, output / "dense.onnx")
    objective = fine_tune(model, settings, progress)
    progress("writing one file")
    save(model, example, sparse_jsm, objective=objective)
    info = inspect(sparse_jsm)

    target = host_target()
    sources = {"dense": dense_jsm, "spatial": sparse_jsm, "winograd": sparse_jsm, "auto": sparse_jsm}
    plans = {}
    for domain, source in sources.items():
        progress(f"compiling for {target}: {domain}")
        plans[domain] = compile_model(source, target, output / f"{domain}.tar", domain=domain)
    progress("running on a photograph never trained on")
    images, times = _run_builds(output, pair.low, settings.repeat, threads)
    _draw(output, pair, colour, images)
    pixels = pair.low.size
    dense_bytes = (output / "dense.onnx").stat().st_size
    rows = [Row("bicubic", data.psnr(pair.low, pair.high, SCALE))]
    for domain, name in _BUILDS.items():
        size = dense_bytes if domain in ("onnxruntime", "dense") else info.file_bytes
        plan = plans.get(domain, plans["dense"])
        psnr = data.psnr(images[domain], pair.high, SCALE)
        rows.append(Row(name, psnr, size, _multiplications(plan) / pixels, times[domain]))
    result = DemoResult(
        rows=tuple(rows),
        shape=(pair.low.shape[0], pair.low.shape[1]),
        threads=threads,
        target=target,
        sparsities={"spatial": info.spatial_sparsity, "winograd": info.winograd_sparsity or 0.0},
        folder=output,
    )
    with replacing(output / "results.json") as temporary:
        temporary.write_text(json.dumps(asdict(result), indent=1, default=str) + "\n")
    return result


_BUILDS = {
    "onnxruntime": "dense, ONNX Runtime",
    "dense": "dense, TVM",
    "spatial": "spatial",
    "winograd": "Winograd",
    "auto": "auto",
}


# --- training --------------------------------------------------------------------------------------------------------


def fine_tune(model: nn.Module, settings: Settings, progress: Progress) -> JointSparsity:
    """Train `model` jointly sparse, in place: an ordinary loop with the objective in it; then prune and quantise."""
    import torch
    import torch.nn.functional as F

    from . import JointSparsity, quantize_within_

    objective = JointSparsity(
        model,
        settings.spatial,
        settings.winograd,
        settings.tile,
        ramp=round(settings.ramp * settings.steps),
        exclude=settings.exclude,
    )
    batches = data.PatchBatches(
        [_pair(name) for name in TRAINING_PHOTOS],
        scale=SCALE,
        patch=settings.patch,
        batch=settings.batch,
        length=settings.steps,
        shrink=(0.9, 0.8, 0.7, 0.6),
    )
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
    optimiser = torch.optim.Adam([*model.parameters(), *objective.parameters()], lr=settings.rate)
    bfloat16 = _has_bfloat16()

    mean = 0.0
    for index in range(settings.steps):
        for group in optimiser.param_groups:
            group["lr"] = settings.rate * _schedule(index, settings.steps)
        low, high = batches[index]
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            enlarged = model(low.contiguous(memory_format=torch.channels_last))
        loss = F.mse_loss(enlarged.float(), high)
        optimiser.zero_grad()
        (loss + objective(loss)).backward()
        optimiser.step()
        if index == round((1 - settings.hold) * settings.steps):
            objective.prune_("spatial")
        objective.hold_()
        mean += (loss.item() - mean) / min(index + 1, 100)
        if index % max(1, settings.steps // 10) == 0:
            progress(f"fine-tuning, step {index} of {settings.steps}: {-10 * math.log10(mean):.2f} dB")
    objective.prune_("spatial")
    progress(f"quantising within {settings.increase:g} of the mean square error")
    batches.epoch = 1
    calibration = [batches[i] for i in range(min(settings.calibration, len(batches)))]
    quantize_within_(model, calibration, settings.increase, objective=objective)
    return objective


def _schedule(step: int, steps: int) -> float:
    """A short warm-up, then half a cosine."""
    return min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself; elsewhere autocast would slow training down."""
    import torch

    found: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get("amx_bf16") or found.get("avx512_bf16"))


def _dense_network() -> nn.Module:
    from .networks import build

    model = build("ct-srcnn")
    load_weights(model, shipped.weights("ct_srcnn_x3"))
    return model.eval()


# --- photographs -----------------------------------------------------------------------------------------------------


def _photo(name: str) -> NDArray[np.uint8]:
    """H x W or H x W x 3, from scikit-image's own folder, so that it never downloads."""
    import skimage
    from PIL import Image as Pillow

    path = Path(skimage.__file__).parent / "data" / name
    if not path.is_file():
        raise InputError(f"{path}: this scikit-image lacks the photograph; install the version in constraints/")
    with Pillow.open(path) as picture:
        return np.asarray(picture if picture.mode == "L" else picture.convert("RGB"))


def _pair(name: str) -> data.Pair:
    return data.enlarged_pair(data.luma(_photo(name)), SCALE, name)


def _test_photo(crop: tuple[int, int] | None) -> tuple[data.Pair, Image]:
    """The pair, and the photograph in colour, H x W x 3 in [0, 1], cropped alike."""
    photo = _photo(TEST_PHOTO)
    if crop:
        photo = photo[: crop[0], : crop[1]]
    pair = data.enlarged_pair(data.luma(photo), SCALE, TEST_PHOTO)
    height, width = pair.high.shape
    return pair, (photo[:height, :width] / 255).astype(np.float32)


# --- builds ----------------------------------------------------------------------------------------------------------


def _run_builds(folder: Path, low: Image, repeat: int, threads: int) -> tuple[dict[str, Image], dict[str, float]]:
    """Output image and milliseconds of the fastest run, by build. The engines take turns, so that both see the same
    machine."""
    onnxruntime = _onnxruntime(folder / "dense.onnx", threads)
    engines: dict[str, Callable[[Any, int], tuple[Image, float]]] = {"onnxruntime": onnxruntime}
    for domain in ("dense", "spatial", "winograd", "auto"):
        engines[domain] = _package(folder / f"{domain}.tar")
    images, times = {}, dict.fromkeys(engines, math.inf)
    for _ in range(2):
        for name, engine in engines.items():
            images[name], milliseconds = engine(low[None, None], max(1, repeat // 2))
            times[name] = min(times[name], milliseconds)
    return images, times


def _package(path: Path) -> Callable[[Any, int], tuple[Image, float]]:
    def run(x: NDArray[np.float32], repeat: int) -> tuple[Image, float]:
        name = next(iter(package_inputs(path)))
        result = run_package(path, {name: x}, time=True, repeat=repeat)
        return next(iter(result.outputs.values()))[0, 0], 1e3 * result.times.min

    return run


def _onnxruntime(path: Path, threads: int) -> Callable[[Any, int], tuple[Image, float]]:
    session = open_session(path, threads)
    name = session.get_inputs()[0].name

    def run(x: NDArray[np.float32], repeat: int) -> tuple[Image, float]:
        image = session.run(None, {name: x})[0]  # Also the warm-up.
        seconds = []
        for _ in range(repeat):
            start = perf_counter()
            session.run(None, {name: x})
            seconds.append(perf_counter() - start)
        return image[0, 0], 1e3 * min(seconds)

    return run


def _set_threads() -> int:
    """Threads of every engine: TVM_NUM_THREADS if it is set, else as many as torch takes.

    TVM by itself takes half of the cores, in case they are hyper-threads; torch counts the real ones.
    """
    import torch

    given = os.environ.setdefault("TVM_NUM_THREADS", str(torch.get_num_threads()))
    if not given.isdecimal() or int(given) < 1:
        raise InputError(f"TVM_NUM_THREADS is {given!r}; set it to a number of threads, or not at all")
    return int(given)


def _multiplications(plan: Plan) -> float:
    """Of one run."""
    return sum(layer.multiplications or 0 for layer in plan)


# --- pictures --------------------------------------------------------------------------------------------------------


def _draw(folder: Path, pair: data.Pair, colour: Image, images: Mapping[str, Image]) -> None:
    """Every output as a colour PNG, and ``comparison.png``: one detail of each side by side, doubled in size."""
    small = [data.resize(colour[:, :, c], pair.high.shape[0] // SCALE, pair.high.shape[1] // SCALE) for c in range(3)]
    enlarged = np.stack([data.resize(channel, *pair.high.shape) for channel in small], -1)
    pictures: dict[str, NDArray[np.floating]] = {"bicubic": enlarged, "original": colour}
    for build in ("dense", "spatial", "winograd"):
        pictures[build] = in_colour(enlarged, images[build] - pair.low)
    for name, picture in pictures.items():
        with replacing(folder / f"{name}.png") as temporary:
            to_pillow(picture).save(temporary)
    lumas = {"bicubic": pair.low, **images}
    panels = []
    for name in ("bicubic", "dense", "spatial", "winograd", "original"):
        label = (
            f"{_BUILDS.get(name, name).split(',')[0]}  {data.psnr(lumas[name], pair.high, SCALE):.2f} dB"
            if name in lumas
            else name
        )
        panels.append((label, pictures[name]))
    with replacing(folder / "comparison.png") as temporary:
        side_by_side(panels, DETAIL).save(temporary)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot make this folder ({error.strerror})") from error
