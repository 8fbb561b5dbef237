"""The project's own file of a model: safetensors, whose header carries the config and the tokenizer."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt.data.files import replace
from gpt.engine import Tensor, check_arrays
from gpt.errors import UserError
from gpt.weights.names import check_layers
from gpt.weights.tensors import read_safetensors, write_safetensors
from reference.config import GPTConfig

__all__ = ["FORMAT", "SavedModel", "check_shapes", "check_version", "flush", "read_model", "save_model", "write_model"]

FORMAT = 1


class SavedModel(NamedTuple):
    """What generation needs."""

    params: Mapping[str, Tensor]  # from a file: each is read when it is made an array
    config: GPTConfig
    tokenizer: dict[str, Any] | None  # a tokenizer's spec()
    task: dict[str, Any] | None = None  # what the model was finetuned for: its "kind", and what using it needs


def save_model(
    path: str | Path,
    params: Mapping[str, Any],
    config: GPTConfig,
    tokenizer: Mapping[str, Any] | None = None,
    task: Mapping[str, Any] | None = None,
) -> None:
    """Write one file of parameters, whole or not at all. Raises UserError."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_model(part, params, config, tokenizer, task)
        replace(part, path)
    except OSError as error:
        raise UserError(f"{path}: could not be written: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True)


def write_model(
    path: Path,
    params: Mapping[str, Any],
    config: GPTConfig,
    tokenizer: Mapping[str, Any] | None,
    task: Mapping[str, Any] | None = None,
) -> None:
    """Write and flush such a file under this name. Raises OSError."""
    metadata = {
        "twingrad": str(FORMAT),
        "config": json.dumps(config.to_dict()),
        "tokenizer": json.dumps(tokenizer, default=plain_number),
        "task": json.dumps(task, default=plain_number),
    }
    write_safetensors(path, params, metadata)
    flush(path)


def read_model(path: Path) -> SavedModel:
    """Such a file. Raises UserError when it is missing, truncated, another's, of a newer format, or of another shape
    than its config says."""
    params, metadata = read_safetensors(path)
    try:
        check_version(path, int(metadata["twingrad"]))
        config = GPTConfig.from_dict(json.loads(metadata["config"]))
        tokenizer, task = json.loads(metadata["tokenizer"]), json.loads(metadata.get("task", "null"))
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a twingrad model: no readable config in its header ({error})") from None
    check_layers(path, config, params)
    check_shapes(path, params, config.parameter_shapes())
    return SavedModel({name: params[name] for name in config.parameter_shapes()}, config, tokenizer, task)


def check_version(path: Path, version: int) -> None:
    """Raises UserError where a file was written by a later version of the project."""
    if version > FORMAT:
        raise UserError(f"{path}: format {version}, written by a newer twingrad; this one reads up to format {FORMAT}")


def check_shapes(path: Path, arrays: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UserError, naming the file, where arrays have not exactly these names and shapes."""
    try:
        check_arrays(arrays, shapes)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def flush(path: Path) -> None:
    """Have the operating system put a file, or a folder's list of names, onto the disk."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def plain_number(value: Any) -> Any:
    """NumPy's numbers as Python's, for JSON."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")
