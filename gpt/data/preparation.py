"""A corpus as a token file: its parts encoded by several processes, then joined in one order.

The parts are kept in a folder beside the token file, NAME.parts, until that has its name, so that a preparation that
was interrupted, even killed, goes on with them when it is begun again. Nothing in the result depends on who encoded
which part, or when. No file, part or list of documents is in memory at once; a shuffled order takes 8 bytes a document
on disk.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from gpt.data.documents import digest, find_files, has_lines
from gpt.data.files import locked, replace
from gpt.data.parts import Part, Ranges, part_names, plan
from gpt.data.permutation import permutation
from gpt.data.progress import Progress
from gpt.data.tokenfile import Source, TokenFile, open_tokens, token_dtype, write_tokens
from gpt.data.workers import make_parts
from gpt.errors import UserError
from gpt.tokenizers import Tokenizer

__all__ = ["prepare"]

_TOGETHER = 1 << 12  # documents whose places are looked up at once


def prepare(
    sources: Path | Sequence[Path],
    target: Path,
    tokenizer: Tokenizer,
    pattern: str | None = None,
    *,
    field: str = "text",
    processes: int = 1,
    seed: int | None = None,
    progress: Progress | None = None,
) -> TokenFile:
    """Encode text files, JSON lines, and folders of them into one token file, documents separated by the end token.

    A text is one document; of JSON lines, each line's `field` is one. Files come in the order given, those of a folder
    that match `pattern` (None: all texts and JSON lines) in the order of their paths; with `seed`, documents come in an
    order that depends on it and their number alone. The tokens of a document are `tokenizer.encode(document)`, whatever
    its length and the number of processes; gpt/data/cuts.py says what holds beyond 4 million characters.

    UserError for what cannot be read or written, naming file and byte or line, and for a corpus without any token.
    """
    target = Path(target)
    folder = target.with_name(target.name + ".parts")
    progress = progress or Progress()
    dtype = token_dtype(tokenizer.n_vocab)
    files = find_files([sources] if isinstance(sources, Path | str) else list(sources), pattern)
    own = {target.resolve(), folder.resolve()}
    files = [(path, name) for path, name in files if not own & {path.resolve(), *path.resolve().parents}]
    _check_separable(files, tokenizer)
    parts = plan(files)
    paths = [folder / name for name in part_names(parts, tokenizer, field)]
    lock = locked(folder, f"{target}: another preparation is writing it; wait for that, or choose another --out")
    try:
        _make(parts, paths, tokenizer, field, processes, progress)
        opened = [Part(path, dtype) for path in paths]
        if not sum(part.n_tokens for part in opened):
            shutil.rmtree(folder)
            raise UserError(f"{files[0][0] if len(files) == 1 else f'{len(files)} files'}: there is no text to encode")
        end = tokenizer.eot
        pieces = _joined(opened, end) if seed is None else _shuffled(opened, seed, folder / "starts", end)
        write_tokens(folder / "tokens", pieces, tokenizer, _sources(parts, opened))
        replace(folder / "tokens", target)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or target}: {error.strerror or error}") from error
    finally:
        _tidy(folder)
        os.close(lock)
    shutil.rmtree(folder, ignore_errors=True)
    return open_tokens(target)


def _check_separable(files: Sequence[tuple[Path, str]], tokenizer: Tokenizer) -> None:
    lines = next((path for path, _ in files if has_lines(path)), None)
    if tokenizer.eot is None and (lines or len(files) > 1):
        what = f"the lines of {lines}" if lines else f"{len(files)} documents"
        raise UserError(f"tokenizer {tokenizer.name} has no end token to separate {what} with")


def _make(
    parts: Sequence[Ranges],
    paths: Sequence[Path],
    tokenizer: Tokenizer,
    field: str,
    processes: int,
    progress: Progress,
) -> None:
    """Have all parts, and tell how far that is."""

    def made(part: Ranges, now: bool) -> None:
        if not now:
            progress.keep(_length(part))

    paths[0].parent.mkdir(parents=True, exist_ok=True)
    progress.start(sum(map(_length, parts)))
    try:
        make_parts(parts, paths, tokenizer, field, processes, progress.add, made)
    finally:
        progress.close()


def _length(part: Ranges) -> int:
    return sum(each.end - each.begin for each in part)


def _sources(parts: Sequence[Ranges], opened: Sequence[Part]) -> list[Source]:
    """A Source for each file. One that lies in several ranges is read once more."""
    return [
        Source(each.name, each.size, known or digest(each))
        for part, made in zip(parts, opened, strict=True)
        for each, known in zip(part, made.digests, strict=True)
        if each.begin == 0
    ]


def _joined(parts: Sequence[Part], end: int | None) -> Iterator[np.ndarray]:
    """All documents that have any token, one after the other, `end` before each but the first."""
    any_before = False
    for part, starts in zip(parts, _starts(parts), strict=True):
        at = 0
        for tokens in part.tokens():
            first, last = np.searchsorted(starts, [at, at + len(tokens)])
            places = starts[first:last] - at
            if not any_before:
                places = places[1:]
            yield np.insert(tokens, places, np.array(end)) if len(places) else tokens
            any_before = True
            at += len(tokens)


def _shuffled(parts: Sequence[Part], seed: int, path: Path, end: int | None) -> Iterator[np.ndarray]:
    """The same documents in the order of `seed`. Where each begins is kept in a file at `path`."""
    offsets = [0, *itertools.accumulate(part.n_tokens for part in parts)]
    with open(path, "wb") as file:
        for offset, starts in zip(offsets, _starts(parts), strict=False):
            (starts + offset).tofile(file)
        np.array(offsets[-1:]).tofile(file)
    bounds = np.memmap(path, np.int64, mode="r")
    n = len(bounds) - 1
    order = permutation(n, seed)
    for first in range(0, n, _TOGETHER):
        rows = order(np.arange(first, min(first + _TOGETHER, n)))
        for i, (begin, stop) in enumerate(zip(bounds[rows].tolist(), bounds[rows + 1].tolist(), strict=True)):
            if first + i:
                yield np.array([end])
            yield from _tokens(parts, offsets, begin, stop)


def _starts(parts: Sequence[Part]) -> Iterator[np.ndarray]:
    """For each part, at which of its tokens documents that have any token begin, (D,) int64."""
    pending = False  # a document has begun, and its first token is in a later part
    for part in parts:
        starts = np.unique(part.starts())  # of documents that begin at one place all but the last are empty
        if pending and not (len(starts) and starts[0] == 0):
            starts = np.insert(starts, 0, 0)
        pending = len(starts) > 0 and int(starts[-1]) == part.n_tokens
        yield starts[:-1] if pending else starts


def _tokens(parts: Sequence[Part], offsets: Sequence[int], begin: int, stop: int) -> Iterator[np.ndarray]:
    """Tokens begin..stop-1 of all parts together, the first of which are at `offsets`."""
    i = bisect.bisect_right(offsets, begin) - 1
    while begin < stop:
        until = min(stop, offsets[i + 1])
        yield from parts[i].tokens(begin - offsets[i], until - offsets[i])
        begin, i = until, i + 1


def _tidy(folder: Path) -> None:
    """Remove what was only half written, and the folder where that leaves nothing in it."""
    with contextlib.suppress(OSError):
        for path in folder.glob(".*.tmp"):
            path.unlink()
        folder.rmdir()
