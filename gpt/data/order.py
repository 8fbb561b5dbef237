"""Which rows of a data set make which batch, in the order of PyTorch's DataLoader.

DataLoader draws twice from the random stream. At the start of a pass it draws an int64 as base seed for its workers,
whether it has any or not. When the first batch of a shuffled pass is asked for, RandomSampler draws an int64 as seed
of a generator of its own, whose randperm is the order. So an unshuffled pass consumes one draw and a shuffled one
two, and the stream that follows (dropout, initialisation) depends on it. Beyond a million rows the two draws are made
as well, but the order is one that needs no memory (permutation.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import numpy as np

from gpt.data.loader import check_positive, check_same
from gpt.data.permutation import permutation
from gpt.errors import UserError
from reference.torch_rng import Generator

__all__ = ["BatchOrder", "Epoch"]


class BatchOrder:
    """Passes over rows 0..n_rows-1 as arrays of batch_size row numbers, the last one smaller unless dropped.

    Without a generator nothing is drawn, which only an unshuffled order allows.
    """

    def __init__(
        self, n_rows: int, batch_size: int, shuffle: bool, drop_last: bool, generator: Generator | None = None
    ) -> None:
        check_positive(n_rows=n_rows, batch_size=batch_size)
        if shuffle and generator is None:
            raise UserError("shuffle needs a generator to draw the order from")
        if drop_last and n_rows < batch_size:
            raise UserError(f"drop_last leaves no batch: there are {n_rows} rows, fewer than batch_size {batch_size}")
        self.n_rows = n_rows
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.generator = generator
        self.n_batches = n_rows // batch_size if drop_last else -(-n_rows // batch_size)
        self._tracked: Epoch | None = None
        self._loaded: Epoch | None = None

    def __len__(self) -> int:
        return self.n_batches

    def epoch(self) -> Epoch:
        """A new pass, which `state()` does not follow."""
        if self.generator is not None:
            self.generator.randint64()
        return Epoch(self)

    def __iter__(self) -> Epoch:
        """The pass given to `load_state`, once, and otherwise a new one; `state()` follows it."""
        self._tracked, self._loaded = self._loaded or self.epoch(), None
        return self._tracked

    def state(self) -> dict[str, Any]:
        """JSON-able: the sizes, and seed and next batch of the tracked pass, None when it is over or none has begun."""
        tracked = self._loaded or self._tracked
        position = None if tracked is None or tracked.finished else {"seed": tracked.seed, "next": tracked.next}
        return {"n_rows": self.n_rows, "batch_size": self.batch_size, "epoch": position}

    def load_state(self, state: dict[str, Any]) -> None:
        check_same(state, n_rows=self.n_rows, batch_size=self.batch_size)
        position = state["epoch"]
        self._tracked = None
        self._loaded = None if position is None else Epoch(self, position["seed"], position["next"])


class Epoch:
    """One pass: an iterator over arrays of row numbers (B,) that knows its permutation's seed and its next batch."""

    def __init__(self, order: BatchOrder, seed: int | None = None, next_batch: int = 0) -> None:
        self.seed = seed
        self.next = next_batch
        self.finished = False
        self._order = order
        self._permutation: Callable[[np.ndarray], np.ndarray] | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> np.ndarray:
        order = self._order
        if self.next >= order.n_batches:
            self.finished = True
            raise StopIteration
        start = self.next * order.batch_size
        stop = min(start + order.batch_size, order.n_rows)
        rows = np.arange(start, stop)
        if order.shuffle:
            rows = self._permuted(rows)
        self.next += 1
        return rows

    def _permuted(self, positions: np.ndarray) -> np.ndarray:
        if self._permutation is None:
            if self.seed is None:
                assert self._order.generator is not None
                self.seed = self._order.generator.randint64()
            self._permutation = permutation(self._order.n_rows, self.seed)
        return self._permutation(positions)
