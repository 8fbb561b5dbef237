"""The documents of files: a text is one document, a file of JSON lines has one in each line, either may be gzipped.

A file that can be read from anywhere is cut into ranges, which are read each for itself: a text where a cut changes no
token (cuts.py), JSON lines between lines.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpt.data.cuts import line_end, word_end
from gpt.data.text import BLOCK, decoded, read_bytes, unmarked
from gpt.errors import UserError
from gpt.options import did_you_mean

__all__ = ["PATTERNS", "Document", "Range", "digest", "documents", "find_files", "has_lines", "ranges"]

PATTERNS = ("*.txt", "*.txt.gz", "*.jsonl", "*.jsonl.gz")  # of the files of a folder
LONGEST_LINE = 1 << 28  # bytes; a line is in memory at once


class Range(NamedTuple):
    """Bytes begin..end-1 of a file, which is called `name` in messages and had this size and time when it was found."""

    path: str
    name: str
    begin: int
    end: int
    size: int
    modified: int

    @property
    def whole(self) -> bool:
        return self.begin == 0 and self.end == self.size


class Document(NamedTuple):
    """A document's text, in blocks. `continued`: a range before this one has its beginning."""

    blocks: Iterable[str]
    continued: bool = False


def find_files(sources: Sequence[Path], pattern: str | None = None) -> list[tuple[Path, str]]:
    """The path and the name of each file: of a folder those that match, in the order of their paths; any named itself.

    Links to files are followed, links to folders are not.

    pattern None: all of PATTERNS. UserError for what is not there, and for a folder without such a file.
    """
    found: list[tuple[Path, str]] = []
    for source in sources:
        if not source.is_dir():
            if not source.exists():
                raise UserError(f"{source}: no such file or folder")
            found.append((source, source.name))
            continue
        patterns = (pattern,) if pattern else PATTERNS
        if Path(patterns[0]).is_absolute():
            raise UserError(f"pattern: expected one of names in {source}, such as '*.txt', got {pattern!r}")
        _check_readable(source)
        matching = {path for each in patterns for path in source.rglob(each)}
        if broken := [path for path in sorted(matching) if not path.exists()]:
            raise UserError(f"{broken[0]}: a link to what is not there")
        files = sorted(path for path in matching if path.is_file())
        if not files:
            raise UserError(f"{source} holds no file that matches {' or '.join(map(repr, patterns))}")
        above = source if len(sources) == 1 else source.parent
        found += [(path, path.relative_to(above).as_posix()) for path in files]
    return found


def _check_readable(folder: Path) -> None:
    """UserError for a folder in it that cannot be read, whose texts would be missing without a word."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}")

    for _ in os.walk(folder, onerror=refuse):
        pass


def has_lines(path: str | Path) -> bool:
    """Whether a file holds JSON lines, which its name says: .jsonl or .jsonl.gz."""
    return Path(path).name.removesuffix(".gz").endswith(".jsonl")


def ranges(path: Path, name: str, length: int) -> Iterator[Range]:
    """A file cut into ranges of about `length` bytes. One that is gzipped stays whole."""
    status = _status(path)
    begin, size = 0, status.st_size
    while begin < size or begin == 0:
        end = size
        if begin + length < size and path.suffix != ".gz":
            end = (line_end if has_lines(path) else word_end)(path, begin + length)
        yield Range(str(path), name, begin, end, size, status.st_mtime_ns)
        begin = end or 1


def documents(part: Range, field: str, watch: Callable[[int], object]) -> Iterator[Document]:
    """The documents of a range, each to be read to its end before the next; `watch` is told how many bytes were read.

    UserError with the file and the byte, the line or the field that is wrong, also if the file has changed meanwhile.
    """
    path = Path(part.path)
    blocks = _unzipped(path, watch) if path.suffix == ".gz" else read_bytes(path, part.begin, part.end, watch)
    if has_lines(path):
        for text in _texts(path, blocks, field, part.begin):
            yield Document(text[i : i + BLOCK] for i in range(0, len(text), BLOCK))
    else:
        texts = decoded(blocks, path, part.begin)
        yield Document(texts, continued=True) if part.begin else Document(unmarked(texts))
    _check_unchanged(part)


def digest(part: Range) -> str:
    """The SHA-256 of the file that it is of, in hexadecimal digits. UserError where that has changed since."""
    try:
        with open(part.path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {part.path}: {error.strerror or error}") from error
    _check_unchanged(part)
    return found


def _check_unchanged(part: Range) -> None:
    now = _status(Path(part.path))
    if (now.st_size, now.st_mtime_ns) != (part.size, part.modified):
        raise UserError(f"{part.path} has changed while it was read: run again")


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _unzipped(path: Path, watch: Callable[[int], object]) -> Iterator[bytes]:
    """The bytes that a gzipped file holds; `watch` is told of its own bytes."""
    try:
        with open(path, "rb") as raw, gzip.GzipFile(fileobj=raw) as file:
            seen = 0
            while data := file.read(BLOCK):
                watch(raw.tell() - seen)
                seen = raw.tell()
                yield data
            watch(raw.tell() - seen)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def _texts(path: Path, blocks: Iterable[bytes], field: str, begin: int) -> Iterator[str]:
    """The text in each line of a file that is not empty."""
    offset = begin
    for number, line in enumerate(_lines(blocks, path), 1):
        if line.strip():
            try:
                text = _text(line, field, offset)
            except ValueError as error:
                before = sum(block.count(b"\n") for block in read_bytes(path, 0, begin)) if begin else 0
                raise UserError(f"{path}, line {before + number}: {error}") from None
            yield text
        offset += len(line) + 1


def _lines(blocks: Iterable[bytes], path: Path) -> Iterator[bytes]:
    """Lines without their ends."""
    waiting: list[bytes] = []
    length = 0
    for block in blocks:
        *ended, rest = block.split(b"\n")
        for piece in ended:
            yield b"".join([*waiting, piece])
            waiting, length = [], 0
        waiting.append(rest)
        length += len(rest)
        if length > LONGEST_LINE:
            raise UserError(f"{path} has a line of more than {LONGEST_LINE:,} bytes, and a line is to be a document")
    if length:
        yield b"".join(waiting)


def _text(line: bytes, field: str, offset: int) -> str:
    """The text in a line; ValueError says what is wrong with it. `offset`: of the line in its file."""
    try:
        entry = json.loads(line.decode("utf-8-sig" if offset == 0 else "utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {offset + error.start} of the file") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg}, column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number of too many digits; lists within lists without end
        raise ValueError(f"not JSON that can be read: {error}") from None
    if not isinstance(entry, dict):
        raise ValueError(f"expected an object with the field {field!r}, got {_kind(entry)}")
    if field not in entry:
        names = ", ".join(map(repr, list(entry)[:10])) or "none"
        raise ValueError(f"there is no field {field!r}, its fields are: {names}{did_you_mean(field, entry)}")
    text = entry[field]
    if not isinstance(text, str):
        raise ValueError(f"field {field!r}: expected text, got {_kind(text)}")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"field {field!r} holds the lone surrogate U+{ord(text[error.start]):04X}, which is no character"
            ) from None
    return text


def _kind(value: Any) -> str:
    """What a value of JSON is called."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
