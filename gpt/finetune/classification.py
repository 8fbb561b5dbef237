"""Texts to tell apart: reading, balancing and splitting them (Raschka, chapter 6), and their batches.

A batch is an ordinary one, in which a single position of each text counts: there the target is the number of its label.

    inputs    the text's tokens, then padding           (B, T) int64
    targets   IGNORE, ..., IGNORE, label                (B, T) int64, the label last or first

So the loss of a classifier is the cross entropy that any model is trained with, on logits of as many classes as there
are labels.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np

from gpt.data.examples import Examples
from gpt.data.files import atomic_write
from gpt.data.loader import check_positive
from gpt.data.text import read_text
from gpt.engine import IGNORE, Batch
from gpt.errors import UserError
from gpt.options import did_you_mean
from gpt.tokenizers import Tokenizer, encode_special

__all__ = [
    "LABELS",
    "Classification",
    "Labelled",
    "Row",
    "balance",
    "collate",
    "read_csv",
    "read_rows",
    "read_tsv",
    "split",
    "write_csvs",
]

LABELS = ("ham", "spam")
HEADER = ["Label", "Text"]
FILES = ("train.csv", "validation.csv", "test.csv")

Row = tuple[int, str]  # the number of a text's label, and the text
Item = TypeVar("Item")


class Labelled(NamedTuple):
    """A text's token ids (T,), T of at least 1, and the number of its label."""

    ids: np.ndarray
    label: int


def read_rows(path: str | Path, labels: Sequence[str] = LABELS) -> list[Row]:
    """Labels and texts of a file: `read_csv` where its name ends in .csv, else `read_tsv`."""
    path = Path(path)
    return read_csv(path, labels) if path.suffix.lower() == ".csv" else read_tsv(path, labels)


def read_tsv(path: str | Path, labels: Sequence[str] = LABELS) -> list[Row]:
    """Labels and texts of lines LABEL<TAB>TEXT, a label being one of `labels`, or, if none of these is a number, its
    number there.

    A text that begins with a quote goes on to the next one, across lines, as in any file of that kind. UserError names
    the file and the line of what is no such row.
    """
    return [_row(path, line, fields, labels, "a tab") for line, fields in _fields(path, "\t")]


def read_csv(path: str | Path, labels: Sequence[str] = LABELS) -> list[Row]:
    """Likewise, with commas, and a first line Label,Text."""
    rows = _fields(path, ",")
    if not rows or rows[0][1] != HEADER:
        got = repr(",".join(rows[0][1])) if rows else "an empty file"
        raise UserError(f"{path}: expected the first line {','.join(HEADER)}, got {got}")
    return [_row(path, line, fields, labels, "a comma") for line, fields in rows[1:]]


def balance(rows: Sequence[Row], seed: int = 123) -> list[Row]:
    """As many rows of each label as the rarest has: those drawn from the others, then those of the rarest, all.

    Rows are drawn as pandas' DataFrame.sample(n, random_state=seed) draws them, label by label. UserError where there
    are fewer than two labels.
    """
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[0], []).append(row)
    if len(groups) < 2:
        raise UserError(f"balance: expected texts of at least two labels, got {len(rows)} of {len(groups)}")
    n = min(map(len, groups.values()))
    ordered = [groups[label] for label in sorted(groups)]
    drawn = [_sample(group, n, seed) for group in ordered if len(group) > n]
    return list(itertools.chain(*drawn, *(group for group in ordered if len(group) == n)))


def split(
    rows: Sequence[Row], train: float = 0.7, validation: float = 0.1, seed: int = 123
) -> tuple[list[Row], list[Row], list[Row]]:
    """Training, validation and test rows: the first int(N train), the next int(N validation), the rest.

    They are shuffled before, as pandas' DataFrame.sample(frac=1, random_state=seed) does it. UserError where a part is
    left empty.
    """
    if not (0 < train < 1 and 0 < validation < 1 and train + validation < 1):
        raise UserError(f"split: expected fractions above 0 that leave some for testing, got {train} and {validation}")
    shuffled = _sample(rows, len(rows), seed)
    first = int(len(rows) * train)
    second = first + int(len(rows) * validation)
    parts = shuffled[:first], shuffled[first:second], shuffled[second:]
    if not all(parts):
        sizes = ", ".join(str(len(part)) for part in parts)
        raise UserError(
            f"split: {len(rows)} texts are too few, they make training, validation and test sets of {sizes}"
        )
    return parts


def write_csvs(
    folder: str | Path,
    train: Sequence[Row],
    validation: Sequence[Row],
    test: Sequence[Row],
    labels: Sequence[str] = LABELS,
) -> list[Path]:
    """Write train.csv, validation.csv and test.csv as `read_csv` reads them, labels as numbers; their paths.

    Labels that are numbers themselves are written as they are.
    """
    written = {i: name for name, i in _numbers(labels).items()}  # of name and number the latter
    paths = [Path(folder) / name for name in FILES]
    for path, rows in zip(paths, (train, validation, test), strict=True):
        lines = [",".join(HEADER), *(f"{written[label]},{_quoted(text)}" for label, text in rows)]
        with atomic_write(path) as file:
            file.write("".join(line + "\n" for line in lines).encode())
    return paths


class Classification(Examples[Labelled]):
    """Rows as token ids, the first `max_length` of each: by default as many as the longest text has.

    That default is for training; validation and test rows are given the training rows' `max_length`, which is the
    width of all batches. UserError for a row without text or with a label beyond `n_labels`, and for a width that does
    not fit `context_length`.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        tokenizer: Tokenizer,
        max_length: int | None = None,
        context_length: int | None = None,
        n_labels: int = len(LABELS),
    ) -> None:
        if max_length is not None:
            check_positive(max_length=max_length)
        self._examples: list[Labelled] = []
        for row, (label, text) in enumerate(rows, 1):
            if not 0 <= label < n_labels:
                raise UserError(f"row {row}: expected a label from 0 to {n_labels - 1}, got {label}")
            ids = encode_special(tokenizer, text)
            if not ids:
                raise UserError(f"row {row}: the text is empty")
            self._examples.append(Labelled(np.array(ids[:max_length], np.int32), label))
        chosen = "max_length" if max_length is not None else "max_length: the longest text"
        self.max_length = max_length or max((len(example.ids) for example in self._examples), default=1)
        if context_length is not None and self.max_length > context_length:
            raise UserError(
                f"{chosen} has {self.max_length} tokens, the model's context {context_length}: "
                f"choose a max_length of at most {context_length}, which cuts the texts to it"
            )

    def __len__(self) -> int:
        return len(self._examples)

    def example(self, index: int) -> Labelled:
        return self._examples[index]


def collate(
    examples: Sequence[Labelled], pad_id: int, max_length: int, position: Literal["last", "first"] = "last"
) -> Batch:
    """Inputs and targets (B, max_length): texts cut or padded on the right to that width, labels at one position.

    "last" is the batch's last column, which for most texts is padding: under causal attention it sees all of the text.
    "first" sees the first token alone.
    """
    if position not in ("last", "first"):
        raise UserError(f"position: {position!r} is not one of last, first")
    inputs = np.full((len(examples), max_length), pad_id, np.int64)
    targets = np.full((len(examples), max_length), IGNORE, np.int64)
    for row, (ids, label) in enumerate(examples):
        inputs[row, : len(ids)] = ids[:max_length]
        targets[row, -1 if position == "last" else 0] = label
    return Batch(inputs, targets)


def _sample(items: Sequence[Item], n: int, seed: int) -> list[Item]:
    """n of the items, in the order in which pandas draws them."""
    return [items[i] for i in np.random.RandomState(seed).choice(len(items), size=n, replace=False)] if items else []


def _quoted(text: str) -> str:
    """A field of a CSV. (The csv module's writer of Python 3.11 leaves a carriage return bare, which ends a row.)"""
    return '"' + text.replace('"', '""') + '"' if re.search('[",\r\n]', text) else text


def _fields(path: str | Path, delimiter: str) -> list[tuple[int, list[str]]]:
    """The fields of each row that is not blank, and the line that it begins in."""
    path = Path(path)
    text = read_text(path).removeprefix("\ufeff")
    if text and not text.endswith(("\n", "\r")):
        text += "\n"
    mark = ["end", "of", "file"]  # a row of ours: where a quote is never closed, it is swallowed as the others were
    reader = csv.reader(io.StringIO(text + delimiter.join(mark), newline=""), delimiter=delimiter)
    rows, line = [], 1
    try:
        for fields in reader:
            rows.append((line, fields))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}: line {line}: {error}") from None
    last, fields = rows.pop()
    if fields != mark:
        raise UserError(f"{path}: line {last}: a text begins with a quote, and no other quote ends it")
    return [(line, fields) for line, fields in rows if fields]


def _numbers(labels: Sequence[str]) -> dict[str, int]:
    """What may stand for each label: its name, and its number, unless a name is a number, which could be another's."""
    numbers = {name: i for i, name in enumerate(labels)}
    if any(re.fullmatch(r"[+-]?\d+", name) for name in labels):
        return numbers
    return numbers | {str(i): i for i in range(len(labels))}


def _row(path: str | Path, line: int, fields: list[str], labels: Sequence[str], delimiter: str) -> Row:
    place = f"{path}: line {line}"
    if len(fields) != 2:
        found = f"{len(fields)} fields" if len(fields) > 1 else f"no {delimiter.split()[1]}"
        raise UserError(f"{place}: expected a label, {delimiter} and a text, got {found}")
    label, text = fields
    numbers = _numbers(labels)
    if label not in numbers:
        close = did_you_mean(label, labels)
        raise UserError(f"{place}: the label {label!r} is not one of {', '.join(labels)}{close}")
    if not text.strip():
        raise UserError(f"{place}: the text is empty")
    return numbers[label], text
