"""Parts of a corpus: a few MiB of text, encoded into a file of their own, so that several processes can work at once.

Where a corpus is cut depends on its files alone, never on who encodes it. A part's file is named after all that its
tokens depend on, and checked before it is used, so that an interrupted preparation goes on with the parts it finds.

    head    40 bytes, little-endian: magic, format version, CRC-32 of all that follows, bytes of the other three
    tokens  as a token file has them, without end tokens
    starts  uint64: at which of the tokens each document begins; one that began in an earlier part has none
    footer  JSON: the SHA-256 of each range that is a whole file, null for the others
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gpt.data.cuts import encoded
from gpt.data.documents import Range, digest, documents, ranges
from gpt.data.files import atomic_write
from gpt.data.tokenfile import pack
from gpt.errors import UserError
from gpt.tokenizers import Tokenizer

__all__ = ["LENGTH", "Part", "encode_part", "make_part", "part_names", "plan"]

LENGTH = 1 << 24  # bytes of text in a part
MAGIC = b"TWINPART"
FORMAT = 1
_HEAD = struct.Struct("<8sIIQQQ")
_BLOCK = 1 << 20  # bytes read at once
_TOGETHER = 1 << 15  # tokens written at once

Ranges = tuple[Range, ...]
Report = Callable[[int, int], object]  # is told of so many more bytes read, and tokens made of them


def plan(files: Iterable[tuple[Path, str]]) -> list[Ranges]:
    """What each part consists of: ranges of the files (path, name), in their order."""
    parts: list[Ranges] = []
    waiting: list[Range] = []
    size = 0
    for path, name in files:
        for part in ranges(path, name, LENGTH):
            waiting.append(part)
            size += part.end - part.begin
            if size >= LENGTH:
                parts.append(tuple(waiting))
                waiting, size = [], 0
    if waiting:
        parts.append(tuple(waiting))
    return parts


def part_names(parts: Iterable[Ranges], tokenizer: Tokenizer, field: str) -> list[str]:
    """The names of the parts' files: each the digest of all that the part's content depends on."""
    common = hashlib.sha256(json.dumps([FORMAT, tokenizer.spec(), tokenizer.n_vocab, field], sort_keys=True).encode())
    names = []
    for part in parts:
        content = common.copy()
        files = [(os.path.abspath(r.path), r.begin, r.end, r.size, r.modified) for r in part]
        content.update(json.dumps(files).encode())
        names.append(f"{content.hexdigest()[:32]}.part")
    return names


def make_part(part: Ranges, target: Path, tokenizer: Tokenizer, field: str, report: Report) -> bool:
    """Have the part's file at `target`; False if it was there already, and whole."""
    if Part.is_whole(target):
        return False
    encode_part(part, target, tokenizer, field, report)
    return True


def encode_part(part: Ranges, target: Path, tokenizer: Tokenizer, field: str, report: Report) -> None:
    """Encode a part into its file, all of it or nothing, in memory that does not depend on its length."""
    starts, digests = array("Q"), []
    with atomic_write(target) as file:
        out = _Writer(file, tokenizer, report)
        for each in part:
            digests.append(digest(each) if each.whole else None)
            for document in documents(each, field, lambda length: report(length, 0)):
                if not document.continued:
                    starts.append(out.count)
                for ids in encoded(document.blocks, tokenizer, document.continued):
                    out.add(ids)
        out.close(np.asarray(starts, "<u8").tobytes(), json.dumps(digests).encode())


class _Writer:
    """Writes a part's file as its tokens come, many at once where they come in small numbers."""

    def __init__(self, file: BinaryIO, tokenizer: Tokenizer, report: Report) -> None:
        self.count = 0  # tokens
        self._file, self._tokenizer, self._report = file, tokenizer, report
        self._waiting: list[Sequence[int] | np.ndarray] = []
        self._flushed = self._crc = 0
        file.write(bytes(_HEAD.size))

    def add(self, ids: Sequence[int] | np.ndarray) -> None:
        if len(ids):
            self._waiting.append(ids)
            self.count += len(ids)
            if self.count - self._flushed >= _TOGETHER:
                self._flush()

    def close(self, starts: bytes, footer: bytes) -> None:
        """Write what else belongs to the part."""
        self._flush()
        length = self._file.tell() - _HEAD.size
        self._write(starts)
        self._write(footer)
        self._file.seek(0)
        self._file.write(_HEAD.pack(MAGIC, FORMAT, self._crc, length, len(starts), len(footer)))

    def _flush(self) -> None:
        if self._waiting:
            self._write(pack(np.concatenate(self._waiting), self._tokenizer).tobytes())
            self._report(0, self.count - self._flushed)
            self._waiting, self._flushed = [], self.count

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._crc = zlib.crc32(data, self._crc)


class Part:
    """An open part: `n_tokens`, `n_documents` that begin in it, `digests` of its ranges. Tokens are read on request."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.path, self.dtype = path, dtype
        try:
            with open(path, "rb") as file:
                *_, self._token_bytes, self._start_bytes, footer = _HEAD.unpack(file.read(_HEAD.size))
                file.seek(self._token_bytes + self._start_bytes, os.SEEK_CUR)
                self.digests: list[str | None] = json.loads(file.read(footer))
        except (OSError, ValueError, struct.error) as error:
            raise UserError(f"cannot read {path}, which this run has written: {error}") from error
        self.n_tokens = self._token_bytes // dtype.itemsize
        self.n_documents = self._start_bytes // 8

    @staticmethod
    def is_whole(path: Path) -> bool:
        """Whether there is such a file, with the length and the checksum that it had when it was written."""
        try:
            with open(path, "rb") as file:
                magic, version, expected, *lengths = _HEAD.unpack(file.read(_HEAD.size))
                if (magic, version, sum(lengths)) != (MAGIC, FORMAT, os.fstat(file.fileno()).st_size - _HEAD.size):
                    return False
                crc = 0
                while data := file.read(_BLOCK):
                    crc = zlib.crc32(data, crc)
                return crc == expected
        except (OSError, struct.error):
            return False

    def starts(self) -> np.ndarray:
        """At which of its tokens documents begin, (n_documents,) int64, ascending; twice where one has no token."""
        return np.fromfile(self.path, "<u8", self.n_documents, offset=_HEAD.size + self._token_bytes).astype(np.int64)

    def tokens(self, begin: int = 0, end: int | None = None) -> Iterator[np.ndarray]:
        """Tokens begin..end-1, or to the end, in pieces that are at most 1 MiB long."""
        at, end = begin, self.n_tokens if end is None else end
        while at < end:
            length = min(end - at, _BLOCK // self.dtype.itemsize)
            yield np.fromfile(self.path, self.dtype, length, offset=_HEAD.size + at * self.dtype.itemsize)
            at += length
