"""The run's log: a CSV file with one row a step, which a resumed run continues as if it had never stopped."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

from gpt.errors import UserError

__all__ = ["Log", "Row", "read_log"]


@dataclass
class Row:
    """What is known of a step after it. Losses are in nats a token; nan (an empty cell) where not evaluated."""

    step: int  # counted from 0 or from 1, as TrainConfig.first_eval says
    epoch: float  # passes over the training loader, this step included
    tokens: int  # input tokens seen, this step included
    lr: float
    loss: float  # of this step's batch, in training mode
    norm: float  # of the gradient, before clipping
    train_loss: float = math.nan
    val_loss: float = math.nan
    tokens_per_s: float = math.nan  # the step alone, without evaluation, samples and checkpoints
    seconds: float = math.nan  # since the run began, time while it was stopped not counted
    examples: int = 0  # texts, or pairs of answers, seen, this step included
    metrics: dict[str, float] = field(default_factory=dict)  # what else an evaluation measured, a column each


COLUMNS = [column.name for column in fields(Row) if column.name != "metrics"]


class Log:
    """Appends rows to a CSV file. Each row is handed to the operating system at once, so a kill loses none."""

    def __init__(self, path: str | Path, before_step: int, metrics: Sequence[str] = ()) -> None:
        """Open for the row of step `before_step` and later; rows from there on, of a run killed later, are dropped.

        `metrics`: the names of the columns beside those that every log has.
        """
        path, self._columns = Path(path), [*COLUMNS, *metrics]
        kept = _rows_before(path, before_step) if path.exists() else []
        self.seconds = float(kept[-1]["seconds"] or 0) if kept else 0.0  # of the last row
        part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with open(part, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns, lineterminator="\n", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(kept)
        os.replace(part, path)
        self._file = open(path, "a", newline="", encoding="utf-8")  # noqa: SIM115

    def write(self, row: Row) -> None:
        line = io.StringIO()
        values = {**vars(row), **row.metrics}
        cells = (values.get(column, math.nan) for column in self._columns)
        csv.writer(line, lineterminator="\n").writerow("" if value != value else value for value in cells)
        self._file.write(line.getvalue())
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _rows_before(path: Path, step: int) -> list[dict[str, str]]:
    """The log's whole rows up to the first of `step` or later, or the first that a crash cut short."""
    kept: list[dict[str, str]] = []
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if None in row.values() or not row["step"].isdecimal() or int(row["step"]) >= step:
                break
            kept.append(row)
    return kept


def read_log(path: str | Path) -> dict[str, np.ndarray]:
    """Column -> float64 array with a value a step, nan where the cell is empty. `path`: a log or a run's folder.

    Columns of metrics come after those that every log has. A log of before a column was known has nan there.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "log.csv"
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows, names = list(reader), reader.fieldnames or ()
        if missing := [name for name in COLUMNS[:10] if name not in names]:
            raise KeyError(missing[0])
        columns = dict.fromkeys((*COLUMNS, *names))
        return {name: np.array([float(row.get(name) or "nan") for row in rows]) for name in columns}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not the log of a run ({type(error).__name__}: {error})") from None
