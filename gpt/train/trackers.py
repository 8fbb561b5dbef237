"""Where a run's numbers go beside its log, when asked for: Weights & Biases (wandb) and TensorBoard.

A tracker that fails is dropped with a warning, and the training goes on: the log holds every number anyway.
"""

from __future__ import annotations

import math
import uuid
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from gpt.data.files import atomic_write
from gpt.errors import UserError, check_installed, require
from gpt.options import did_you_mean
from gpt.train.log import Row

__all__ = ["NAMES", "Tracker", "check_trackers", "create_trackers"]

# Tracker, which is also the extra that installs it -> the module it needs. tensorboardX writes TensorBoard's files with
# protobuf alone; PyTorch's writer would need PyTorch and TensorBoard itself.
_MODULES = {"wandb": "wandb", "tensorboard": "tensorboardX"}
NAMES = tuple(_MODULES)
WANDB_ID = "wandb-id.txt"  # in the run's folder, so that a resumed run goes on in the same place
_SHOWN = {
    "loss/step": "loss",
    "loss/train": "train_loss",
    "loss/val": "val_loss",
    "lr": "lr",
    "gradient_norm": "norm",
    "tokens_per_s": "tokens_per_s",
}


class Tracker(Protocol):
    """What the trainer tells of each step."""

    def log(self, row: Row) -> None:
        """A step is done."""

    def close(self) -> None:
        """The run is over or interrupted."""


def check_trackers(names: Iterable[str]) -> None:
    """Raise UserError for a tracker that does not exist or whose package is not installed."""
    for name in names:
        if name not in NAMES:
            raise UserError(f"log_to: {name!r} is not one of {', '.join(NAMES)}{did_you_mean(name, NAMES)}")
        check_installed(_MODULES[name], extra=name)


def create_trackers(names: Iterable[str], run_dir: str | Path, settings: Mapping[str, Any]) -> Tracker:
    """One tracker that tells all of `names`; `settings` are the run's, to be shown beside its numbers.

    Raises UserError where one cannot begin. Later failures are warnings.
    """
    names, run_dir = tuple(dict.fromkeys(names)), Path(run_dir)
    check_trackers(names)
    trackers = _Trackers()
    for name in names:
        try:
            trackers.add(name, _Wandb(run_dir, settings) if name == "wandb" else _TensorBoard(run_dir))
        except UserError:
            trackers.close()
            raise
        except Exception as error:
            trackers.close()
            raise UserError(f"log_to: {name} cannot begin ({_in_short(error)})") from error
    return trackers


class _Trackers:
    """Several as one. Whatever error one of them raises, it is dropped with a warning."""

    def __init__(self) -> None:
        self._trackers: dict[str, Tracker] = {}

    def add(self, name: str, tracker: Tracker) -> None:
        self._trackers[name] = tracker

    def log(self, row: Row) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.log(row)
            except Exception as error:
                del self._trackers[name]
                warnings.warn(f"{name} failed, and the run goes on without it ({_in_short(error)})", stacklevel=2)

    def close(self) -> None:
        while self._trackers:
            name, tracker = self._trackers.popitem()
            try:
                tracker.close()
            except Exception as error:
                warnings.warn(f"{name} failed at the end of the run ({_in_short(error)})", stacklevel=2)


class _Wandb:
    """A run of the project "twingrad" at Weights & Biases.

    Steps that it has already heard of, from a part of the run that was killed later than its last checkpoint, it
    ignores; they are the same.
    """

    def __init__(self, run_dir: Path, settings: Mapping[str, Any]) -> None:
        wandb = require("wandb", extra="wandb")
        path = run_dir / WANDB_ID
        identity = path.read_text(encoding="utf-8").strip() if path.exists() else uuid.uuid4().hex
        run_dir.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(project="twingrad", dir=str(run_dir), config=dict(settings), id=identity, resume="allow")
        with atomic_write(path) as file:
            file.write(f"{identity}\n".encode())

    def log(self, row: Row) -> None:
        self._run.log(_numbers(row), step=row.step)

    def close(self) -> None:
        self._run.finish()


class _TensorBoard:
    """Event files in the run's folder, begun with the first row, whose step tells what they supersede."""

    def __init__(self, run_dir: Path) -> None:
        self._module = require("tensorboardX", extra="tensorboard")
        self._folder = run_dir / "tensorboard"
        self._writer: Any = None

    def log(self, row: Row) -> None:
        if self._writer is None:
            self._writer = self._module.SummaryWriter(str(self._folder), purge_step=row.step)
        for name, value in _numbers(row).items():
            self._writer.add_scalar(name, value, row.step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _numbers(row: Row) -> dict[str, float]:
    """What a tracker is told of a row: what is known of it."""
    values = {name: getattr(row, field) for name, field in _SHOWN.items()}
    return {name: value for name, value in values.items() if not math.isnan(value)}


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
