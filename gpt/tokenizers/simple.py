"""Word tokenizers by regular expression (Raschka, "Build a Large Language Model (From Scratch)", sections 2.2 to 2.4).

    text --split--> tokens --sorted set--> vocabulary (token -> id)

The book splits in three stages, each a pattern below; a token is then stripped, and dropped when only whitespace is
left. Printings of the book differ in the last pattern's class of punctuation, and so in the size of the vocabulary
of "The Verdict": 1130 with both ':' and ';' (PUNCTUATION), 1146 without ':', 1159 with neither.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np

from gpt.errors import UserError
from gpt.tokenizers.base import END_OF_TEXT, checked_ids

__all__ = [
    "COMMA_AND_PERIOD",
    "PUNCTUATION",
    "UNKNOWN",
    "WHITESPACE",
    "SimpleTokenizerV1",
    "SimpleTokenizerV2",
    "UnknownWordError",
    "build_vocabulary",
    "split",
]

WHITESPACE = r"(\s)"
COMMA_AND_PERIOD = r"([,.]|\s)"
PUNCTUATION = r"""([,.:;?_!"()']|--|\s)"""
UNKNOWN = "<|unk|>"


class UnknownWordError(UserError, KeyError):
    """A word that the vocabulary lacks; `word` is the word."""

    def __init__(self, word: str) -> None:
        super().__init__(word)
        self.word = word

    def __str__(self) -> str:
        return f"{self.word!r} is not in the vocabulary of simple-v1; simple-v2 encodes unknown words as {UNKNOWN}"


def split(text: str, pattern: str = PUNCTUATION, keep_whitespace: bool = False) -> list[str]:
    """Tokens of `text`, cut at and keeping what the pattern's group matches.

    With `keep_whitespace` only empty strings are dropped, so that the joined tokens are the text again.
    UserError for a pattern that is no regular expression with exactly one group.
    """
    parts = [part for part in _compiled(pattern).split(text) if part]
    return parts if keep_whitespace else [part.strip() for part in parts if part.strip()]


def build_vocabulary(tokens: Iterable[str], special: Sequence[str] = ()) -> dict[str, int]:
    """Each distinct token's id in sorted order, then the special tokens in the order given."""
    words = [word for word in sorted(set(tokens)) if word not in special]
    return {word: i for i, word in enumerate([*words, *special])}


class SimpleTokenizerV1:
    """Words of a fixed vocabulary; an unknown word raises UnknownWordError, which is a KeyError.

    decode joins with spaces, without the space before punctuation, so it gives back the words but not all of the
    whitespace; with `keep_whitespace` whitespace is part of the vocabulary and decode is exact.
    """

    name: str = "simple-v1"
    special: ClassVar[tuple[str, ...]] = ()
    begin: Sequence[int] = ()
    _space_before = re.compile(r"""\s+([,.?!"()'])""")

    def __init__(
        self, vocabulary: Mapping[str, int], pattern: str = PUNCTUATION, keep_whitespace: bool = False
    ) -> None:
        if sorted(vocabulary.values()) != list(range(len(vocabulary))):
            raise UserError(f"vocabulary must give its {len(vocabulary)} words the ids 0 to {len(vocabulary) - 1}")
        if missing := [word for word in self.special if word not in vocabulary]:
            raise UserError(f"the vocabulary of {self.name} must hold {', '.join(missing)}")
        _compiled(pattern)
        self.vocabulary = dict(vocabulary)
        self.words = sorted(vocabulary, key=self.vocabulary.__getitem__)  # by id
        self.pattern = pattern
        self.keep_whitespace = keep_whitespace
        self.n_vocab = len(vocabulary)
        self.eot = vocabulary[END_OF_TEXT] if END_OF_TEXT in self.special else None

    @classmethod
    def from_text(cls, text: str, pattern: str = PUNCTUATION, keep_whitespace: bool = False) -> Self:
        """The tokenizer whose vocabulary is the tokens of `text`."""
        return cls(build_vocabulary(split(text, pattern, keep_whitespace), cls.special), pattern, keep_whitespace)

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        """Ids of the words. A special token that stands alone is a word like any other, allowed or not."""
        return [self._id(word) for word in split(text, self.pattern, self.keep_whitespace)]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        words = [self.words[i] for i in checked_ids(ids, self.n_vocab)]
        return "".join(words) if self.keep_whitespace else self._space_before.sub(r"\1", " ".join(words))

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        return self.decode(ids).encode("utf-8")

    def spec(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "pattern": self.pattern,
            "keep_whitespace": self.keep_whitespace,
            "vocabulary": self.words,
        }

    def _id(self, word: str) -> int:
        try:
            return self.vocabulary[word]
        except KeyError:
            raise UnknownWordError(word) from None


class SimpleTokenizerV2(SimpleTokenizerV1):
    """V1 with <|endoftext|> and, for every word that the vocabulary lacks, <|unk|>."""

    name: str = "simple-v2"
    special: ClassVar[tuple[str, ...]] = (END_OF_TEXT, UNKNOWN)
    _space_before = re.compile(r"""\s+([,.:;?!"()'])""")

    def _id(self, word: str) -> int:
        return self.vocabulary.get(word, self.vocabulary[UNKNOWN])


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"pattern {pattern!r} is no regular expression: {error}") from None
    if compiled.groups != 1:
        raise UserError(
            f"pattern {pattern!r} must have one group, around what separates words; it has {compiled.groups}"
        )
    return compiled
