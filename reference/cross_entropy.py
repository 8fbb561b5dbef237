"""Cross entropy of a softmax with integer targets, the mean over the targets that count.

forward    lse = log sum exp(x)      loss = mean over counted rows of (lse - x[target])
backward   dx = (exp(x - lse) - one_hot(target)) dloss / count, and 0 in rows that do not count

The largest entry of a row is taken out of its exponentials, so that no finite logits overflow. Only lse, one number a
row, is kept for the gradient: the probabilities are computed again rather than held, at 50,257 of them for each token.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from reference import pieces


def forward(logits: np.ndarray, targets: np.ndarray, ignore_index: int = -100) -> tuple[np.floating, Any]:
    """logits (..., V), targets (...) of integers in [0, V) or ignore_index -> loss, a scalar, saved.

    With every target ignored the loss is 0 and so is the gradient. Another target out of range raises ValueError.
    """
    x = logits.reshape(-1, logits.shape[-1])  # (N, V)
    target = targets.reshape(-1)  # (N,)
    counted = np.flatnonzero(target != ignore_index)
    chosen = target[counted]
    if chosen.size and not (0 <= chosen.min() and chosen.max() < x.shape[1]):
        wrong = chosen[(chosen < 0) | (chosen >= x.shape[1])][0]
        raise ValueError(f"targets: {wrong} is outside the vocabulary, expected 0 <= target < {x.shape[1]}")
    lse = np.empty((len(x), 1), x.dtype)

    def log_sum_exp(x: np.ndarray, lse: np.ndarray) -> None:
        largest = x.max(axis=-1, keepdims=True)
        lse[:] = np.log(np.exp(x - largest).sum(axis=-1, keepdims=True)) + largest

    pieces.run(log_sum_exp, x, lse)
    losses = lse[counted, 0] - x[counted, chosen]
    loss = losses.sum() / losses.dtype.type(max(1, len(counted)))
    return loss, (logits, lse, counted, chosen)


def backward(dloss: float, saved: Any) -> np.ndarray:
    """dloss, a scalar -> dlogits (..., V)."""
    logits, lse, counted, chosen = saved
    x = logits.reshape(-1, logits.shape[-1])
    scale = np.zeros_like(lse)
    scale[counted] = dloss / max(1, len(counted))
    dx = np.empty(x.shape, x.dtype)

    def softmax(x: np.ndarray, lse: np.ndarray, scale: np.ndarray, dx: np.ndarray) -> None:
        np.subtract(x, lse, out=dx)
        np.exp(dx, out=dx)
        dx *= scale

    pieces.run(softmax, x, lse, scale, dx)
    dx[counted, chosen] -= scale[counted, 0]
    return dx.reshape(logits.shape)
