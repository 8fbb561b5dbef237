"""Embedding, a table of rows: y = W[ids], the same as one_hot(ids) W without the product.

forward    y[n] = W[ids[n]]
backward   dW[v] = sum of dy[n] over all n with ids[n] = v
"""

from __future__ import annotations

from typing import Any

import numpy as np


def forward(ids: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, Any]:
    """ids (...) of integers in [0, V), weight (V, C) -> y (..., C), saved. An id out of range raises ValueError."""
    if ids.size and not (0 <= ids.min() and ids.max() < len(weight)):
        wrong = ids[(ids < 0) | (ids >= len(weight))].flat[0]
        raise ValueError(f"ids: {wrong} is outside the embedding, expected 0 <= id < {len(weight)}")
    return weight[ids], (ids, weight.shape)


def backward(dy: np.ndarray, saved: Any, into: np.ndarray | None = None) -> np.ndarray:
    """dy (..., C) -> dweight (V, C). `into`: an array that dweight is added to, such as a tied head's gradient."""
    ids, shape = saved
    dweight = np.zeros(shape, dy.dtype) if into is None else into
    flat = ids.ravel()
    if flat.size == 0:
        return dweight
    order = np.argsort(flat, kind="stable")  # brings equal ids together, so that each run of them is one sum
    ids_sorted = flat[order]
    starts = np.flatnonzero(np.diff(ids_sorted, prepend=ids_sorted[0] - 1))
    dweight[ids_sorted[starts]] += np.add.reduceat(dy.reshape(-1, shape[1])[order], starts, axis=0)
    return dweight
