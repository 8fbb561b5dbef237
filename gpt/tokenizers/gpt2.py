"""GPT-2's byte-pair encoding (Radford et al. 2019, section 2.2), through tiktoken.

tiktoken downloads the vocabulary once; TIKTOKEN_CACHE_DIR names the folder where it keeps it, and with the files
already there no network is needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from gpt.errors import UserError
from gpt.tokenizers.base import END_OF_TEXT, checked_ids, checked_special, utf8

__all__ = ["GPT2Tokenizer", "is_gpt2"]

# SHA-256 of all tokens in the order of their ids, each after its length.
FINGERPRINT = "b83936794d5c58d4bf7f24cb0100cd291b9306d80ba0e2ff11988886d2d9c1ec"


class GPT2Tokenizer:
    """50,257 tokens, the last <|endoftext|>. UserError when the vocabulary can be neither found nor fetched."""

    name: str = "gpt2"
    n_vocab: int = 50257
    eot: int | None = 50256
    special: Collection[str] = ()
    begin: Sequence[int] = ()

    def __init__(self) -> None:
        import tiktoken  # 0.1 s, so only when it is asked for

        try:
            self._encoding = tiktoken.get_encoding("gpt2")
        except OSError as error:  # requests' exceptions are OSErrors too
            raise UserError(
                "cannot download the gpt2 tokenizer's vocabulary from openaipublic.blob.core.windows.net "
                f"({type(error).__name__}): set TIKTOKEN_CACHE_DIR to a folder where tiktoken once stored it"
            ) from error

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        utf8(text)
        return self._encoding.encode(text, allowed_special=checked_special(allowed_special), disallowed_special=())

    def encode_array(self, text: str) -> np.ndarray:
        """`encode(text)` as an array (T,) uint32, which takes tiktoken less time than a list."""
        utf8(text)
        return self._encoding.encode_to_numpy(text, disallowed_special=())

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        return self._encoding.decode_bytes(checked_ids(ids, self.n_vocab))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def spec(self) -> dict[str, Any]:
        return {"name": self.name}


def is_gpt2(tokens: Mapping[bytes, int], special: Mapping[str, int]) -> bool:
    """Whether a byte-level vocabulary is GPT-2's own."""
    if len(tokens) != GPT2Tokenizer.n_vocab - 1 or dict(special) != {END_OF_TEXT: GPT2Tokenizer.eot}:
        return False
    digest = hashlib.sha256()
    for token in sorted(tokens, key=tokens.__getitem__):
        digest.update(bytes((len(token),)) + token)
    return digest.hexdigest() == FINGERPRINT
