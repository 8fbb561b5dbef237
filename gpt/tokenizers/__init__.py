"""Tokenizers behind one protocol: byte-pair encoding, GPT-2's and others, bytes, and the book's two word tokenizers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpt.errors import UserError
from gpt.tokenizers.base import END_OF_TEXT, Tokenizer
from gpt.tokenizers.bpe import BPETokenizer, huggingface_files, huggingface_spec
from gpt.tokenizers.bytes import ByteTokenizer
from gpt.tokenizers.gpt2 import GPT2Tokenizer
from gpt.tokenizers.simple import SimpleTokenizerV1, SimpleTokenizerV2

__all__ = [
    "END_OF_TEXT",
    "NAMES",
    "BPETokenizer",
    "ByteTokenizer",
    "GPT2Tokenizer",
    "SimpleTokenizerV1",
    "SimpleTokenizerV2",
    "Tokenizer",
    "from_spec",
    "huggingface_files",
    "huggingface_spec",
    "load",
]

_FIXED: dict[str, type[GPT2Tokenizer] | type[ByteTokenizer]] = {"gpt2": GPT2Tokenizer, "bytes": ByteTokenizer}
_FROM_TEXT = {"simple-v1": SimpleTokenizerV1, "simple-v2": SimpleTokenizerV2}
NAMES = (*_FIXED, *_FROM_TEXT)


def load(name: str, text: str | None = None) -> Tokenizer:
    """The tokenizer of that name. simple-v1 and simple-v2 build their vocabulary from `text`, the others need none."""
    if name in _FIXED:
        return _FIXED[name]()
    if name not in _FROM_TEXT:
        raise UserError(f"unknown tokenizer {name!r}: expected one of {', '.join(NAMES)}")
    if text is None:
        raise UserError(f"tokenizer {name} builds its vocabulary from a text, and none was given")
    return _FROM_TEXT[name].from_text(text)


def from_spec(spec: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer whose `spec()` this is: what a checkpoint or a token file carries."""
    name = spec.get("name")
    if name == BPETokenizer.name:
        return BPETokenizer.from_spec(spec)
    if name not in _FROM_TEXT:
        return load(str(name))
    try:
        words, pattern, keep_whitespace = spec["vocabulary"], spec["pattern"], spec["keep_whitespace"]
    except KeyError as error:
        raise UserError(f"the specification of tokenizer {name} lacks {error}") from None
    return _FROM_TEXT[name]({word: i for i, word in enumerate(words)}, pattern, keep_whitespace)
