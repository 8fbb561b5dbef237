"""What a tokenizer is to the rest of the project, and the checks that all of them share."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

import numpy as np

from gpt.errors import UserError

__all__ = ["END_OF_TEXT", "Tokenizer", "begun", "encode_special"]

END_OF_TEXT = "<|endoftext|>"


class Tokenizer(Protocol):
    """Text to token ids 0..n_vocab-1 and back."""

    name: str
    n_vocab: int
    eot: int | None  # id of <|endoftext|>, None where the vocabulary has none

    @property
    def special(self) -> Collection[str]:
        """Names of special tokens that `encode` may be allowed beside <|endoftext|>, those of a chat template, say."""

    @property
    def begin(self) -> Sequence[int]:
        """Ids that a model has read before each text; `encode` puts none there."""

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        """Token ids of `text`, in which <|endoftext|> is ordinary text unless `allowed_special` holds it."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of ids (T,). Bytes that are not UTF-8 (a character cut in two) become U+FFFD."""

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The UTF-8 bytes of ids (T,), exact also where a character is cut in two."""

    def spec(self) -> dict[str, Any]:
        """What `tokenizers.from_spec` needs to build this tokenizer again: JSON-able."""


def encode_special(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of `text`, in which all special tokens that the tokenizer knows count as such."""
    end = {END_OF_TEXT} if tokenizer.eot is not None else set()
    return tokenizer.encode(text, allowed_special=end.union(tokenizer.special))


def begun(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """The ids of a text after those that a model has read before each text, unless they begin with these."""
    begin = list(tokenizer.begin)
    return ids if ids[: len(begin)] == begin else [*begin, *ids]


def checked_ids(ids: Sequence[int] | np.ndarray, n_vocab: int) -> list[int]:
    """ids (T,) as a list of int; UserError unless they are integers from 0 to n_vocab - 1."""
    array = np.asarray(ids)
    if array.size == 0:
        return []
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise UserError(f"ids must be one row of integers, got shape {array.shape} of {array.dtype}")
    wrong = (array < 0) | (array >= n_vocab)
    if wrong.any():
        raise UserError(f"token id {array[wrong.argmax()]} is outside the vocabulary of {n_vocab} (0 to {n_vocab - 1})")
    return array.tolist()


def checked_special(allowed_special: Collection[str], more: Collection[str] = ()) -> set[str]:
    """allowed_special as a set; UserError if it holds anything but <|endoftext|> and the names of `more`."""
    names = {allowed_special} if isinstance(allowed_special, str) else set(allowed_special)
    if unknown := names - {END_OF_TEXT, *more}:
        only = "and the vocabulary's special tokens only" if more else "only"
        raise UserError(f"allowed_special may hold {END_OF_TEXT!r} {only}, got {sorted(unknown)}")
    return names


def utf8(text: str) -> bytes:
    """UTF-8 bytes of `text`; UserError for a lone surrogate, which UTF-8 cannot say."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"character {error.start} of the text is the lone surrogate U+{ord(text[error.start]):04X}"
        ) from None
