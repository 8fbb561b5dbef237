"""Sliding windows over a text's tokens, each paired with itself one token later (Raschka, section 2.6).

Window i is ids[i stride : i stride + max_length], its target ids[i stride + 1 : i stride + max_length + 1], for all
i stride < N - max_length: every window has a whole target.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gpt.data.loader import as_tokens, check_data, check_positive, windows_at
from gpt.data.order import BatchOrder
from gpt.engine import Batch, Unread
from reference.torch_rng import Generator

__all__ = ["WindowLoader"]


class WindowLoader:
    """Batches of windows over ids (N,), in the order of PyTorch's DataLoader; see Loader for iteration and state.

    A batch holds inputs and targets (B, max_length), int64. Of memory-mapped ids only the windows are read. `data` says
    in a few words which tokens these are, and a position saved in others is refused.
    """

    def __init__(
        self,
        ids: Sequence[int] | np.ndarray,
        batch_size: int,
        max_length: int,
        stride: int,
        shuffle: bool,
        drop_last: bool,
        generator: Generator | None = None,
        vocab_size: int | None = None,
        data: str | None = None,
    ) -> None:
        check_positive(batch_size=batch_size, max_length=max_length, stride=stride)
        self.tokens = as_tokens(ids, max_length, vocab_size)
        self.data = data
        self.max_length = max_length
        self.stride = stride
        self.n_windows = len(range(0, len(self.tokens) - max_length, stride))
        self.order = BatchOrder(self.n_windows, batch_size, shuffle, drop_last, generator)

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Batch | Unread]:
        return map(self._batch, iter(self.order))

    def epoch(self) -> Iterator[Batch | Unread]:
        """A new pass, which `state()` does not follow."""
        return map(self._batch, self.order.epoch())

    def state(self) -> dict[str, Any]:
        return {"data": self.data, **self.order.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        check_data(state, self.data)
        self.order.load_state(state)

    def _batch(self, rows: np.ndarray) -> Batch | Unread:
        return windows_at(self.tokens, rows * self.stride, self.max_length)
