"""Text from tokens as they come: whole characters, up to a stop string, and nothing that might be taken back."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from gpt.errors import UserError
from gpt.tokenizers import Tokenizer

__all__ = ["TextStream"]

CONTEXT = 8  # tokens; more would do no harm, but each is decoded again with every token that follows


class TextStream:
    """The text of a continuation: what `push` and `close` return, one after another.

    A token may end inside a character, whose first bytes wait for the rest; at the end they are dropped. What may be
    the beginning of a stop string waits as well. `ended` once a stop string has come, which is no part of the text, nor
    is anything after it. Raises UserError for an empty stop string.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), stop: Sequence[str] = ()) -> None:
        if "" in stop:
            raise UserError("stop: expected a text that ends the answer, got an empty one")
        self.ended = False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._context = self._recent(list(prompt))
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._waiting = ""

    def push(self, token: int) -> str:
        """The text that this token completes, often its own, sometimes none."""
        if self.ended:
            return ""
        before, ids = len(self._tokenizer.decode_bytes(self._context)), [*self._context, token]
        self._waiting += self._utf8.decode(self._tokenizer.decode_bytes(ids)[before:])
        self._context = self._recent(ids)
        found = [at for at in map(self._waiting.find, self._stop) if at >= 0]
        if found:
            self.ended, text, self._waiting = True, self._waiting[: min(found)], ""
            return text
        return self._release(len(self._waiting) - self._may_be_stop())

    def close(self) -> str:
        """What was waiting, now that nothing follows."""
        return self._release(len(self._waiting))

    def _recent(self, ids: list[int]) -> list[int]:
        """The ids to decode the next token with, so that it is written as in the whole text.

        Some tokenizers write a token differently at a text's beginning, where they drop spaces: a few tokens before it
        tell that it is none, but only if they write anything at all.
        """
        recent = ids[-CONTEXT:]
        return recent if self._tokenizer.decode_bytes(recent) else ids

    def _release(self, length: int) -> str:
        text, self._waiting = self._waiting[:length], self._waiting[length:]
        return text

    def _may_be_stop(self) -> int:
        """How many of the last characters are the beginning of a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for length in range(min(longest, len(self._waiting)), 0, -1):
            if any(stop.startswith(self._waiting[-length:]) for stop in self._stop):
                return length
        return 0
