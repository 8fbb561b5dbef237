"""Parameters and checkpoints on disk: safetensors for arrays, JSON for the rest, no pickle.

A run's folder holds at most two checkpoints, named after their step:

    last-00000120/  model.safetensors  optimizer.safetensors  trainer.json      all that a resumed run needs
    best-00000080/  model.safetensors                         trainer.json      lowest validation loss so far

``model.safetensors`` stands alone: its header carries the model's config and the tokenizer.

A checkpoint is written into a hidden folder, flushed to the disk, and given its name by one rename, which the file
system does wholly or not at all; the checkpoint before it is removed after that. So the one with the highest step is
whole, whenever the process was killed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from gpt.engine import check_arrays, optimizer_shapes
from gpt.errors import UserError
from reference.config import GPTConfig

__all__ = [
    "Checkpoint",
    "SavedModel",
    "clean",
    "find_checkpoint",
    "load_checkpoint",
    "load_parameters",
    "save_checkpoint",
    "save_parameters",
]

FORMAT = 1
MODEL, OPTIMIZER, TRAINER = "model.safetensors", "optimizer.safetensors", "trainer.json"
PICKLE_STARTS = (b"\x80", b"PK\x03\x04")  # a bare pickle; the zip archive that torch.save writes

Kind = Literal["last", "best"]
Arrays = Mapping[str, np.ndarray]


class SavedModel(NamedTuple):
    """What generation needs."""

    params: dict[str, np.ndarray]
    config: GPTConfig
    tokenizer: dict[str, Any] | None  # a tokenizer's spec()


@dataclass(frozen=True)
class Checkpoint:
    """What a resumed run needs. `optimizer` has arrays "m.NAME" and "v.NAME" and "step"; `state` is the trainer's."""

    path: Path
    model: SavedModel
    optimizer: dict[str, np.ndarray]
    state: dict[str, Any]


def save_parameters(
    path: str | Path, params: Arrays, config: GPTConfig, tokenizer: Mapping[str, Any] | None = None
) -> None:
    """Write one file of parameters that `load_parameters` reads, whole or not at all. Raises UserError."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_model(part, params, config, tokenizer)
        os.replace(part, path)
        _flush(path.parent)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"{path}: could not be written: {_reason(error)}") from None


def load_parameters(path: str | Path) -> SavedModel:
    """Read the parameters of a file, a checkpoint's folder, or a run's folder (its best, else its last checkpoint).

    Raises UserError when the file is missing, truncated, no twingrad model, of a newer format, or of another shape than
    its config says.
    """
    path = Path(path)
    if path.is_dir() and not (path / MODEL).exists():
        path = find_checkpoint(path, "best") or find_checkpoint(path, "last") or path
    if path.is_dir():
        path = path / MODEL
    params, metadata = _read_arrays(path)
    try:
        version = int(metadata["twingrad"])
        _check_version(path, version)
        config = GPTConfig.from_dict(json.loads(metadata["config"]))
        tokenizer = json.loads(metadata["tokenizer"])
    except UserError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a twingrad model: no readable config in its header ({error})") from None
    _check_shapes(path, params, config.parameter_shapes())
    return SavedModel(params, config, tokenizer)


def save_checkpoint(
    run_dir: str | Path,
    kind: Kind,
    state: Mapping[str, Any],
    params: Arrays,
    config: GPTConfig,
    tokenizer: Mapping[str, Any] | None = None,
    optimizer: Arrays | None = None,
) -> Path:
    """Write a checkpoint of step `state["step"]` and remove the older ones of its kind. Returns its folder.

    If the disk fills up, raises UserError; the checkpoint before this one is then still there, and nothing of this one.
    """
    run_dir = Path(run_dir)
    path = run_dir / f"{kind}-{state['step']:08d}"
    if path.exists():  # a run that was resumed here and stopped at once: same step, same state
        return path
    part = run_dir / f".{path.name}.{os.getpid()}.tmp"
    try:
        part.mkdir(parents=True)
        _write_model(part / MODEL, params, config, tokenizer)
        if optimizer is not None:
            _write_arrays(part / OPTIMIZER, optimizer, {"twingrad": str(FORMAT)})
        _write_text(part / TRAINER, json.dumps({"format": FORMAT, **state}, default=_plain_number))
        _flush(part)
        part.rename(path)
        _flush(run_dir)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        before = find_checkpoint(run_dir, kind)
        kept = f"; the one before it is intact: {before}" if before else ""
        raise UserError(f"{path}: checkpoint could not be written: {_reason(error)}{kept}") from None
    clean(run_dir)
    return path


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a "last" checkpoint, given its folder or the run's folder. Raises UserError as `load_parameters` does."""
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
    _check_version(path / TRAINER, version)
    model = load_parameters(path / MODEL)
    optimizer, _ = _read_arrays(path / OPTIMIZER)
    _check_shapes(path / OPTIMIZER, optimizer, optimizer_shapes(model.config))
    return Checkpoint(path, model, optimizer, state)


def find_checkpoint(run_dir: str | Path, kind: Kind) -> Path | None:
    """The folder of the run's newest checkpoint of this kind, or None."""
    found = _checkpoints(Path(run_dir), kind)
    return found[-1] if found else None


def clean(run_dir: str | Path) -> None:
    """Remove what a killed process left half-written, and all but the newest checkpoint of each kind."""
    run_dir = Path(run_dir)
    for kind in ("last", "best"):
        for path in _checkpoints(run_dir, kind)[:-1]:
            # Half-removed, it must not look like a checkpoint.
            path.rename(run_dir / f".{path.name}.{os.getpid()}.tmp")
    for path in run_dir.glob(".*.tmp"):
        if re.fullmatch(r"\.(last|best)-\d+\.\d+\.tmp", path.name):
            shutil.rmtree(path, ignore_errors=True)
        elif re.fullmatch(r"\..+\.\d+\.tmp", path.name) and path.is_file():  # atomic_write's
            path.unlink(missing_ok=True)


def _checkpoints(run_dir: Path, kind: str) -> list[Path]:
    """Folders of this kind, by step."""
    found = [path for path in run_dir.glob(f"{kind}-*") if re.fullmatch(rf"{kind}-\d{{8,}}", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix(f"{kind}-")))


def _write_model(path: Path, params: Arrays, config: GPTConfig, tokenizer: Mapping[str, Any] | None) -> None:
    metadata = {
        "twingrad": str(FORMAT),
        "config": json.dumps(config.to_dict()),
        "tokenizer": json.dumps(tokenizer, default=_plain_number),
    }
    _write_arrays(path, params, metadata)


def _write_arrays(path: Path, arrays: Arrays, metadata: dict[str, str]) -> None:
    """Write and flush a safetensors file. Raises OSError."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        # safetensors writes an array's memory from its start, so a transposed view would come out scrambled.
        save_file({name: np.asarray(array, order="C") for name, array in arrays.items()}, path, metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from None
    _flush(path)


def _read_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All arrays and the metadata of a safetensors file. Raises UserError."""
    from safetensors import SafetensorError, safe_open

    try:
        with open(path, "rb") as file:
            start = file.read(9)
        # A safetensors file begins with the length of its header, any eight bytes, and then the header: {...}.
        if start.startswith(PICKLE_STARTS) and start[8:] != b"{":
            raise UserError(
                f"{path}: a pickle, which may run any code when it is loaded; "
                "expected a .safetensors file or the folder of a run"
            )
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except OSError as error:
        raise UserError(f"{path}: could not be read: {_reason(error)}") from None
    except SafetensorError as error:
        raise UserError(f"{path}: truncated or not a safetensors file ({error})") from None


def _write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    _flush(path)


def _flush(path: Path) -> None:
    """Have the operating system put a file, or a folder's list of names, onto the disk."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_version(path: Path, version: int) -> None:
    if version > FORMAT:
        raise UserError(f"{path}: format {version}, written by a newer twingrad; this one reads up to format {FORMAT}")


def _check_shapes(path: Path, arrays: Arrays, shapes: Mapping[str, tuple[int, ...]]) -> None:
    try:
        check_arrays(arrays, shapes)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _plain_number(value: Any) -> Any:
    """NumPy's numbers as Python's, for JSON."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
