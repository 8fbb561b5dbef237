"""Text from tokens as they come: whole characters, up to a stop string, and nothing that might be taken back."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from gpt.errors import UserError
from gpt.tokenizers import Tokenizer

__all__ = ["TextStream"]


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
        # Some tokenizers write a token differently at a text's beginning: decoded with the prompt, none of them is.
        self._ids = list(prompt)
        self._decoded = len(tokenizer.decode_bytes(self._ids))  # bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._waiting = ""

    def push(self, token: int) -> str:
        """The text that this token completes, often its own, sometimes none."""
        if self.ended:
            return ""
        self._ids.append(token)
        data = self._tokenizer.decode_bytes(self._ids)
        self._waiting += self._utf8.decode(data[self._decoded :])
        self._decoded = len(data)
        found = [at for at in map(self._waiting.find, self._stop) if at >= 0]
        if found:
            self.ended, text, self._waiting = True, self._waiting[: min(found)], ""
            return text
        return self._release(len(self._waiting) - self._may_be_stop())

    def close(self) -> str:
        """What was waiting, now that nothing follows."""
        return self._release(len(self._waiting))

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
