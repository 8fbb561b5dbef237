"""Parameters and checkpoints on disk: safetensors for arrays, JSON for the rest, no pickle.

A run's folder holds at most two checkpoints, named after their step:

    last-00000120/  model.safetensors  optimizer.safetensors  trainer.json      all that a resumed run needs
    best-00000080/  model.safetensors                         trainer.json      lowest validation loss so far

A run that was killed after its last checkpoint may leave a best one of a later step. It stays the best, with its loss,
until a lower one comes.

``model.safetensors`` stands alone: its header carries the model's config and the tokenizer.

A checkpoint is written into a hidden folder, flushed to the disk, and given its name by one rename, which the file
system does wholly or not at all; the checkpoint before it is removed after that. So the one with the highest step is
whole, whenever the process was killed.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gpt.engine import optimizer_shapes
from gpt.errors import UserError
from gpt.options import read_json_object
from gpt.weights.native import (
    FORMAT,
    SavedModel,
    check_shapes,
    check_version,
    flush,
    plain_number,
    read_model,
    write_model,
)
from gpt.weights.tensors import Stored, read_safetensors, write_safetensors
from reference.config import GPTConfig

__all__ = [
    "Checkpoint",
    "best_loss",
    "clean",
    "find_checkpoint",
    "load_checkpoint",
    "save_checkpoint",
]

MODEL, OPTIMIZER, TRAINER = "model.safetensors", "optimizer.safetensors", "trainer.json"

Kind = Literal["last", "best"]
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Checkpoint:
    """What a resumed run needs. `optimizer` is what `Engine.optimizer_state` gave; `state` is the trainer's."""

    path: Path
    model: SavedModel
    optimizer: Mapping[str, Stored]
    state: dict[str, Any]


def save_checkpoint(
    run_dir: str | Path,
    kind: Kind,
    state: Mapping[str, Any],
    params: Arrays,
    config: GPTConfig,
    tokenizer: Mapping[str, Any] | None = None,
    optimizer: Arrays | None = None,
    task: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint of step `state["step"]` and remove the older ones of its kind. Returns its folder.

    If the disk fills up, raises UserError; the checkpoint before this one is then still there, and nothing of this one.
    """
    run_dir = Path(run_dir)
    path = run_dir / f"{kind}-{state['step']:08d}"
    if path.exists() and kind == "last":  # a run that was resumed here and stopped at once: same step, same state
        return path
    part = run_dir / f".{path.name}.{os.getpid()}.tmp"
    try:
        part.mkdir(parents=True)
        write_model(part / MODEL, params, config, tokenizer, task)
        if optimizer is not None:
            write_safetensors(part / OPTIMIZER, optimizer, {"twingrad": str(FORMAT)})
            flush(part / OPTIMIZER)
        _write_text(part / TRAINER, json.dumps({"format": FORMAT, **state}, default=plain_number))
        flush(part)
        if path.exists():  # a killed run's, which came to this step before it was resumed at an earlier one
            _discard(path)
        part.rename(path)
        flush(run_dir)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        before = find_checkpoint(run_dir, kind)
        kept = f"; the one before it is intact: {before}" if before else ""
        raise UserError(f"{path}: checkpoint could not be written: {_reason(error)}{kept}") from None
    for other in _checkpoints(run_dir, kind):
        if other != path:  # of a later step too: a killed run's, as above
            _discard(other)
    clean(run_dir)
    return path


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a "last" checkpoint, given its folder or the run's folder. Raises UserError for what is damaged."""
    path = Path(path)
    if not (path / TRAINER).exists():
        found = find_checkpoint(path, "last")
        if found is None:
            raise UserError(f"{path}: no checkpoint to resume from in this folder")
        path = found
    try:
        state = json.loads((path / TRAINER).read_text(encoding="utf-8"))
        version = int(state.pop("format"))
    except (OSError, UnicodeDecodeError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path / TRAINER}: not a readable checkpoint ({type(error).__name__}: {error})") from None
    check_version(path / TRAINER, version)
    model = read_model(path / MODEL)
    optimizer, _ = read_safetensors(path / OPTIMIZER)
    trained = [name.removeprefix("m.") for name in optimizer if name.startswith("m.")]
    if unknown := [name for name in trained if name not in model.params]:
        raise UserError(f"{path / OPTIMIZER}: {unknown[0]} is no parameter of the model beside it")
    check_shapes(path / OPTIMIZER, optimizer, optimizer_shapes(model.config, trained))
    return Checkpoint(path, model, optimizer, state)


def find_checkpoint(run_dir: str | Path, kind: Kind) -> Path | None:
    """The folder of the run's newest checkpoint of this kind, or None."""
    found = _checkpoints(Path(run_dir), kind)
    return found[-1] if found else None


def best_loss(run_dir: str | Path) -> float:
    """The validation loss of the run's best checkpoint; inf where there is none."""
    found = find_checkpoint(run_dir, "best")
    loss = read_json_object(found / TRAINER).get("best_loss") if found else None
    return math.inf if loss is None else float(loss)


def clean(run_dir: str | Path) -> None:
    """Remove what a killed process left half-written, and all but the newest checkpoint of each kind."""
    run_dir = Path(run_dir)
    for kind in ("last", "best"):
        for path in _checkpoints(run_dir, kind)[:-1]:
            _discard(path)
    for path in run_dir.glob(".*.tmp"):
        if re.fullmatch(r"\.(last|best)-\d+\.(\d+|old)\.tmp", path.name):
            shutil.rmtree(path, ignore_errors=True)
        elif re.fullmatch(r"\..+\.\d+\.tmp", path.name) and path.is_file():  # atomic_write's
            path.unlink(missing_ok=True)


def _discard(path: Path) -> None:
    """For `clean` to remove: half-removed, it must not look like a checkpoint."""
    path.rename(path.with_name(f".{path.name}.old.tmp"))


def _checkpoints(run_dir: Path, kind: str) -> list[Path]:
    """Folders of this kind, by step."""
    found = [path for path in run_dir.glob(f"{kind}-*") if re.fullmatch(rf"{kind}-\d{{8,}}", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix(f"{kind}-")))


def _write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    flush(path)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
