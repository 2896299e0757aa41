"""The record of a training run, ``history.csv``."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from .outputs import replacing

__all__ = ["Lines"]


class Lines(Callback):
    """One line an epoch: to ``history.csv`` and, where no terminal shows a progress bar, to standard output.

    Args:
        every: epochs between two calls of ``measure``, whose figures join the line; 0 for none.
    """

    def __init__(self, file: Path, every: int, measure: Callable[[], Mapping[str, float]], plain: bool) -> None:
        self.file, self.every, self.measure, self.plain = file, every, measure, plain
        self.start = time.time()

    def on_train_epoch_end(self, trainer: lightning.Trainer, trainee: lightning.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        line: dict[str, Any] = {"epoch": epoch, "seconds": round(time.time() - self.start, 1)}
        line |= {k: float(f"{float(v):.5g}") for k, v in trainer.callback_metrics.items()}
        if self.every and epoch % self.every == 0 and trainer.is_global_zero:
            line |= self.measure()
        if not trainer.is_global_zero:
            return
        self._record(line)
        if self.plain:
            print("  ".join(f"{k} {v}" for k, v in line.items()), flush=True)

    def _record(self, line: dict[str, Any]) -> None:
        """Add a row to the file, and columns for figures new to it, which some epochs have and others have not."""
        rows = [*_earlier_rows(self.file, line["epoch"]), line]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with replacing(self.file) as scratch, scratch.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            writer.writerows(rows)


def _earlier_rows(file: Path, epoch: int) -> list[dict[str, Any]]:
    """The rows of the epochs before ``epoch``: a resumed run writes its own in place of those after its checkpoint."""
    if not file.exists():
        return []
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream, restkey="", restval=""))
    return [row for row in rows if row.get("epoch", "").isdigit() and int(row["epoch"]) < epoch]
