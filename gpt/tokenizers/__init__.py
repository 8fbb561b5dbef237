"""Tokenizers behind one protocol: byte-pair encoding, GPT-2's, one's own and others', SentencePiece, bytes, words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gpt.errors import UserError
from gpt.options import read_json
from gpt.tokenizers.base import END_OF_TEXT, Tokenizer, begun, encode_special
from gpt.tokenizers.bpe import BPETokenizer, huggingface_files, huggingface_json, huggingface_spec, train_bpe
from gpt.tokenizers.bytes import ByteTokenizer
from gpt.tokenizers.gpt2 import GPT2Tokenizer
from gpt.tokenizers.huggingface import HuggingFaceTokenizer
from gpt.tokenizers.pieces import SentencePieceTokenizer, train_pieces
from gpt.tokenizers.simple import SimpleTokenizerV1, SimpleTokenizerV2

__all__ = [
    "END_OF_TEXT",
    "JSON",
    "MODEL",
    "NAMES",
    "BPETokenizer",
    "ByteTokenizer",
    "GPT2Tokenizer",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "SimpleTokenizerV1",
    "SimpleTokenizerV2",
    "Tokenizer",
    "begun",
    "encode_special",
    "from_spec",
    "huggingface_files",
    "huggingface_spec",
    "load",
    "train_bpe",
    "train_pieces",
]

_FIXED: dict[str, type[GPT2Tokenizer] | type[ByteTokenizer]] = {"gpt2": GPT2Tokenizer, "bytes": ByteTokenizer}
_FROM_TEXT = {"simple-v1": SimpleTokenizerV1, "simple-v2": SimpleTokenizerV2}
_FROM_SPEC: dict[str, Callable[[Mapping[str, Any]], Tokenizer]] = {
    BPETokenizer.name: BPETokenizer.from_spec,
    HuggingFaceTokenizer.name: HuggingFaceTokenizer.from_spec,
    SentencePieceTokenizer.name: SentencePieceTokenizer.from_spec,
}
NAMES = (*_FIXED, *_FROM_TEXT)
MODEL, JSON = ".model", ".json"


def load(name: str | Path, text: str | None = None) -> Tokenizer:
    """The tokenizer of that name, or in a file: NAME.model of SentencePiece, NAME.json of ours or of Hugging Face's.

    simple-v1 and simple-v2 build their vocabulary from `text`, the others need none.
    """
    path, name = Path(name), str(name)
    if name not in NAMES and path.suffix in (MODEL, JSON):
        return _load_file(path)
    return _load_named(name, text)


def from_spec(spec: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer whose `spec()` this is: what a checkpoint or a token file carries."""
    name = spec.get("name")
    if isinstance(name, str) and name in _FROM_SPEC:
        return _FROM_SPEC[name](spec)
    if name not in _FROM_TEXT:
        return _load_named(str(name))
    try:
        words, pattern, keep_whitespace = spec["vocabulary"], spec["pattern"], spec["keep_whitespace"]
    except KeyError as error:
        raise UserError(f"the specification of tokenizer {name} lacks {error}") from None
    return _FROM_TEXT[name]({word: i for i, word in enumerate(words)}, pattern, keep_whitespace)


def _load_named(name: str, text: str | None = None) -> Tokenizer:
    if name in _FIXED:
        return _FIXED[name]()
    if name not in _FROM_TEXT:
        raise UserError(f"unknown tokenizer {name!r}: expected one of {', '.join(NAMES)}, or a file .model or .json")
    if text is None:
        raise UserError(f"tokenizer {name} builds its vocabulary from a text, and none was given")
    return _FROM_TEXT[name].from_text(text)


def _load_file(path: Path) -> Tokenizer:
    if path.suffix == MODEL:
        return SentencePieceTokenizer.from_file(path)
    spec = read_json(path)
    if not isinstance(spec, dict) or not {"name", "model"} & set(spec):
        raise UserError(f"{path}: not a tokenizer's file, neither twingrad's nor Hugging Face's")
    if "name" not in spec:
        return from_spec(huggingface_json(path))
    try:
        return from_spec(spec)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
