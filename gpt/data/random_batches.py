"""Batches of windows that start anywhere, drawn with replacement: nanoGPT's and the course's get_batch.

Starts are uniform on 0..N-max_length-1, drawn as torch.randint(N - max_length, (B,)) draws them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gpt.data.loader import as_tokens, check_data, check_positive, check_same, windows_at
from gpt.engine import Batch, Unread
from reference.torch_rng import Generator

__all__ = ["RandomBatches"]


class RandomBatches:
    """Random windows over ids (N,): inputs and targets (B, max_length), int64; see Loader for iteration and state.

    A pass has `steps_per_epoch` batches, or no end where that is None; then `len` raises TypeError. `data` says in a
    few words which tokens these are, and a position saved in others is refused.
    """

    def __init__(
        self,
        ids: Sequence[int] | np.ndarray,
        batch_size: int,
        max_length: int,
        generator: Generator,
        steps_per_epoch: int | None = None,
        vocab_size: int | None = None,
        data: str | None = None,
    ) -> None:
        check_positive(batch_size=batch_size, max_length=max_length)
        if steps_per_epoch is not None:
            check_positive(steps_per_epoch=steps_per_epoch)
        self.tokens = as_tokens(ids, max_length, vocab_size)
        self.data = data
        self.batch_size = batch_size
        self.max_length = max_length
        self.generator = generator
        self.steps_per_epoch = steps_per_epoch
        self._next = 0
        self._loaded = False

    def __len__(self) -> int:
        if self.steps_per_epoch is None:
            raise TypeError("random batches without steps_per_epoch never end, so they have no len()")
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[Batch | Unread]:
        if not self._loaded:
            self._next = 0
        self._loaded = False
        return self._tracked()

    def _tracked(self) -> Iterator[Batch | Unread]:
        while self.steps_per_epoch is None or self._next < self.steps_per_epoch:
            self._next += 1
            yield self._draw()
        self._next = 0

    def epoch(self) -> Iterator[Batch | Unread]:
        """A new pass, which `state()` does not follow."""
        steps = itertools.count() if self.steps_per_epoch is None else range(self.steps_per_epoch)
        return (self._draw() for _ in steps)

    def state(self) -> dict[str, Any]:
        """JSON-able: the sizes and the number of batches handed out in the tracked pass."""
        return {"data": self.data, "n_tokens": len(self.tokens), "batch_size": self.batch_size, "next": self._next}

    def load_state(self, state: dict[str, Any]) -> None:
        check_data(state, self.data)
        check_same(state, n_tokens=len(self.tokens), batch_size=self.batch_size)
        self._next = state["next"]
        self._loaded = True

    def _draw(self) -> Batch | Unread:
        starts = self.generator.randint(0, len(self.tokens) - self.max_length, (self.batch_size,))
        return windows_at(self.tokens, starts, self.max_length)
