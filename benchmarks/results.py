"""Measurements of many networks in one JSON file, which grows as they come."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.rows import Case, case_of
from jointsparse.frontends.benchmark import fastest, ratio
from jointsparse.frontends.engines import ENGINES, NATIVE, OURS, PEERS, Engine, LeftOut, machine
from jointsparse.frontends.engines.measuring import Measurement, Setting
from jointsparse.frontends.errors import InputError
from jointsparse.frontends.outputs import check_output, replacing

FORMAT = "jointsparse.benchmarks"
VERSION = 2

Key = tuple[str, float, str]
"""Of a row: network, sparsity, instruction set."""


@dataclass
class Results:
    """Measurements, row by row; those of a row were made together, turn by turn.

    The file is an object with ``format`` ("jointsparse.benchmarks"), ``version`` (2), ``machine`` (see
    ``engines.machine``), ``results``: objects with ``network``, ``sparsity`` (of the row: dense engines have none) and
    the attributes of ``Measurement``; and ``table``: objects with ``network``, ``sparsity``, ``threads``, ``isa``,
    ``fastest_build``, ``fastest_peer`` (names or null), ``speed_up`` (of the first over the second, the median of all
    turns), ``at_least`` and ``aim`` (null where nothing is asked for).

    Attributes:
        path: of the file, None to keep nothing. machine: that all of them are from. rows: all engines with all numbers
            of threads.
    """

    path: Path | None
    machine: dict[str, Any]
    rows: dict[Key, list[Measurement]] = field(default_factory=dict)

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
            case, one = Case(entry.pop("network"), entry.pop("sparsity")), Measurement(**entry)
            results.rows.setdefault(_key(case, one.isa), []).append(one)
        return results

    def get(self, case: Case, setting: Setting) -> list[Measurement]:
        """What there is of a row at a number of threads, in the order of ``ENGINES``."""
        found = [one for one in self.rows.get(_key(case, setting.isa), []) if one.threads == setting.threads]
        return sorted(found, key=lambda one: list(ENGINES).index(one.engine))

    def lacks(self, case: Case, engine: Engine, setting: Setting) -> bool:
        """Whether an engine has to be measured: it is not there, failed, is of another version, or was measured for a
        shorter time or without the operators that are asked for."""
        found = next((one for one in self.get(case, setting) if one.engine == engine.name), None)
        if found is None or found.version != _version(engine) or found.seconds < setting.seconds:
            return True
        if found.left_out is not None and found.left_out.startswith("failed"):
            return True
        return setting.layers and found.plan is not None and found.operators is None and found.left_out is None

    def put(self, case: Case, isa: str, measurements: Sequence[Measurement]) -> None:
        """Take a row in, in place of what there is of it, and write the file."""
        self.rows[_key(case, isa)] = list(measurements)
        if self.path is None:
            return
        with replacing(self.path) as temporary:
            temporary.write_text(json.dumps(self.document(), indent=1) + "\n")

    def document(self) -> dict[str, Any]:
        """What the file holds."""
        entries = [
            {"network": network, "sparsity": sparsity, **asdict(one)}
            for (network, sparsity, _), row in self.rows.items()
            for one in row
        ]
        return {
            "format": FORMAT,
            "version": VERSION,
            "machine": self.machine,
            "table": self._table(),
            "results": entries,
        }

    def _table(self) -> list[dict[str, Any]]:
        lines = dict.fromkeys((*key, one.threads) for key, row in self.rows.items() for one in row)
        return [
            self._line(case_of(network, sparsity), Setting(threads, isa)) for network, sparsity, isa, threads in lines
        ]

    def _line(self, case: Case, setting: Setting) -> dict[str, Any]:
        row = self.get(case, setting)
        build, peer = fastest(row, OURS), fastest(row, PEERS)
        asked = setting.threads == 1 and setting.isa == NATIVE
        return {
            "network": case.network,
            "sparsity": case.sparsity,
            "threads": setting.threads,
            "isa": setting.isa,
            "fastest_build": build and build.engine,
            "fastest_peer": peer and peer.engine,
            "speed_up": ratio(peer, build),
            "at_least": case.at_least if asked else None,
            "aim": case.aim if asked else None,
        }


def _key(case: Case, isa: str) -> Key:
    return case.network, case.sparsity, isa


def _version(engine: Engine) -> str | None:
    """None where it is not installed."""
    try:
        return engine.version()
    except LeftOut:
        return None


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
        if (document["format"], document["version"]) == (FORMAT, VERSION):
            return document
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{path}: not a file of results of this version; name another")
