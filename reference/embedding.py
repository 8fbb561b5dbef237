"""Embedding, a table of rows: y = W[ids], the same as one_hot(ids) W without the product.

forward    y[n] = W[ids[n]]
backward   dW[v] = sum of dy[n] over all n with ids[n] = v      that is, dW = one_hot(ids)^T dy
"""

from __future__ import annotations

from typing import Any

import numpy as np

BLOCK = 64  # ids at a time: of a few one_hot is small, and so are the sums a product instead of a loop


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
    flat, rows = ids.ravel(), dy.reshape(-1, shape[1])
    for start in range(0, flat.size, BLOCK):
        block = slice(start, start + BLOCK)
        found, which = np.unique(flat[block], return_inverse=True)
        one_hot = (which == np.arange(len(found))[:, None]).astype(dy.dtype)  # its rows that are not 0
        dweight[found] += one_hot @ rows[block]
    return dweight
