"""``bench``: one model on this machine, its sparse builds against dense engines."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from .compiling import Shapes, read_onnx
from .engines import ENGINES, OURS, PEERS, find_engine, machine
from .engines.measuring import Entry, Measurement, Setting, Workbench, check_setting, compare
from .errors import InputError

JSON_FORMAT = "jointsparse.bench"
JSON_VERSION = 2

DEFAULT_SETTING = Setting()
DEFAULT_PEERS = ("onnxruntime", "openvino", "torch")


@dataclass(frozen=True)
class BenchResult:
    """What ``bench`` measured.

    Attributes:
        model: the file. setting: threads, instruction set, seconds. machine: as ``engines.machine.describe``.
        measurements: one an engine, in the order in which they ran.
    """

    model: Path
    setting: Setting
    machine: dict[str, Any]
    measurements: tuple[Measurement, ...]

    @property
    def fastest_peer(self) -> Measurement | None:
        """Of the dense fp32 engines."""
        return fastest(self.measurements, PEERS)

    @property
    def fastest_build(self) -> Measurement | None:
        """Of the sparse builds."""
        return fastest(self.measurements, OURS)

    @property
    def speed_up(self) -> float | None:
        """Time of the fastest peer over that of the fastest build, the median of all turns."""
        return ratio(self.fastest_peer, self.fastest_build)

    def to_json(self) -> str:
        """The result as JSON text: stable, documented in docs/cli.md."""
        peer, build = self.fastest_peer, self.fastest_build
        document = {
            "format": JSON_FORMAT,
            "version": JSON_VERSION,
            "model": str(self.model),
            "machine": self.machine,
            "threads": self.setting.threads,
            "isa": self.setting.isa,
            "seconds": self.setting.seconds,
            "engines": [_engine(one) for one in self.measurements],
            "fastest_peer": peer and peer.engine,
            "fastest_build": build and build.engine,
            "speed_up": self.speed_up,
        }
        return json.dumps(document, indent=2, allow_nan=False)


def bench(
    model: Path,
    against: Sequence[str] = DEFAULT_PEERS,
    setting: Setting = DEFAULT_SETTING,
    *,
    input_shapes: Shapes | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> BenchResult:
    """Measure the sparse builds of a .jsm or .onnx file, TVM's dense build, and other engines.

    Each engine runs in a process of its own, pinned to as many cores as threads are asked for, and is compared with a
    reference first; what is wrong, or not installed, is left out with the reason. Then all are measured turn by turn,
    one at a time.

    Args:
        against: names of ``engines.ENGINES`` beside the sparse builds and TVM.
        input_shapes: for inputs of an ONNX model with open axes: by name, or the shape of the one input.
        progress: told the name of each engine as it is built and loaded.

    Raises:
        InputError: for a bad model, engine, shape or setting, and where no sparse build could be measured.
    """
    engines = [find_engine(name) for name in dict.fromkeys((*OURS, "tvm", *against))]
    check_setting(setting)
    where = machine.describe()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        onnx.save_model(read_onnx(model, input_shapes), folder / "model.onnx")
        workbench = Workbench(folder / "model.onnx", folder)
        measurements = compare([Entry(workbench, engine, setting) for engine in engines], progress)
    result = BenchResult(model, setting, where, tuple(measurements))
    if result.fastest_build is None:
        raise InputError(f"{model}: no sparse build could be measured; {measurements[0].left_out}")
    return result


def fastest(measurements: Sequence[Measurement], names: Sequence[str]) -> Measurement | None:
    """The measurement of the shortest turns, by their median, among the engines of these names; None if none of them
    was timed."""
    timed = [(statistics.median(one.turns_ms), one) for one in measurements if one.engine in names and one.turns_ms]
    return min(timed, key=lambda pair: pair[0], default=(0.0, None))[1]


def ratio(slow: Measurement | None, fast: Measurement | None) -> float | None:
    """Time of one over that of the other, the median of all turns; None where one is missing.

    The two have been measured together, so that each turn of one is next to a turn of the other: what made the machine
    slower just then falls out of the quotient.
    """
    if slow is None or fast is None or not slow.turns_ms or not fast.turns_ms:
        return None
    return statistics.median(a / b for a, b in zip(slow.turns_ms, fast.turns_ms, strict=False))


def _engine(measurement: Measurement) -> dict[str, Any]:
    """One entry of ``engines`` in the JSON."""
    times = ("min_ms", "median_ms", "runs", "turns_ms")
    keys = ("version", "left_out", "error", *times, "peak_bytes", "build_seconds", "build_bytes")
    values = asdict(measurement)
    name = measurement.engine
    return {"engine": name, "precision": ENGINES[name].precision, **{key: values[key] for key in keys}}
