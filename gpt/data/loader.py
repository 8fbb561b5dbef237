"""What a loader is to the trainer, and what all loaders share: checked token ids and shifted windows of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from gpt import world
from gpt.engine import Batch, Examples, Unread
from gpt.errors import UserError

__all__ = ["Loader"]

PIECE = 1 << 20  # tokens checked at once, so that a memory map is never copied whole


class Loader(Protocol):
    """Batches, an epoch an iteration, that can stop anywhere and go on there in another process.

    `state()` says where the pass last begun by `iter(loader)` stands: after the last batch that it handed out. After
    `load_state`, the next `iter(loader)` continues that pass; every other `iter` begins a new one. `epoch()` begins a
    pass that `state()` does not follow, for evaluation in the middle of a tracked one.

    A random generator belongs to whoever made it, who saves its state beside the loader's.
    """

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Examples]: ...
    def epoch(self) -> Iterator[Examples]: ...
    def state(self) -> dict[str, Any]: ...
    def load_state(self, state: dict[str, Any]) -> None: ...


def check_positive(**values: int) -> None:
    """UserError naming the first argument that is below 1."""
    for name, value in values.items():
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")


def check_same(state: dict[str, Any], **expected: int) -> None:
    """UserError naming the first setting in which the loader that was saved differs from this one."""
    for name, value in expected.items():
        if state.get(name) != value:
            raise UserError(
                f"cannot continue: the saved data position is of a loader with {name} {state.get(name)}, not {value}"
            )


def check_data(state: dict[str, Any], data: str | None) -> None:
    """UserError if the saved position is in other data than `data` says; where either says nothing, it passes."""
    saved = state.get("data")
    if saved and data and saved != data:
        raise UserError(f"cannot continue: the data has changed since the checkpoint, it was {saved}, and is {data}")


def as_tokens(ids: Sequence[int] | np.ndarray, max_length: int, vocab_size: int | None) -> np.ndarray:
    """ids as an integer array (N,), a view where it was one, with room for a window of max_length and its target.

    With `vocab_size` every id is checked, which reads the whole of a memory-mapped array. The ids of a TokenFile are
    below its n_vocab without that.
    """
    tokens = np.asarray(ids)
    if tokens.size == 0:
        raise UserError("there are no tokens to train or evaluate on: the text, or this split of it, is empty")
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise UserError(f"token ids must be one row of integers, got shape {tokens.shape} of {tokens.dtype}")
    if len(tokens) <= max_length:
        raise UserError(
            f"the text has {len(tokens)} tokens, but a window of {max_length} and its next token need {max_length + 1}"
        )
    if vocab_size is not None:
        for piece in range(0, len(tokens), PIECE):
            wrong = (tokens[piece : piece + PIECE] < 0) | (tokens[piece : piece + PIECE] >= vocab_size)
            if wrong.any():
                at = piece + int(wrong.argmax())
                raise UserError(f"token id {tokens[at]} at position {at} is outside the vocabulary of {vocab_size}")
    return tokens


def windows_at(tokens: np.ndarray, starts: np.ndarray, max_length: int) -> Batch | Unread:
    """Batch of int64 inputs and targets (B, max_length): the windows at starts (B,), and the same one token later.

    Where several processes share it, each reads its own windows only.
    """

    def read(examples: slice) -> Batch:
        windows = tokens[starts[examples, None] + np.arange(max_length + 1)].astype(np.int64, copy=False)
        return Batch(np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:]))

    return read(slice(None)) if world.size() == 1 else Unread(read, (len(starts), max_length))
