"""Any tokenizer.json of Hugging Face's, through the library that defines the format, tokenizers.

A vocabulary of GPT-2's kind is read by gpt/tokenizers/bpe.py and needs no such library; this is for all others: byte
pairs with another split, as Llama 3's, pieces with byte fallback, as Llama 2's, and so on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gpt.errors import UserError, require
from gpt.tokenizers.base import END_OF_TEXT, checked_ids, checked_special, utf8

__all__ = ["HuggingFaceTokenizer"]

# What the end of a text is called where nothing beside the file says it.
_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
_SPACE = "▁"


class HuggingFaceTokenizer:
    """`text`: what the file holds. `end`: the token that ends a text and, where there is none, is <|endoftext|>.

    `special`: the special tokens' ids by name. Their names are ordinary text unless `allowed_special` holds them.
    `begin`: the ids that the file wants before each text; encode itself puts none there, and none behind. decode gives
    back what the file's normalizer and decoder leave of a text: all of it where tokens are of bytes and there is no
    normalizer. UserError for a damaged file.
    """

    name: str = "huggingface"

    def __init__(self, text: str, end: str | None = None) -> None:
        library = require("tokenizers", extra="tokenizers")
        try:
            self._tokenizer = library.Tokenizer.from_str(text)
            settings = json.loads(text)
            begin = _begin(settings.get("post_processor"))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises nothing more special, and where it panics no Exception
            raise UserError(f"not a tokenizer.json: {' '.join(str(error).split())}") from None
        self._text = text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # that is: as ordinary text
        added = self._tokenizer.get_added_tokens_decoder()
        self.special: dict[str, int] = {token.content: id for id, token in added.items() if token.special}
        names = {id: name for name, id in self._tokenizer.get_vocab(with_added_tokens=True).items()}
        if not names:
            raise UserError("not a tokenizer.json: its vocabulary is empty")
        self.n_vocab = max(names) + 1
        if end is not None and end not in self.special:
            id = self._tokenizer.token_to_id(end)
            if id is None:
                raise UserError(f"the end of a text, {end!r}, is no token of the vocabulary")
            self._tokenizer.add_special_tokens([end])  # which it is, whatever the file says
            self.special[end] = id
        self.end = end or next((name for name in _ENDS if name in self.special), None)
        self.eot: int | None = self.special[self.end] if self.end else None
        self.begin = [self.special[name] for name in begin if name in self.special]
        self._prefixes, write = _writer(list(_decoders(settings.get("decoder"))))
        plain = {id: token.content for id, token in added.items()}
        self._bytes = write and {id: plain[id].encode() if id in plain else write(name) for id, name in names.items()}

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        utf8(text)
        names = dict(self.special)
        if self.eot is not None:
            names.setdefault(END_OF_TEXT, self.eot)
        allowed = checked_special(allowed_special, names) & set(names)
        if not allowed:
            return self._encode(text)
        if allowed == set(names):  # the library knows where a space belongs after a special token
            if self.end and END_OF_TEXT not in self.special:
                text = text.replace(END_OF_TEXT, self.end)
            self._tokenizer.encode_special_tokens = False
            try:
                return self._encode(text)
            finally:
                self._tokenizer.encode_special_tokens = True
        longest_first = sorted(allowed, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
        ids = self._encode(parts[0])
        for name, part in zip(parts[1::2], parts[2::2], strict=True):
            ids += [names[name], *self._encode(part)]
        return ids

    def encode_continued(self, text: str) -> list[int]:
        """Token ids of what follows in a text whose beginning was encoded before: as `encode`, without any prefix."""
        utf8(text)
        if self._prefixes:  # goes before the line end instead, which no piece joins with what follows
            before, ids = self._encode("\n"), self._encode("\n" + text)
            if ids[: len(before)] == before:
                return ids[len(before) :]
        return self._encode(text)

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        checked = checked_ids(ids, self.n_vocab)
        if self._bytes is None:
            return self._tokenizer.decode(checked, skip_special_tokens=False).encode()
        data = b"".join(self._bytes.get(id, b"") for id in checked)  # some vocabularies leave ids out
        return data.removeprefix(b" ") if self._prefixes else data

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def spec(self) -> dict[str, Any]:
        return {"name": self.name, "json": self._text, "end": self.end}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> HuggingFaceTokenizer:
        text, end = spec.get("json"), spec.get("end")
        if not isinstance(text, str) or not isinstance(end, str | None):
            raise UserError(f"the specification of tokenizer {cls.name} is damaged: expected texts as json and end")
        return cls(text, end)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids


def _begin(processor: Any) -> list[str]:
    """The special tokens that a post-processor writes before a text, by name."""
    if not isinstance(processor, Mapping):
        return []
    if processor.get("type") == "Sequence":
        found = [_begin(step) for step in processor.get("processors") or ()]
        return next(filter(None, found), [])
    names = []
    for step in processor.get("single") or ():
        if not isinstance(step, Mapping) or "SpecialToken" not in step:
            break
        names.append(step["SpecialToken"]["id"])
    return names


def _decoders(decoder: Any) -> Iterator[Mapping[str, Any]]:
    """The steps of a decoder, those of a sequence one by one."""
    if isinstance(decoder, Mapping):
        if decoder.get("type") == "Sequence":
            for step in decoder["decoders"]:
                yield from _decoders(step)
        else:
            yield decoder


def _writer(steps: list[Mapping[str, Any]]) -> tuple[bool, Callable[[str], bytes] | None]:
    """Whether a space that begins the text is dropped, and what gives a token's bytes.

    None for a decoder whose text of a token depends on its neighbours: the library's own, which gives characters, is
    then the only one.
    """
    from gpt.tokenizers.bpe import character_bytes

    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        values = character_bytes()

        def bytes_of(token: str) -> bytes:
            try:
                return bytes(values[character] for character in token)
            except KeyError:  # a token that is none of bytes is written as it is
                return token.encode()

        return False, bytes_of
    fallback = {f"<0x{value:02X}>": bytes((value,)) for value in range(256)}
    replace = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    if steps[:3] == [replace, {"type": "ByteFallback"}, {"type": "Fuse"}] and steps[3:] in ([], [strip]):
        return bool(steps[3:]), lambda token: fallback.get(token) or token.replace(_SPACE, " ").encode()
    return False, None
