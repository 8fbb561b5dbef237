"""Instructions and answers to learn from (Raschka, chapter 7): checked entries, their split, tokens and batches.

An entry is an object with "instruction" and "output", and perhaps "input". It is put into the prompt style that the
model will be asked in (gpt/prompts.py), the output behind it. A batch pads such rows to its own longest:

    rows                a b c          a b c d e
    padded              a b c # # #    a b c d e #       one end token behind each row, and then padding
    inputs              a b c # #      a b c d e
    targets             b c # . .      b c d e #         . is IGNORE: only the first end token is learnt
    without the prompt  . c # . .      . c d e #         a b is the prompt

What is padding is known by its place, not by its id: an end token within a row is a token like any other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt.data.examples import Entries, Examples, Subset, where
from gpt.data.files import atomic_write
from gpt.engine import IGNORE, Batch
from gpt.errors import UserError
from gpt.finetune.answers import (
    Answered,
    EncodedEntries,
    check_positive_or_none,
    check_texts,
    encode_answered,
    too_long,
)
from gpt.prompts import format_prompt
from gpt.tokenizers import Tokenizer

__all__ = ["InstructionDataset", "check_entry", "collate", "pad_rows", "shift", "split", "write_splits"]

FILES = ("train.json", "test.json")


def check_entry(entry: Mapping[str, Any], where: str) -> None:
    """UserError, beginning with `where`, for an entry without a text "instruction" or "output"; "input" may be absent.

    The output may be empty: then the end is what is learnt.
    """
    check_texts(entry, where, ("instruction", "output"), ("input",))


def split(entries: Entries, train: float = 0.85, test: float | None = 0.1) -> tuple[Subset, Subset, Subset]:
    """Training, validation and test entries, unshuffled: the first int(N train) are for training, the next int(N test)
    for testing, the rest for validation.

    With `test` None all of the rest is for testing, none for validation. UserError where another part is left empty.
    """
    if not (0 < train < 1 and (test is None or (0 < test < 1 and train + test < 1))):
        raise UserError(f"split: expected fractions above 0 that leave some for validation, got {train} and {test}")
    n = len(entries)
    first = int(n * train)
    second = n if test is None else first + int(n * test)
    parts = range(first), range(second, n), range(first, second)
    if any(not part for part in parts if test is not None or part is not parts[1]):
        sizes = ", ".join(str(len(part)) for part in parts)
        raise UserError(f"split: {n} entries are too few, they make training, validation and test sets of {sizes}")
    made = [Subset(entries, part) for part in parts]
    return made[0], made[1], made[2]


def write_splits(folder: str | Path, train: Entries, test: Entries) -> list[Path]:
    """Write train.json and test.json, arrays of the entries as they are; their paths."""
    paths = [Path(folder) / name for name in FILES]
    for path, entries in zip(paths, (train, test), strict=True):
        with atomic_write(path) as file:
            for i in range(len(entries)):
                # Escaped, so that a lone surrogate can be written too.
                file.write((",\n" if i else "[\n").encode() + json.dumps(entries[i], indent=4).encode())
            file.write(b"\n]\n" if len(entries) else b"[]\n")
    return paths


class InstructionDataset(Examples[Answered]):
    """Entries as token ids of prompt and output, without the end token, which `collate` adds.

    `max_length` is the model's context: an entry whose prompt leaves no room for the first token of its answer is
    dropped, and stands in `dropped`, its number in the file and the reason. `cache` keeps all ids, 4 bytes a token;
    without it an entry is read and encoded whenever it is asked for. UserError for an unsound entry, and if all are
    dropped.
    """

    def __init__(
        self,
        entries: Entries,
        tokenizer: Tokenizer,
        style: str = "alpaca",
        max_length: int | None = None,
        cache: bool = True,
    ) -> None:
        check_positive_or_none(max_length=max_length)

        def encode_entry(i: int) -> list[Answered] | str:
            entry = entries[i]
            check_entry(entry, where(entries, i))
            row = encode_answered(tokenizer, format_prompt(entry, style), entry["output"])
            return too_long(row, max_length) or [row]

        self._encoded = EncodedEntries(entries, encode_entry, 1, cache)
        self.dropped = self._encoded.dropped
        self.longest = self._encoded.longest  # tokens of an entry

    def __len__(self) -> int:
        return len(self._encoded)

    def example(self, index: int) -> Answered:
        return self._encoded[index][0]


def pad_rows(rows: Sequence[Sequence[int] | np.ndarray], pad_id: int) -> np.ndarray:
    """Rows of ids, each with one end token and then padding to one more than the longest: (B, T + 1) int64.

    The end token and the padding are both `pad_id`. All columns but the last are a batch's inputs.
    """
    padded = np.full((len(rows), max(map(len, rows)) + 1), pad_id, np.int64)
    for row, ids in enumerate(rows):
        padded[row, : len(ids)] = ids
    return padded


def shift(padded: np.ndarray) -> Batch:
    """Padded rows (B, T + 1) as inputs and, one token later, targets, (B, T); every target counts, padding too."""
    return Batch(padded[:, :-1].copy(), padded[:, 1:].copy())


def collate(
    examples: Sequence[tuple[Sequence[int] | np.ndarray, int]],
    pad_id: int = 50256,
    ignore_index: int = IGNORE,
    allowed_max_length: int | None = None,
    mask_instruction: bool = False,
) -> Batch:
    """A batch of examples, ids (T,) and how many of them are the prompt's, padded to the longest and then cut.

    `pad_id` is the tokenizer's end token. A target counts up to the end token behind its row, and not the padding;
    with `mask_instruction` neither do the prompt's own tokens. `allowed_max_length` is the model's context.
    """
    inputs, targets = shift(pad_rows([ids for ids, _ in examples], pad_id))
    for row, (ids, prompt_length) in enumerate(examples):
        targets[row, len(ids) :] = ignore_index
        if mask_instruction:
            targets[row, : max(prompt_length - 1, 0)] = ignore_index
    if allowed_max_length is not None:
        inputs, targets = (np.ascontiguousarray(part[:, :allowed_max_length]) for part in (inputs, targets))
    return Batch(inputs, targets)
