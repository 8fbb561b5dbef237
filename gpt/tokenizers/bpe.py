"""Byte-level byte-pair encoding of GPT-2's kind (Radford et al. 2019, section 2.2), any vocabulary, through tiktoken.

A vocabulary is a list of byte strings: all 256 bytes, and what merging two of them gave, in the order of the merges,
which is the order of their ids. Hugging Face writes the same as vocab.json and merges.txt, or as one tokenizer.json, in
which bytes stand as printable characters.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from gpt.errors import UserError, require
from gpt.options import read_json_object
from gpt.tokenizers.base import END_OF_TEXT, checked_ids, checked_special, utf8
from gpt.tokenizers.gpt2 import GPT2Tokenizer, is_gpt2
from gpt.tokenizers.huggingface import HuggingFaceTokenizer
from gpt.tokenizers.pieces import SentencePieceTokenizer

__all__ = ["BPETokenizer", "character_bytes", "huggingface_files", "huggingface_json", "huggingface_spec", "train_bpe"]

# Contractions, words, numbers, anything else, each with the space before it; whitespace.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class BPETokenizer:
    """`tokens`: byte string -> id. `special`: the other ids' names. `end`: which of these ends a text, if it is there.

    UserError for what is no such vocabulary.
    """

    name: str = "bpe"
    begin: Sequence[int] = ()

    def __init__(self, tokens: Mapping[bytes, int], special: Mapping[str, int], end: str = END_OF_TEXT) -> None:
        import tiktoken  # 0.1 s, so only when it is asked for

        missing = [value for value in range(256) if bytes((value,)) not in tokens]
        if missing:
            raise UserError(f"vocabulary: lacks {len(missing)} of the 256 bytes, the first is {missing[0]}")
        ids = sorted([*tokens.values(), *special.values()])
        if ids != list(range(len(ids))):
            raise UserError(f"vocabulary: expected each id from 0 to {len(ids) - 1} once")
        self.tokens, self.special = dict(tokens), dict(special)
        self.n_vocab = len(ids)
        self.end = end
        self.eot = self.special.get(end)
        self._encoding = tiktoken.Encoding(
            self.name, pat_str=PATTERN, mergeable_ranks=self.tokens, special_tokens=self.special
        )

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        utf8(text)
        allowed = checked_special(allowed_special, self.special) & set(self.special)
        return self._encoding.encode(text, allowed_special=allowed, disallowed_special=())

    def encode_array(self, text: str) -> np.ndarray:
        """`encode(text)` as an array (T,) uint32, which takes tiktoken less time than a list."""
        utf8(text)
        return self._encoding.encode_to_numpy(text, disallowed_special=())

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        return self._encoding.decode_bytes(checked_ids(ids, self.n_vocab))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def spec(self) -> dict[str, Any]:
        tokens = {base64.b64encode(token).decode(): id for token, id in self.tokens.items()}
        end = {"end": self.end} if self.end != END_OF_TEXT else {}
        return {"name": self.name, "tokens": tokens, "special": self.special, **end}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> BPETokenizer:
        try:
            tokens = {base64.b64decode(token, validate=True): int(id) for token, id in spec["tokens"].items()}
            special = {str(name): int(id) for name, id in spec["special"].items()}
            return cls(tokens, special, str(spec.get("end", END_OF_TEXT)))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"the specification of tokenizer bpe is damaged: {error!r}") from None


def train_bpe(texts: str | Iterable[str], vocab_size: int) -> BPETokenizer:
    """A vocabulary of that size: the 256 bytes, the merges that the texts ask for most, and <|endoftext|> last.

    The library tokenizers counts and merges; a merge never crosses the words that GPT-2's pattern cuts. UserError for a
    size that the texts do not give.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not sum(len(utf8(text)) for text in texts):
        raise UserError("there is no text to train a tokenizer on")
    if vocab_size < 257:
        raise UserError(f"vocab_size: expected at least 257, the bytes and {END_OF_TEXT}, got {vocab_size}")
    library = require("tokenizers", extra="tokenizers")
    trained = library.Tokenizer(library.models.BPE())
    trained.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=list(_characters().values()), show_progress=False
    )
    trained.train_from_iterator(texts, trainer)
    values = character_bytes()
    vocabulary = trained.get_vocab()
    if len(vocabulary) < vocab_size - 1:
        raise UserError(f"vocab_size: the text gives {len(vocabulary) + 1} tokens at most, got {vocab_size}")
    tokens = {bytes(values[character] for character in token): id for token, id in vocabulary.items()}
    return BPETokenizer(tokens, {END_OF_TEXT: vocab_size - 1})


def huggingface_spec(folder: Path) -> dict[str, Any] | None:
    """The `spec()` of the tokenizer in a folder of Hugging Face's or OpenAI's, or None where there is none.

    UserError for one that is damaged.
    """
    path, added = folder / "tokenizer.json", folder / "added_tokens.json"
    if path.exists():  # it alone says how words are cut, and has the tokens that were added
        return huggingface_json(path)
    for vocabulary, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        if (folder / vocabulary).exists() and (folder / merges).exists():
            lines = _read(folder / merges).splitlines()
            pairs = [line for line in lines if line and not line.startswith("#version")]
            tokens = read_json_object(folder / vocabulary) | (read_json_object(added) if added.exists() else {})
            return _spec(folder / vocabulary, tokens, pairs)
    path = folder / "tokenizer.model"
    return SentencePieceTokenizer.from_file(path, _begins(folder)).spec() if path.exists() else None


def huggingface_json(path: Path) -> dict[str, Any]:
    """The `spec()` of the tokenizer in a file tokenizer.json: bpe's where it is of GPT-2's kind, else huggingface's.

    What ends a text is read from the files beside it. UserError for a damaged one.
    """
    settings = read_json_object(path)
    if not _is_plain(settings):
        try:
            return HuggingFaceTokenizer(_read(path), _end(path.parent)).spec()
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    try:
        model = settings["model"]
        pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        added = {entry["content"]: entry["id"] for entry in settings.get("added_tokens") or ()}
        return _spec(path, {**model["vocab"], **added}, pairs)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a tokenizer ({error!r})") from None


def _is_plain(settings: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json cuts and merges as GPT-2 does."""
    model, splitter = settings.get("model"), settings.get("pre_tokenizer")
    if not isinstance(model, dict) or not isinstance(splitter, dict) or settings.get("normalizer"):
        return False
    return (
        model.get("type") == "BPE"
        and not model.get("ignore_merges")
        and splitter.get("type") == "ByteLevel"
        and not splitter.get("add_prefix_space", True)
        and splitter.get("use_regex", True) is True
    )


def _begins(folder: Path) -> bool:
    """Whether a tokenizer.model's texts begin with its <s>, as transformers has it: Llama's do unless they say not."""
    path = folder / "tokenizer_config.json"
    settings = read_json_object(path) if path.exists() else {}
    return bool(settings.get("add_bos_token", "Llama" in str(settings.get("tokenizer_class", "Llama"))))


def _end(folder: Path) -> str | None:
    """The name of the token that ends a text, as the files beside a tokenizer.json have it."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            token = read_json_object(folder / name).get("eos_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                return token
    return None


def _spec(path: Path, vocabulary: Mapping[str, Any], merges: Sequence[str]) -> dict[str, Any]:
    """Of a vocabulary in printable characters; what no merge makes and is no byte is special.

    What ends a text is read from the files beside it.
    """
    if not all(type(id) is int for id in vocabulary.values()):
        raise UserError(f"{path}: expected a whole number for each token")
    values = character_bytes()
    tokens: dict[bytes, int] = {}
    special = dict(vocabulary)
    made = [*_characters().values(), *("".join(pair.split(" ")) for pair in merges)]
    try:
        for token in made:
            if token in special:
                tokens[bytes(values[character] for character in token)] = special.pop(token)
        ids = [vocabulary[token] for token in made[256:]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: no byte-level vocabulary, {error} is not in it") from None
    if ids != sorted(ids):
        raise UserError(f"{path}: merges are not in the order of their ids, which tiktoken needs")
    try:
        end = _end(path.parent)
        tokenizer = BPETokenizer(tokens, special, end if end in special else END_OF_TEXT)
    except (UserError, TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
    if not is_gpt2(tokenizer.tokens, tokenizer.special):
        return tokenizer.spec()
    try:
        return GPT2Tokenizer().spec()
    except UserError:  # without network and cache; the folder has all that is needed
        return tokenizer.spec()


def huggingface_files(spec: Mapping[str, Any], context_length: int) -> dict[str, str]:
    """File name -> text of what transformers' tokenizer of this `spec()` reads; nothing where it has none."""
    from gpt.tokenizers import from_spec

    if spec.get("name") == HuggingFaceTokenizer.name:
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context_length}
        config |= {"eos_token": spec["end"]} if spec.get("end") else {}
        return {"tokenizer.json": spec["json"], "tokenizer_config.json": json.dumps(config, indent=2) + "\n"}
    if spec.get("name") not in ("gpt2", BPETokenizer.name):
        return {}
    tokenizer = from_spec(spec)
    special = tokenizer.special if isinstance(tokenizer, BPETokenizer) else {END_OF_TEXT: tokenizer.n_vocab - 1}
    names = {id: name for name, id in special.items()}
    characters = _characters()
    plain = {id: tokenizer.decode_bytes([id]) for id in range(tokenizer.n_vocab) if id not in names}
    names |= {id: "".join(characters[value] for value in token) for id, token in plain.items()}
    ranks = {token: id for id, token in sorted(plain.items())}
    pairs = (_pair(token, ranks) for token in ranks if len(token) > 1)
    merges = [" ".join("".join(characters[value] for value in part) for part in pair) for pair in pairs]
    end = next((name for name, id in special.items() if id == tokenizer.eot), None)
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": context_length,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), end),  # null too: what is not said is <|endoftext|>
        "additional_special_tokens": list(special),
    }
    return {
        "vocab.json": json.dumps({names[id]: id for id in sorted(names)}, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
    }


def _pair(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens whose merge is `token`: merge its bytes as the tokenizer would, short of the last step."""
    parts = [bytes((value,)) for value in token]
    while len(parts) > 2:
        joined = [(ranks.get(a + b, len(ranks)), i) for i, (a, b) in enumerate(pairwise(parts))]
        _, at = min(joined)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def _characters() -> dict[int, str]:
    """Byte -> the character that stands for it: itself where it can be printed, else one from U+0100 on, in turn."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [value for value in range(256) if value not in printable]
    return {value: chr(value) for value in printable} | {value: chr(256 + i) for i, value in enumerate(others)}


def character_bytes() -> dict[str, int]:
    """Character -> the byte that it stands for in Hugging Face's files."""
    return {character: value for value, character in _characters().items()}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: could not be read: {error}") from None
