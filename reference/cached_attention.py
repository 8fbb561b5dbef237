"""Attention of new tokens over all that a key-value cache holds of their text, of another length in each row.

forward    s = q k^T scale, -inf for keys after the query's own      p = softmax(s)      y = p v

The key of column j is at position j of its row's text, and query t of row b at position starts[b] + t: it sees the keys
j <= starts[b] + t. What lies in the columns after that, of a longer row or of an earlier use, changes nothing. It is
`attention` with the mask of a cache; nothing is learnt while text is generated, so that there is no backward pass.
"""

from __future__ import annotations

import math

import numpy as np


def forward(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, starts: np.ndarray, scale: float | None = None
) -> tuple[np.ndarray, None]:
    """q (B, H, T, D), k and v (B, G, S, D), G dividing H, starts (B,) of integers from 0 to S - T -> y like q, None.

    `scale` is 1 / sqrt(D) unless given. All of k and v must be finite.
    """
    B, H, T, D = q.shape
    G, S = k.shape[1:3]
    if k.shape != (B, G, S, D) or v.shape != k.shape or H % G:
        raise ValueError(f"k, v: expected both ({B}, G, S, {D}) with G dividing {H}, got {k.shape} and {v.shape}")
    if starts.shape != (B,):
        raise ValueError(f"starts: expected shape ({B},), got {starts.shape}")
    q = q.reshape(B, G, H // G * T, D)  # the query heads of a group share its keys, as if they were further queries
    s = np.matmul(q, k.swapaxes(-1, -2)).reshape(B, H, T, S)
    s *= 1 / math.sqrt(D) if scale is None else scale
    future = np.arange(S) > (starts[:, None] + np.arange(T))[..., None]  # (B, T, S)
    if future.any():
        np.copyto(s, -np.inf, where=future[:, None])
    s -= s.max(axis=-1, keepdims=True)
    np.exp(s, out=s)
    s /= s.sum(axis=-1, keepdims=True)
    y = np.matmul(s.reshape(B, G, H // G * T, S), v)
    return y.reshape(B, H, T, D), None
