"""Log-probability of each target: what a text's likelihood, and the losses on preferences, are sums of.

forward    m = max x    z = sum exp(x - m)    y = x[target] - m - log z, and 0 where the target does not count
backward   dx = dy (one_hot(target) - exp(x - m) / z), and 0 there

The mean of -y over the targets that count is cross_entropy.py's loss.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from reference import pieces


def forward(logits: np.ndarray, targets: np.ndarray, ignore_index: int = -100) -> tuple[np.ndarray, Any]:
    """logits (..., V), targets (...) of integers in [0, V) or ignore_index -> y (...), saved.

    Another target out of range, or targets of another shape than the rows, raise ValueError.
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
    rows = x[counted]  # most tokens of a prompt and its answer do not count
    m, z = np.empty((2, len(rows), 1), x.dtype)

    def sum_exp(rows: np.ndarray, m: np.ndarray, z: np.ndarray) -> None:
        m[:] = rows.max(axis=-1, keepdims=True)
        z[:] = np.exp(rows - m).sum(axis=-1, keepdims=True)

    pieces.run(sum_exp, rows, m, z)
    y = np.zeros(target.shape, x.dtype)
    y[counted] = (x[counted, chosen] - m[:, 0]) - np.log(z[:, 0])
    return y.reshape(targets.shape), (logits.shape, rows, m, z, counted, chosen)


def backward(dy: np.ndarray, saved: Any) -> np.ndarray:
    """dy (...) -> dlogits (..., V)."""
    shape, rows, m, z, counted, chosen = saved
    dx = np.zeros((dy.size, shape[-1]), rows.dtype)
    scale = dy.reshape(-1)[counted, None]
    drows = np.empty(rows.shape, rows.dtype)

    def softmax(rows: np.ndarray, m: np.ndarray, z: np.ndarray, scale: np.ndarray, drows: np.ndarray) -> None:
        np.subtract(rows, m, out=drows)
        np.exp(drows, out=drows)
        drows *= -scale / z

    pieces.run(softmax, rows, m, z, scale, drows)
    drows[np.arange(len(chosen)), chosen] += scale[:, 0]
    dx[counted] = drows
    return dx.reshape(shape)
