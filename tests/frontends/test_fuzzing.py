"""A few hundred of the files that ``fuzz.py`` makes; it runs for hours by itself."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from jointsparse.frontends import model_file
from tests.frontends import fuzz


@pytest.fixture
def seeds() -> list[bytes]:
    assert len(fuzz.SEEDS) == 3
    return [path.read_bytes() for path in fuzz.SEEDS]


def test_changed_files_are_read_or_refused(seeds: list[bytes]) -> None:
    found = fuzz.fuzz(seeds, random.Random(0), lambda count: count == 400)
    assert found["read"] > 10, "changes that leave nothing to read reach little"
    assert found["refused"] > 100


@pytest.mark.slow
def test_many_more(seeds: list[bytes]) -> None:
    found = fuzz.fuzz(seeds, random.Random(1), lambda count: count == 20_000)
    assert found.total() == 20_000


def test_what_breaks_a_rule_is_kept(seeds: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model_file, "unpack", lambda contents: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fuzz.fuzz(seeds, random.Random(0), lambda count: count == 100)
    kept = (tmp_path / "fuzz-failure.jsm").read_bytes()
    with pytest.raises(ZeroDivisionError):
        fuzz.target(kept)
