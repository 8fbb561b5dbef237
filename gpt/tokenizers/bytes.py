"""Byte-level tokenizer: the id of a token is the value of its byte; id 256 ends a text. Needs no vocabulary file."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from gpt.tokenizers.base import END_OF_TEXT, checked_ids, checked_special, utf8

__all__ = ["ByteTokenizer"]

END_ID = 256


class ByteTokenizer:
    """256 bytes and <|endoftext|> (id 256)."""

    name: str = "bytes"
    n_vocab: int = 257
    eot: int | None = END_ID
    special: Collection[str] = ()
    begin: Sequence[int] = ()

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        data = utf8(text)
        if not checked_special(allowed_special):
            return list(data)
        first, *rest = data.split(END_OF_TEXT.encode())
        ids = list(first)
        for part in rest:
            ids += [END_ID, *part]
        return ids

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        end = END_OF_TEXT.encode()
        return b"".join(end if i == END_ID else bytes((i,)) for i in checked_ids(ids, self.n_vocab))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def spec(self) -> dict[str, Any]:
        return {"name": self.name}
