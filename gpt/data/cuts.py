"""Where a long text may be cut, so that its pieces, encoded one by one, give the tokens of the text encoded whole.

Our tokenizers join no word with the next: a token has a space or a line end at its beginning or nowhere. So any place
before a space or a line end that follows anything but white space will do. Of the tokenizers of Hugging Face's some
join punctuation with the line ends behind it; between a word, a space and another word none is known to join anything.
So a cut is made there wherever there is such a place, and a document of up to PIECE characters is never cut at all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from gpt.errors import UserError
from gpt.tokenizers import Tokenizer

__all__ = ["encoded", "line_end", "word_end"]

PIECE = 1 << 22  # characters that are encoded in one piece
LONGEST = 1 << 24  # characters without a place to cut: there a cut is made anywhere, which may change two tokens
WINDOW = 1 << 16  # bytes looked at for a place
_LETTER, _BLACK = r"[^\W\d_](?= [^\W\d_])", r"\S(?=[ \n])"
_FIRST = [re.compile(place) for place in (_LETTER, _BLACK)]
_LAST = [re.compile(f".*{place}", re.DOTALL) for place in (_LETTER, _BLACK)]


def encoded(
    blocks: Iterable[str], tokenizer: Tokenizer, continued: bool = False
) -> Iterator[Sequence[int] | np.ndarray]:
    """Token ids of a document that comes in blocks, piece by piece, the same as of the document encoded whole.

    `continued`: these are not its first blocks.
    """
    begin: Callable[[str], Sequence[int] | np.ndarray] = getattr(tokenizer, "encode_array", tokenizer.encode)
    # A tokenizer that writes the beginning of a text differently has another method for what follows.
    further = getattr(tokenizer, "encode_continued", begin)
    encode, waiting = further if continued else begin, ""
    for block in blocks:
        waiting += block
        if len(waiting) < PIECE:
            continue
        place = _LAST[0].match(waiting) or _LAST[1].match(waiting)
        cut = place.end() if place else len(waiting) if len(waiting) >= LONGEST else 0
        if cut:
            yield encode(waiting[:cut])
            encode, waiting = further, waiting[cut:]
    if waiting:
        yield encode(waiting)


def word_end(path: Path, offset: int) -> int:
    """The first byte at or behind `offset` before which a file of UTF-8 may be cut; its length where there is none.

    What is no UTF-8 is for its reader to refuse.
    """
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            while data := file.read(WINDOW):
                # The rest of a character whose first byte is before the window: it might be white space.
                rest = next((i for i, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), 0)
                text = data[rest:].decode("utf-8", "surrogateescape")
                place = _FIRST[0].search(text) or _FIRST[1].search(text)
                if place:
                    return offset + rest + len(text[: place.end()].encode("utf-8", "surrogateescape"))
                offset += len(data)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return offset


def line_end(path: Path, offset: int) -> int:
    """The first byte behind `offset` that begins a line of a file; its length where there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            while data := file.read(WINDOW):
                if (end := data.find(b"\n")) >= 0:
                    return offset + end + 1
                offset += len(data)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return offset
