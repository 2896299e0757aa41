"""Measurements of many networks in one JSON file, which grows as they come."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.rows import case_of
from jointsparse.frontends.benchmark import fastest, ratio
from jointsparse.frontends.engines import ENGINES, NATIVE, OURS, PEERS, machine
from jointsparse.frontends.engines.measuring import Measurement, Setting
from jointsparse.frontends.errors import InputError
from jointsparse.frontends.outputs import check_output, replacing

FORMAT = "jointsparse.benchmarks"
VERSION = 1

Key = tuple[str, float, str, int, str]
"""Network, sparsity (0 for dense engines), engine, threads, instruction set."""


@dataclass
class Results:
    """Measurements by what was measured.

    The file is an object with ``format`` ("jointsparse.benchmarks"), ``version`` (1), ``machine`` (see
    ``engines.machine``), ``results``: objects with ``network``, ``sparsity`` and the attributes of ``Measurement``; and
    ``table``: objects with ``network``, ``sparsity``, ``threads``, ``isa``, ``fastest_build``, ``fastest_peer`` (names
    or null), ``speed_up`` (of the first over the second, by least times), ``at_least`` and ``aim`` (null where nothing
    is asked for).

    Attributes:
        path: of the file, None to keep nothing. machine: that all of them are from.
    """

    path: Path | None
    machine: dict[str, Any]
    measurements: dict[Key, Measurement] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path | None) -> Results:
        """Those in a file, or none.

        Raises:
            InputError: the file is of another kind or another machine, or cannot be written.
        """
        here = machine.describe()
        results = cls(path, here)
        if path is None:
            return results
        check_output(path)
        if not path.exists():
            return results
        document = _read(path)
        if document["machine"] != here:
            raise InputError(f"{path}: holds results of another machine ({document['machine']}); name another file")
        for entry in document["results"]:
            network, sparsity = entry.pop("network"), entry.pop("sparsity")
            results._put(network, sparsity, Measurement(**entry))
        return results

    def rounds(self, network: str, sparsity: float, engine: str, setting: Setting, version: str | None) -> int:
        """How often this has been measured: with times, of this version and in no shorter measurement, and with
        operators if asked for."""
        found = self.get(network, sparsity, engine, setting)
        if found is None or found.min_ms is None or found.version != version or found.seconds < setting.seconds:
            return 0
        lacks_operators = setting.layers and found.plan is not None and found.operators is None
        return 0 if lacks_operators else found.rounds

    def get(self, network: str, sparsity: float, engine: str, setting: Setting) -> Measurement | None:
        """The measurement of an engine, None where there is none."""
        return self.measurements.get((network, sparsity, engine, setting.threads, setting.isa))

    def add(self, network: str, sparsity: float, measurement: Measurement, *, again: bool = False) -> None:
        """Take a measurement in, and write the file.

        Args:
            again: it is one more round of what is there; the faster of both stays, with the operators that were timed.
        """
        before = self.measurements.get(_key(network, sparsity, measurement)) if again else None
        if before is not None and before.min_ms is not None and measurement.min_ms is not None:
            faster = measurement if measurement.min_ms < before.min_ms else before
            measurement = replace(
                faster,
                rounds=before.rounds + 1,
                seconds=min(before.seconds, measurement.seconds),
                operators=before.operators,
                peak_gmacs=before.peak_gmacs,
            )
        self._put(network, sparsity, measurement)
        if self.path is None:
            return
        with replacing(self.path) as temporary:
            temporary.write_text(json.dumps(self.document(), indent=1) + "\n")

    def document(self) -> dict[str, Any]:
        """What the file holds."""
        entries = [
            {"network": key[0], "sparsity": key[1], **asdict(measurement)}
            for key, measurement in self.measurements.items()
        ]
        return {
            "format": FORMAT,
            "version": VERSION,
            "machine": self.machine,
            "table": self._table(),
            "results": entries,
        }

    def row(self, network: str, sparsity: float, setting: Setting) -> list[Measurement]:
        """All engines' measurements of one line of a table: sparse builds at that sparsity, the others dense."""
        found = (self.get(network, sparsity if name in OURS else 0.0, name, setting) for name in ENGINES)
        return [measurement for measurement in found if measurement is not None]

    def _table(self) -> list[dict[str, Any]]:
        lines = dict.fromkeys((key[0], key[1], key[3], key[4]) for key in self.measurements if key[2] in OURS)
        return [self._line(network, sparsity, Setting(threads, isa)) for network, sparsity, threads, isa in lines]

    def _line(self, network: str, sparsity: float, setting: Setting) -> dict[str, Any]:
        row = self.row(network, sparsity, setting)
        build, peer = fastest(row, OURS), fastest(row, PEERS)
        case = case_of(network, sparsity)
        asked = setting.threads == 1 and setting.isa == NATIVE
        return {
            "network": network,
            "sparsity": sparsity,
            "threads": setting.threads,
            "isa": setting.isa,
            "fastest_build": build and build.engine,
            "fastest_peer": peer and peer.engine,
            "speed_up": ratio(peer, build),
            "at_least": case.at_least if asked else None,
            "aim": case.aim if asked else None,
        }

    def _put(self, network: str, sparsity: float, measurement: Measurement) -> None:
        self.measurements[_key(network, sparsity, measurement)] = measurement


def _key(network: str, sparsity: float, measurement: Measurement) -> Key:
    return network, sparsity, measurement.engine, measurement.threads, measurement.isa


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
        if (document["format"], document["version"]) == (FORMAT, VERSION):
            return document
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{path}: not a file of results of this version; name another")
