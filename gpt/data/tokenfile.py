"""Token files: a corpus encoded once, then memory-mapped, so that one larger than memory trains.

    head    32 bytes, little-endian: magic, format version, CRC-32 of the footer, bytes of tokens, bytes of footer
    tokens  uint16 where the vocabulary fits, else uint32, little-endian
    footer  JSON: dtype, count, n_vocab, tokenizer (its specification), sources (name, bytes, SHA-256 of each text)

The footer comes last because counts and digests are known only once all text has passed through.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpt.data.files import atomic_write
from gpt.data.text import read_blocks
from gpt.errors import UserError
from gpt.tokenizers import Tokenizer

__all__ = ["Source", "TokenFile", "is_token_file", "open_tokens", "prepare", "write_tokens"]

MAGIC = b"TWINTOK\n"
FORMAT = 1
_HEAD = struct.Struct("<8sIIQQ")
_LONGEST = 1 << 24  # characters without whitespace that are encoded in one piece
_BEFORE_LAST_SPACE = re.compile(r".*\S(?=[ \n])", re.DOTALL)


@dataclass(frozen=True)
class Source:
    """A text that went into a token file: its name, its length in bytes, the SHA-256 of its bytes."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class TokenFile:
    """An open token file. `ids` (N,) is a read-only memory map, whose slices read from disk what they cover."""

    path: Path
    ids: np.ndarray
    n_vocab: int
    tokenizer: dict[str, Any]  # for tokenizers.from_spec
    sources: tuple[Source, ...]


def prepare(source: Path, target: Path, tokenizer: Tokenizer, pattern: str = "*.txt") -> TokenFile:
    """Encode a text file, or all files of a folder that match `pattern`, in the order of their paths, into `target`.

    Documents, one a file, are separated by the tokenizer's end token. Memory stays bounded whatever their size: a text
    is encoded in pieces of about 1 MiB, cut before whitespace, where no token of our tokenizers crosses. (A run of more
    than 16 million characters without whitespace is cut inside, which may change the two tokens at the cut, as any cut
    may for a tokenizer of Hugging Face's.)
    """
    source = Path(source)
    files = _text_files(source, pattern)
    if len(files) > 1 and tokenizer.eot is None:
        raise UserError(f"tokenizer {tokenizer.name} has no end token to separate {len(files)} documents with")
    sources: list[Source] = []
    folder = source if source.is_dir() else source.parent
    write_tokens(target, _documents(folder, files, tokenizer, sources), tokenizer, sources)
    return open_tokens(target)


def write_tokens(
    target: Path, pieces: Iterable[Sequence[int]], tokenizer: Tokenizer, sources: Sequence[Source] = ()
) -> None:
    """Write pieces of token ids, one after the other, as one token file, all of it or nothing.

    `sources` is read after the last piece. UserError if there is no token at all or the disk is full.
    """
    dtype = np.dtype("<u2" if tokenizer.n_vocab <= 1 << 16 else "<u4")
    target, count = Path(target), 0
    with atomic_write(target) as file:
        file.write(bytes(_HEAD.size))
        for piece in pieces:
            file.write(np.asarray(piece, dtype).tobytes())
            count += len(piece)
        if count == 0:
            raise UserError(f"there is no text to write to {target}")
        facts = {
            "dtype": dtype.name,
            "count": count,
            "n_vocab": tokenizer.n_vocab,
            "tokenizer": tokenizer.spec(),
            "sources": [asdict(source) for source in sources],
        }
        footer = json.dumps(facts).encode()
        file.write(footer)
        file.seek(0)
        file.write(_HEAD.pack(MAGIC, FORMAT, zlib.crc32(footer), count * dtype.itemsize, len(footer)))


def is_token_file(path: Path) -> bool:
    """Whether a file begins as token files do; it may still be truncated, damaged or too new."""
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def open_tokens(path: Path, tokenizer: Tokenizer | None = None) -> TokenFile:
    """Open a token file. With `tokenizer`, UserError unless it is the one that the file was prepared with.

    UserError as well for what is no token file, is truncated or damaged, or was written by a newer version.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            facts, dtype = _read_facts(path, file.read(_HEAD.size), file)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if tokenizer is not None and facts["tokenizer"] != tokenizer.spec():
        theirs, ours = facts["tokenizer"]["name"], tokenizer.name
        other = f"with tokenizer {theirs}, not {ours}" if theirs != ours else f"with another vocabulary of {ours}"
        raise UserError(f"{path} was prepared {other}: prepare the text again")
    ids = np.memmap(path, dtype, mode="r", offset=_HEAD.size, shape=(facts["count"],))
    sources = tuple(Source(**source) for source in facts["sources"])
    return TokenFile(path, np.asarray(ids), facts["n_vocab"], facts["tokenizer"], sources)


def _read_facts(path: Path, head: bytes, file: Any) -> tuple[dict[str, Any], np.dtype]:
    if head[: len(MAGIC)] != MAGIC[: len(head)] or not head:
        raise UserError(f"{path} is no token file")
    if len(head) < _HEAD.size:
        raise UserError(f"{path} is truncated: {len(head)} bytes are less than the head of a token file")
    _, version, checksum, token_bytes, footer_bytes = _HEAD.unpack(head)
    if version > FORMAT:
        raise UserError(f"{path} has format version {version}, and this twingrad reads up to {FORMAT}: upgrade it")
    size, expected = os.fstat(file.fileno()).st_size, _HEAD.size + token_bytes + footer_bytes
    if size != expected:
        state = "truncated" if size < expected else "damaged"
        raise UserError(f"{path} is {state}: {size} bytes instead of {expected}")
    file.seek(_HEAD.size + token_bytes)
    footer = file.read(footer_bytes)
    if version < 1 or zlib.crc32(footer) != checksum:
        raise UserError(f"{path} is damaged: its footer is not the one that was written")
    facts = json.loads(footer)
    return facts, np.dtype(facts["dtype"]).newbyteorder("<")


def _text_files(source: Path, pattern: str) -> list[Path]:
    if not source.is_dir():
        return [source]
    files = sorted(path for path in source.rglob(pattern) if path.is_file())
    if not files:
        raise UserError(f"{source} holds no file that matches {pattern!r}")
    return files


def _documents(folder: Path, files: list[Path], tokenizer: Tokenizer, sources: list[Source]) -> Iterator[list[int]]:
    """Pieces of token ids of all files, the end token between two that have any; a Source for each file read."""
    any_before = False
    for path in files:
        digest, length, begun = hashlib.sha256(), 0, False

        def watch(data: bytes) -> None:
            nonlocal length
            digest.update(data)  # noqa: B023 - called before the next turn of the loop
            length += len(data)

        for ids in _encoded(read_blocks(path, watch), tokenizer):
            if ids and not begun:
                if any_before:
                    assert tokenizer.eot is not None
                    yield [tokenizer.eot]
                any_before = begun = True
            yield ids
        sources.append(Source(path.relative_to(folder).as_posix(), length, digest.hexdigest()))


def _encoded(blocks: Iterable[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Token ids of a text that comes in blocks, piece by piece, the same as of the text encoded whole."""
    waiting, encode = "", tokenizer.encode
    for block in blocks:
        waiting += block
        end = _BEFORE_LAST_SPACE.match(waiting)
        cut = end.end() if end else len(waiting) if len(waiting) >= _LONGEST else 0
        if cut:
            yield encode(waiting[:cut])
            # A tokenizer that writes the beginning of a text differently has another method for what follows.
            encode = getattr(tokenizer, "encode_continued", tokenizer.encode)
        waiting = waiting[cut:]
    yield encode(waiting)
