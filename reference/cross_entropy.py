"""Cross entropy of a softmax with integer targets, the mean over the targets that count.

forward    m = max x    z = sum exp(x - m)    loss = mean over counted rows of (log z - (x[target] - m))
backward   dx = (exp(x - m) / z - one_hot(target)) dloss / count, and 0 in rows that do not count

With the largest entry taken out of its exponentials no finite logits overflow; log z and m are never added up, because
beside a large m the digits of log z would be lost. Only m and z, two numbers a row, are kept for the gradient: the
probabilities are computed again rather than held, at 50,257 of them for each token.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from reference import pieces


def forward(logits: np.ndarray, targets: np.ndarray, ignore_index: int = -100) -> tuple[np.floating, Any]:
    """logits (..., V), targets (...) of integers in [0, V) or ignore_index -> loss, a scalar, saved.

    With every target ignored the loss is 0 and so is the gradient. Another target out of range, or targets of another
    shape than the rows, raise ValueError.
    """
    if targets.shape != logits.shape[:-1]:
        raise ValueError(f"targets: expected shape {logits.shape[:-1]}, as logits have, got {targets.shape}")
    x = logits.reshape(-1, logits.shape[-1])  # (N, V)
    target = targets.reshape(-1)  # (N,)
    counted = np.flatnonzero(target != ignore_index)
    chosen = target[counted]
    if chosen.size and not (0 <= chosen.min() and chosen.max() < x.shape[1]):
        wrong = chosen[(chosen < 0) | (chosen >= x.shape[1])][0]
        raise ValueError(f"targets: {wrong} is outside the vocabulary, expected 0 <= target < {x.shape[1]}")
    m, z = np.empty((2, len(x), 1), x.dtype)

    def sum_exp(x: np.ndarray, m: np.ndarray, z: np.ndarray) -> None:
        m[:] = x.max(axis=-1, keepdims=True)
        exponentials = x - m
        np.exp(exponentials, out=exponentials)
        z[:] = exponentials.sum(axis=-1, keepdims=True)

    pieces.run(sum_exp, x, m, z)
    losses = np.log(z[counted, 0]) - (x[counted, chosen] - m[counted, 0])
    loss = losses.sum() / losses.dtype.type(max(1, len(counted)))
    return loss, (logits, m, z, counted, chosen)


def backward(dloss: float, saved: Any) -> np.ndarray:
    """dloss, a scalar -> dlogits (..., V)."""
    logits, m, z, counted, chosen = saved
    x = logits.reshape(-1, logits.shape[-1])
    scale = np.zeros_like(z)
    scale[counted] = dloss / max(1, len(counted))
    dx = np.empty(x.shape, x.dtype)

    def softmax(x: np.ndarray, m: np.ndarray, z: np.ndarray, scale: np.ndarray, dx: np.ndarray) -> None:
        np.subtract(x, m, out=dx)
        np.exp(dx, out=dx)
        dx *= scale / z

    pieces.run(softmax, x, m, z, scale, dx)
    dx[counted, chosen] -= scale[counted, 0]
    return dx.reshape(logits.shape)
