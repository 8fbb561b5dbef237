"""Examples to finetune on: entries of a JSON file that is larger than memory, parts of them, and their loader.

A file of entries is one JSON array of objects, or JSON lines, an object a line. It is read once to know where each
entry is and that each is sound; what is kept is two offsets an entry, and an entry is read again when it is asked for.
"""

from __future__ import annotations

import json
import re
import zlib
from abc import abstractmethod
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar, overload

import numpy as np

from gpt.data.loader import check_data
from gpt.data.order import BatchOrder
from gpt.data.text import BOM, read_blocks, read_bytes
from gpt.engine import Batch, Preferences
from gpt.errors import UserError
from reference.torch_rng import Generator

__all__ = ["Entries", "ExampleLoader", "Examples", "JsonEntries", "Subset", "fingerprint", "number", "where"]

LONGEST = 1 << 22  # characters of an entry
_WHITE_SPACE = re.compile(r"[ \t\n\r]*")

Entries = Sequence[Mapping[str, Any]]
Example = TypeVar("Example")
Made = TypeVar("Made", Batch, Preferences)


class ExampleLoader(Generic[Example, Made]):
    """Batches of examples, in the order of PyTorch's DataLoader; see gpt.data.loader.Loader for iteration and state.

    `collate` makes a batch of a list of examples. Only a batch's examples are asked for, so they may be made then.
    `data`: what tells the examples' source from another, which a saved position must be of; None: not known.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        collate: Callable[[list[Example]], Made],
        batch_size: int,
        shuffle: bool,
        drop_last: bool,
        generator: Generator | None = None,
        data: str | None = None,
    ) -> None:
        if not len(examples):
            raise UserError(
                "there are no examples to train or evaluate on: the data set, or this split of it, is empty"
            )
        self.examples = examples
        self.data = data
        self.collate: Callable[[list[Example]], Made] = collate
        self.order = BatchOrder(len(examples), batch_size, shuffle, drop_last, generator)

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Made]:
        return map(self._batch, iter(self.order))

    def epoch(self) -> Iterator[Made]:
        """A new pass, which `state()` does not follow."""
        return map(self._batch, self.order.epoch())

    def state(self) -> dict[str, Any]:
        return {"data": self.data, **self.order.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        check_data(state, self.data)
        self.order.load_state(state)

    def _batch(self, rows: np.ndarray) -> Made:
        return self.collate([self.examples[row] for row in rows.tolist()])


class Examples(Sequence[Example]):
    """A sequence of examples that are made one by one, by `example(i)`; a slice is a list of them."""

    @abstractmethod
    def example(self, index: int) -> Example:
        """The example at 0 <= index < len(self)."""

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self.example(i) for i in range(len(self))[index]]
        return self.example(range(len(self))[index])


class Subset(Sequence[Mapping[str, Any]]):
    """Some of the entries, in an order of their own: `rows` (M,) are their indices. Nothing is read or copied."""

    def __init__(self, entries: Entries, rows: Sequence[int] | np.ndarray) -> None:
        self.entries = entries
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Subset: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return Subset(self.entries, self.rows[index])
        return self.entries[int(self.rows[index])]


class JsonEntries(Sequence[Mapping[str, Any]]):
    """The objects of a file that holds a JSON array, or JSON lines. UserError, with file and entry, for any other."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._bounds = _find(self.path)

    def __len__(self) -> int:
        return len(self._bounds) // 2

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Subset: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return Subset(self, range(len(self))[index])
        row = range(len(self))[index]
        begin, end = self._bounds[2 * row], self._bounds[2 * row + 1]
        try:
            with open(self.path, "rb") as file:
                file.seek(begin)
                entry = _DECODER.decode(file.read(end - begin).decode())
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror or error}") from error
        except ValueError:
            entry = None
        if not isinstance(entry, dict):
            raise UserError(f"{self.path}: entry {row + 1} is no longer where it was: the file has been changed")
        return entry


def fingerprint(*paths: Path) -> str:
    """What tells these files from others: how many bytes they have, and their checksum."""
    size = crc = 0
    for path in paths:
        for block in read_bytes(path):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return f"{size:,} bytes with checksum {crc:08x}"


def number(entries: Entries, index: int) -> int:
    """Which entry of its file, counted from 1, `entries[index]` is."""
    return number(entries.entries, int(entries.rows[index])) if isinstance(entries, Subset) else index + 1


def where(entries: Entries, index: int) -> str:
    """What `entries[index]` is called in messages: its file, if it has one, and its number there."""
    name = f"entry {number(entries, index)}"
    while isinstance(entries, Subset):
        entries = entries.entries
    return f"{entries.path}: {name}" if isinstance(entries, JsonEntries) else name


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse)


def _find(path: Path) -> array[int]:
    """First byte and end of each entry, one pair after the other. Memory does not depend on the file's length."""
    bounds = array("q")
    text = _Window(path)
    in_array = text.next() == "["
    if in_array:
        text.skip(1)
    while in_array or text.next():
        name = f"{path}: entry {len(bounds) // 2 + 1}"
        if in_array and not bounds and text.next() == "]":
            break
        bounds.append(text.byte)
        text.skip_object(name)
        bounds.append(text.byte)
        line = text.line
        then = text.next()
        if in_array and then == "]":
            break
        if in_array and then != ",":
            found = f"got {then!r}" if then else "the file ends: it is truncated"
            raise UserError(f"{name}, line {text.line}: expected a comma or ] after it, {found}")
        if in_array:
            text.skip(1)
        elif then and text.line == line:
            raise UserError(f"{name}, line {text.line}: expected a new line after it, got {then!r}")
    if in_array:
        text.skip(1)
        if then := text.next():
            raise UserError(f"{path}, line {text.line}: expected the file to end after the array, got {then!r}")
    if not bounds:
        raise UserError(f"{path}: holds no entries, expected an array of objects or an object a line")
    return bounds


class _Window:
    """The piece of a file's text that is being read: where in the file it is, and the next one when it is used up."""

    def __init__(self, path: Path) -> None:
        self._blocks = read_blocks(path)
        self._text, self._at = "", 0
        self.byte = 0  # of the file, where `_text[_at:]` begins
        self.line = 1  # likewise
        if self._more() and self._text.startswith(BOM):
            self.skip(1)

    def next(self) -> str:
        """Pass over white space; the character that follows, empty at the end of the file."""
        while True:
            space = _WHITE_SPACE.match(self._text, self._at)
            assert space is not None
            self.skip(space.end() - self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def skip(self, count: int) -> None:
        """Pass over so many characters."""
        passed = self._text[self._at : self._at + count]
        self._at += count
        self.byte += len(passed.encode())
        self.line += passed.count("\n")

    def skip_object(self, name: str) -> None:
        """Pass over white space and a JSON object; UserError, naming it so, for what is none."""
        if (first := self.next()) != "{":
            found = f"got what begins with {first!r}" if first else "the file ends: it is truncated"
            raise UserError(f"{name}, line {self.line}: expected an object, {found}")
        while True:
            try:
                _, end = _DECODER.raw_decode(self._text, self._at)
                break
            except json.JSONDecodeError as error:  # or the rest of the object has not been read yet
                at_hand = len(self._text) - self._at
                if at_hand >= LONGEST or not self._more():
                    size = "" if at_hand < LONGEST else f" in {at_hand} characters"
                    line = self.line + error.doc.count("\n", len(error.doc) - at_hand, error.pos)
                    raise UserError(
                        f"{name}, line {line}: expected a whole JSON object{size}, got one that is wrong or truncated: "
                        f"{error.msg}"
                    ) from None
            except (ValueError, RecursionError) as error:
                raise UserError(f"{name}, line {self.line}: expected a JSON object: {error}") from None
        self.skip(end - self._at)

    def _more(self) -> bool:
        """Read on, and forget what was passed over; False at the end of the file."""
        block = next(self._blocks, "")
        self._text, self._at = self._text[self._at :] + block, 0
        return bool(block)
