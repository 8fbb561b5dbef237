"""Text in: files of UTF-8, whole or block by block, and the split into training and validation part."""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from gpt.data import catalogue
from gpt.errors import UserError

__all__ = [
    "BOM",
    "decoded",
    "load_text",
    "read_blocks",
    "read_bytes",
    "read_text",
    "split_text",
    "split_tokens",
    "unmarked",
]

BLOCK = 1 << 20  # bytes
BOM = "\ufeff"


def load_text(name_or_path: str | Path) -> str:
    """The text of a catalogue entry, or of the file at a path. UserError suggests the nearest name if it is neither."""
    if str(name_or_path) == catalogue.STANDARD_LIBRARY:
        return catalogue.standard_library()
    if str(name_or_path) in catalogue.ENTRIES:
        return read_text(catalogue.get(str(name_or_path)))
    path = Path(name_or_path)
    if not path.exists():
        raise UserError(f"{str(name_or_path)!r} is neither a file nor {catalogue.unknown_name(path.stem)}")
    return read_text(path)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, its line ends as they are. UserError names the file and what is wrong with it."""
    return "".join(unmarked(read_blocks(path)))


def read_blocks(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file in pieces of about 1 MiB.

    UserError names the file and the offset of the first byte that is not UTF-8.
    """
    return decoded(read_bytes(path), path)


def read_bytes(
    path: Path, begin: int = 0, end: int | None = None, watch: Callable[[int], object] | None = None
) -> Iterator[bytes]:
    """Bytes begin..end-1 of a file, or to its end, in pieces of at most 1 MiB; `watch` is told the length of each."""
    try:
        with open(path, "rb") as file:
            file.seek(begin)
            while data := file.read(BLOCK if end is None else min(BLOCK, end - file.tell())):
                if watch is not None:
                    watch(len(data))
                yield data
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def decoded(blocks: Iterable[bytes], path: Path, first: int = 0) -> Iterator[str]:
    """The text of bytes in UTF-8 that come in blocks. `path`, and the offset of the first byte: for the UserError."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = first
    for data in itertools.chain(blocks, [b""]):
        waiting = len(decoder.getstate()[0])
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8: byte {offset - waiting + error.start}") from None
        if text:
            yield text
        offset += len(data)


def unmarked(pieces: Iterable[str]) -> Iterator[str]:
    """A file's text without the byte order mark that some programs put before it."""
    following = iter(pieces)
    if first := next(following, "").removeprefix(BOM):
        yield first
    yield from following


def split_text(text: str, fraction: float = 0.9) -> tuple[str, str]:
    """The first int(fraction * characters) of the text for training, the rest for validation, to be encoded apart."""
    cut = _cut(len(text), fraction, "characters")
    return text[:cut], text[cut:]


def split_tokens(ids: np.ndarray, fraction: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
    """The first int(fraction * N) of ids (N,) for training, the rest for validation; views, also of a memory map."""
    cut = _cut(len(ids), fraction, "tokens")
    return ids[:cut], ids[cut:]


def _cut(length: int, fraction: float, unit: str) -> int:
    if not 0 < fraction < 1:
        raise UserError(f"the training fraction must be between 0 and 1, got {fraction}")
    cut = int(fraction * length)
    if not 0 < cut < length:
        empty = "validation" if cut else "training"
        raise UserError(f"the {empty} split is empty: {fraction} of {length} {unit} are {cut}")
    return cut
