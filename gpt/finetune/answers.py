"""Prompts and their answers as one row of token ids each: where the answer begins, and how many rows are kept.

A prompt and its answer are encoded as one text, as a model that continues prompts will have to write them. Where a
token's bytes are partly of the prompt and partly of the answer, it belongs to the answer, for the answer cannot be
written without it: `prompt_length` counts the leading tokens that lie wholly within the prompt's bytes.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gpt.data.examples import Entries, number, where
from gpt.errors import UserError
from gpt.tokenizers import Tokenizer, begun, encode_special

__all__ = [
    "Answered",
    "EncodedEntries",
    "Rows",
    "check_positive_or_none",
    "check_texts",
    "encode_answered",
    "too_long",
]


class Answered(NamedTuple):
    """Token ids (T,) int32 of a prompt and its answer; the first `prompt_length` are the prompt's."""

    ids: np.ndarray
    prompt_length: int


def encode_answered(tokenizer: Tokenizer, prompt: str, answer: str) -> Answered:
    """A prompt and its answer, encoded together, after what the tokenizer wants before each text.

    A tokenizer that does not give back the bytes of a text does not say where a token ends: there the prompt's tokens
    are those that begin both the prompt encoded alone and the two encoded together.
    """
    text = prompt + answer
    ids = encode_special(tokenizer, text)
    if tokenizer.decode_bytes(ids) == text.encode():
        end = len(prompt.encode())
        lengths = range(len(ids) + 1)  # bytes of the first n ids grow with n, so the last that fits can be searched
        length = bisect_right(lengths, end, key=lambda n: len(tokenizer.decode_bytes(ids[:n]))) - 1
    else:
        alone = encode_special(tokenizer, prompt)
        pairs = enumerate(zip(alone, ids, strict=False))
        length = next((i for i, (one, other) in pairs if one != other), min(len(alone), len(ids)))
    all_ids = begun(tokenizer, ids)
    return Answered(np.array(all_ids, np.int32), length + len(all_ids) - len(ids))


class Rows:
    """Rows of token ids, one after the other in one array: 4 bytes a token, and 12 a row."""

    def __init__(self) -> None:
        self.tokens: Any = array("i")
        self.ends: Any = array("q")
        self.prompt_lengths: Any = array("i")

    @classmethod
    def of(cls, tokens: np.ndarray, ends: np.ndarray, prompt_lengths: np.ndarray) -> Rows:
        """Rows over arrays that there are: tokens (N,) int32, the end of each row in them (R,), prompt lengths (R,)."""
        rows = cls()
        rows.tokens, rows.ends, rows.prompt_lengths = tokens, ends, prompt_lengths
        return rows

    def append(self, row: Answered) -> None:
        self.tokens.frombytes(row.ids.astype(np.int32).tobytes())
        self.ends.append(len(self.tokens))
        self.prompt_lengths.append(row.prompt_length)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> Answered:
        begin = int(self.ends[index - 1]) if index else 0
        ids = np.array(self.tokens[begin : int(self.ends[index])], np.int32)
        return Answered(ids, int(self.prompt_lengths[index]))


class EncodedEntries:
    """What is learnt from the entries of a data set: rows, `per_entry` of each; an entry that gives none is dropped.

    `encode_entry(i)` gives the rows of entries[i], or why it has none. All are encoded at once, so that what is wrong
    with the data shows before training begins; with `cache` the rows are kept, else an entry is encoded again whenever
    it is asked for. UserError, with file and entry, for what cannot be encoded, and if nothing is left.
    """

    def __init__(
        self, entries: Entries, encode_entry: Callable[[int], list[Answered] | str], per_entry: int, cache: bool
    ) -> None:
        self._encode, self._per_entry = encode_entry, per_entry
        self.dropped: list[tuple[int, str]] = []  # number of an entry in its file, and the reason
        self.kept = array("q")  # indices of the entries that are left
        self.longest = self.longest_answer = 0  # tokens of a row, and of what follows a prompt
        self.rows = Rows() if cache else None
        for i in range(len(entries)):
            try:
                made = encode_entry(i)
            except UserError as error:
                place = where(entries, i)
                raise error if str(error).startswith(place) else UserError(f"{place}: {error}") from None
            if isinstance(made, str):
                self.dropped.append((number(entries, i), made))
                continue
            self.kept.append(i)
            for row in made:
                self.longest = max(self.longest, len(row.ids))
                self.longest_answer = max(self.longest_answer, len(row.ids) - row.prompt_length)
                if self.rows is not None:
                    self.rows.append(row)
        if self.dropped and not self.kept:
            first, reason = self.dropped[0]
            raise UserError(f"none of {len(entries)} entries can be learnt from; entry {first}: {reason}")

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> list[Answered]:
        if self.rows is not None:
            return [self.rows[index * self._per_entry + row] for row in range(self._per_entry)]
        made = self._encode(self.kept[index])
        assert not isinstance(made, str)
        return made


def check_positive_or_none(**values: int | None) -> None:
    """UserError naming the first argument that is given and below 1."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")


def check_texts(entry: Mapping[str, Any], where: str, required: Sequence[str], optional: Sequence[str] = ()) -> None:
    """UserError, beginning with `where`, unless the entry has all required keys, and texts under these and the others.

    An instruction must not be empty.
    """
    missing = [key for key in required if key not in entry]
    if missing:
        raise UserError(
            f"{where}: lacks {', '.join(missing)}; it has {', '.join(sorted(map(str, entry))) or 'nothing'}"
        )
    for key in (*required, *optional):
        text = entry.get(key, "")
        if not isinstance(text, str):
            raise UserError(f"{where}: expected a text as {key}, got {type(text).__name__}")
        if key == "instruction" and not text.strip():
            raise UserError(f"{where}: the instruction is empty")


def too_long(row: Answered, max_length: int | None) -> str | None:
    """Why no token of the answer would be predicted from `max_length` inputs; None if one is."""
    if max_length is not None and row.prompt_length > max_length:
        return f"the prompt has {row.prompt_length} tokens, which leaves none of {max_length} to answer in"
    return None
