"""Arrays in files, each read when it is asked for: safetensors, and PyTorch's own format.

A file is mapped into memory for one array at a time, so that loading a model takes its own size and that of one array.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpt.errors import UserError, require
from gpt.options import read_json

__all__ = [
    "Stored",
    "read_pickle",
    "read_safetensors",
    "read_sharded",
    "stored_tensors",
    "unpickled",
    "write_safetensors",
]

PICKLE_STARTS = (b"\x80", b"PK\x03\x04")  # a bare pickle; the zip archive that torch.save writes
# safetensors' names of types -> NumPy's. bfloat16 is the first half of a float32, and read as that.
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "float32", "BOOL": "bool",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
}  # fmt: skip
KINDS = sorted(set(DTYPES.values()))


@dataclass(frozen=True)
class Stored:
    """An array that is read anew each time it is made one: np.asarray(stored), target[...] = stored."""

    shape: tuple[int, ...]
    dtype: np.dtype  # of what reading gives
    kind: str  # the type in the file, in words
    read: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.read()
        if copy:  # to own and to write to; what was read may be part of a file
            return np.array(array, dtype, order="C")
        return array if dtype is None else array.astype(dtype, copy=False)

    @property
    def nbytes(self) -> int:
        """Size in memory once read."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def read_safetensors(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """All arrays by name, and the metadata, of a safetensors file.

    Raises UserError for a file that is missing, truncated, no safetensors file, or a pickle.
    """
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
            with safe_open(path, framework="numpy"):  # checks the header: sizes, overlaps, the file's length
                pass
            length = int.from_bytes(start[:8], "little")
            file.seek(8)
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", None) or {}
        return {name: _stored(path, 8 + length, name, entry) for name, entry in header.items()}, metadata
    except OSError as error:
        raise UserError(f"{path}: could not be read: {error.strerror or error}") from None
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: truncated or not a safetensors file ({' '.join(str(error).split())})") from None


def _stored(path: Path, data: int, name: str, entry: Mapping[str, Any]) -> Stored:
    """One entry of a header; `data` is where in the file offsets begin to count."""
    kind, shape = entry["dtype"], tuple(entry["shape"])
    if kind not in DTYPES:
        raise UserError(f"{path}: {name} has the type {kind}, expected one of {', '.join(DTYPES)}")
    begin, end = entry["data_offsets"]
    in_file = np.dtype("uint16" if kind == "BF16" else DTYPES[kind]).newbyteorder("<")

    def read() -> np.ndarray:
        if begin == end:
            return np.empty(shape, DTYPES[kind])
        try:
            array = np.memmap(path, in_file, "r", data + begin, shape or (1,)).reshape(shape)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: {name} could not be read: {error}") from None
        return (array.astype(np.uint32) << 16).view(np.float32) if kind == "BF16" else array

    return Stored(shape, np.dtype(DTYPES[kind]), "bfloat16" if kind == "BF16" else DTYPES[kind], read)


def write_safetensors(path: Path, arrays: Mapping[str, Any], metadata: dict[str, str]) -> None:
    """Write a safetensors file; whoever calls gives it its name afterwards. Raises OSError."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    with open(path, "wb") as file:
        mode = os.fstat(file.fileno()).st_mode  # as the user wants files; safetensors' own is its owner's alone
    try:
        # safetensors writes an array's memory from its start, so a transposed view would come out scrambled.
        save_file({name: np.asarray(array, order="C") for name, array in arrays.items()}, path, metadata)
        path.chmod(mode)
    except SafetensorError as error:
        raise OSError(str(error)) from None


def read_pickle(path: Path) -> dict[str, Stored]:
    """All tensors by name of a file that torch.save wrote, a state_dict. Code in it is refused, and never run.

    Raises UserError where PyTorch is not installed, and for a file that is missing, broken, or more than tensors.
    """
    loaded = unpickled(path)
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: expected a state_dict, tensors by name, got {type(loaded).__name__}")
    return stored_tensors(path, loaded)


def unpickled(path: Path, stand_ins: Sequence[tuple[type, str]] = ()) -> Any:
    """What torch.save wrote, if that is tensors, numbers, texts and containers of these. Errors as in `read_pickle`.

    `stand_ins`: for classes by their full names, such as "__main__.ModelArgs", the classes to make instances of.
    """
    torch = require("torch", extra="torch")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with torch.serialization.safe_globals(list(stand_ins)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))  # not its advice, which is to run the code
        why = f": it wants {wanted[1]}" if wanted else ""
        raise UserError(f"{path}: refused, for it is broken or a pickle that asks for more than tensors{why}") from None
    except Exception as error:  # PyTorch documents none of what a damaged file raises
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: not a file of tensors: {why}") from None


def stored_tensors(path: Path, loaded: Mapping[Any, Any]) -> dict[str, Stored]:
    """PyTorch's tensors by name. Raises UserError for what is none, or of a type that NumPy has not."""
    torch = require("torch", extra="torch")

    def stored(tensor: Any) -> Stored:
        if not isinstance(tensor, torch.Tensor):
            raise UserError(f"{path}: expected a state_dict, tensors by name, got a {type(tensor).__name__} in it")
        wide = torch.float32 if tensor.dtype == torch.bfloat16 else tensor.dtype
        kind, dtype = (str(of).removeprefix("torch.") for of in (tensor.dtype, wide))
        if dtype not in DTYPES.values():
            raise UserError(f"{path}: a tensor of the type {kind}, expected one of bfloat16, {', '.join(KINDS)}")
        return Stored(tuple(tensor.shape), np.dtype(dtype), kind, lambda: tensor.to(wide).numpy())

    return {str(name): stored(tensor) for name, tensor in loaded.items()}


def read_sharded(index: Path, read: Callable[[Path], dict[str, Stored]]) -> dict[str, Stored]:
    """All arrays of the files that an index names, "weight_map": name -> file. Raises UserError.

    Files lie beside the index, never elsewhere; a name that the index knows and its file does not is an error.
    """
    try:
        names = read_json(index)["weight_map"]
        files = sorted(set(names.values()))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f'{index}: not an index of weights, "weight_map": name -> file ({error!r})') from None
    shards = {}
    for file in files:
        if not isinstance(file, str) or not re.fullmatch(r"[\w-][\w.-]*", file, re.ASCII):
            raise UserError(f"{index}: names the file {file!r}, expected a file beside the index")
        shards[file] = read(index.parent / file)
    missing = [name for name, file in names.items() if name not in shards[file]]
    if missing:
        raise UserError(f"{index.parent / names[missing[0]]}: lacks {', '.join(missing)}, which {index.name} promises")
    return {name: shards[file][name] for name, file in names.items()}
