"""Token files: a corpus encoded once, then memory-mapped, so that one larger than memory trains.

    head    32 bytes, little-endian: magic, format version, CRC-32 of the footer, bytes of tokens, bytes of footer
    tokens  uint16 where the vocabulary fits, else uint32, little-endian
    footer  JSON: dtype, count, n_vocab, tokenizer (its specification), sources (name, bytes, SHA-256 of each file),
            crc32 of the tokens

The footer comes last because counts and digests are known only once all text has passed through.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpt.data.files import atomic_write
from gpt.errors import UserError
from gpt.tokenizers import Tokenizer

__all__ = ["Source", "TokenFile", "fingerprint", "is_token_file", "open_tokens", "pack", "token_dtype", "write_tokens"]

MAGIC = b"TWINTOK\n"
FORMAT = 1
_HEAD = struct.Struct("<8sIIQQ")


@dataclass(frozen=True)
class Source:
    """A file that went into a token file: its name, its length in bytes, the SHA-256 of its bytes."""

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
    crc32: int | None = None  # of the tokens; None in files written before it was kept

    @property
    def fingerprint(self) -> str:
        """What tells these tokens from others, without reading them: their number and checksum."""
        return fingerprint(len(self.ids), self.crc32)


def fingerprint(count: int, crc32: int | None) -> str:
    """Tokens in a few words. See TokenFile.fingerprint."""
    return f"{count:,} tokens" + ("" if crc32 is None else f" with checksum {crc32:08x}")


def token_dtype(n_vocab: int) -> np.dtype:
    """The type that ids 0..n_vocab-1 are stored in. UserError where 32 bits do not hold them."""
    if n_vocab > 1 << 32:
        raise UserError(f"a token file holds ids of at most 32 bits, and a vocabulary of {n_vocab:,} needs more")
    return np.dtype("<u2" if n_vocab <= 1 << 16 else "<u4")


def pack(ids: Sequence[int] | np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Ids (N,) as they are stored. UserError for one outside the tokenizer's vocabulary."""
    dtype = token_dtype(tokenizer.n_vocab)
    given = np.asarray(ids)
    if given.size and not 0 <= given.min() <= given.max() < tokenizer.n_vocab:
        wrong = given[(given < 0) | (given >= tokenizer.n_vocab)][0]
        raise UserError(f"{tokenizer.name} gave the id {wrong}, outside its vocabulary of {tokenizer.n_vocab}")
    return given.astype(dtype, copy=False)


def write_tokens(
    target: Path, pieces: Iterable[Sequence[int] | np.ndarray], tokenizer: Tokenizer, sources: Sequence[Source] = ()
) -> None:
    """Write pieces of token ids, one after the other, as one token file, all of it or nothing.

    `sources` is read after the last piece. UserError if there is no token at all or the disk is full.
    """
    dtype = token_dtype(tokenizer.n_vocab)
    target, count, crc = Path(target), 0, 0
    with atomic_write(target) as file:
        file.write(bytes(_HEAD.size))
        for piece in pieces:
            data = pack(piece, tokenizer).tobytes()
            file.write(data)
            crc = zlib.crc32(data, crc)
            count += len(piece)
        if count == 0:
            raise UserError(f"there is no text to write to {target}")
        facts = {
            "dtype": dtype.name,
            "count": count,
            "n_vocab": tokenizer.n_vocab,
            "tokenizer": tokenizer.spec(),
            "sources": [asdict(source) for source in sources],
            "crc32": crc,
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
    return TokenFile(path, np.asarray(ids), facts["n_vocab"], facts["tokenizer"], sources, facts.get("crc32"))


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
