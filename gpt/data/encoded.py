"""Encoded texts, kept in the cache folder, so that a second run on a text need not wait for its tokenizer."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path

import numpy as np

from gpt.data.catalogue import cache_folder
from gpt.data.files import atomic_write
from gpt.data.text import split_text
from gpt.errors import UserError
from gpt.tokenizers import Tokenizer

__all__ = ["KEPT", "encode_split", "encoded_folder"]

KEPT = 20  # files, those used last


def encode_split(text: str, tokenizer: Tokenizer, fraction: float) -> list[np.ndarray]:
    """The token ids (N,), (M,) of a text's training and validation part, int64; see `split_text`.

    A cache that cannot be read or written only costs time. Bytes, which need no tokenizer to speak of, are not cached.
    """
    parts = split_text(text, fraction)
    path = None if tokenizer.name == "bytes" else encoded_folder() / f"{_key(text, tokenizer, fraction)}.npz"
    kept = _read(path, tokenizer.n_vocab) if path else None
    if kept is not None:
        return kept
    ids = [np.array(tokenizer.encode(part), np.int64) for part in parts]
    if path:
        _write(path, ids, tokenizer.n_vocab)
    return ids


def encoded_folder() -> Path:
    return cache_folder() / "encoded"


def _key(text: str, tokenizer: Tokenizer, fraction: float) -> str:
    """Of all that the ids depend on, as hexadecimal digits."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass"))
    digest.update(b"\xff" + json.dumps([tokenizer.spec(), fraction], sort_keys=True).encode())
    return digest.hexdigest()


def _read(path: Path, n_vocab: int) -> list[np.ndarray] | None:
    """The ids in a file of the cache, or None where it does not hold any."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = [file[name] for name in ("training", "validation")]
        if any(ids.ndim != 1 or ids.dtype.kind != "u" or (ids >= n_vocab).any() for ids in arrays):
            return None
        os.utime(path)  # used last
    except Exception:  # a damaged archive raises whatever zipfile and NumPy stumble over
        return None
    return [ids.astype(np.int64) for ids in arrays]


def _write(path: Path, ids: list[np.ndarray], n_vocab: int) -> None:
    """Keep ids, and forget the files that were not used for longest."""
    dtype = np.min_scalar_type(n_vocab - 1)
    with contextlib.suppress(OSError, UserError):
        with atomic_write(path) as file:
            training, validation = (part.astype(dtype) for part in ids)
            np.savez(file, training=training, validation=validation)
        files = sorted(path.parent.iterdir(), key=lambda file: file.stat().st_mtime_ns, reverse=True)
        for old in files[KEPT:]:
            old.unlink()
