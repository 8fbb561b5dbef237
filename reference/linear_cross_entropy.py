"""Output projection and cross entropy in one, some rows at a time, so that the (N, V) logits never exist at once.

forward    s = x W^T + b     loss = cross_entropy(s, targets)     ds = softmax(s) - one_hot(target), 0 where ignored
           and at once, from each rows' own ds:     dx = ds W     dW = sum of ds^T x     db = sum over rows of ds
backward   each of them times dloss / count

The gradient is linear in dloss, so that all but this factor can be had in the forward pass, while a chunk's logits are
there. They are thrown away with it: at 50,257 of them for each token they are most of a small model's memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from reference import cross_entropy, linear

CHUNK = 1 << 24  # logits at a time, 64 MiB of float32: enough rows for fast products, each of which reads the weight


def forward(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, targets: np.ndarray, ignore_index: int = -100
) -> tuple[np.floating, Any]:
    """x (..., C), weight (V, C), bias (V,) or None, targets (...) as in cross_entropy.py -> loss, a scalar, saved."""
    if targets.shape != x.shape[:-1]:
        raise ValueError(f"targets: expected shape {x.shape[:-1]}, as x has, got {targets.shape}")
    rows, target = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    dx, dweight = np.empty(rows.shape, x.dtype), np.zeros_like(weight)
    dbias = None if bias is None else np.zeros_like(bias)
    total = x.dtype.type(0)
    step = max(1, CHUNK // len(weight))

    def add(chunk: slice) -> np.floating:
        """Its part of the loss; its gradients are added. What is made of its logits goes before the next one's come."""
        nonlocal dweight, dbias
        logits, saved_linear = linear.forward(rows[chunk], weight, bias)
        mean, saved_loss = cross_entropy.forward(logits, target[chunk], ignore_index)
        counted = x.dtype.type(np.count_nonzero(target[chunk] != ignore_index))
        dlogits = cross_entropy.backward(counted, saved_loss)
        dx[chunk], dweight_chunk, dbias_chunk = linear.backward(dlogits, saved_linear)
        dweight += dweight_chunk
        if dbias is not None:
            dbias += dbias_chunk
        return mean * counted

    for start in range(0, len(rows), step):
        total += add(slice(start, start + step))
    count = x.dtype.type(max(1, np.count_nonzero(target != ignore_index)))
    return total / count, (dx.reshape(x.shape), dweight, dbias, count)


def backward(dloss: float, saved: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """dloss, a scalar -> dx (..., C), dweight (V, C), dbias (V,) or None."""
    dx, dweight, dbias, count = saved
    factor = dloss / count
    return dx * factor, dweight * factor, None if dbias is None else dbias * factor
