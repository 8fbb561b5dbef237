"""Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1), causal or not, with grouped heads and dropout.

forward    s = q k^T scale      p = softmax(s)     y = drop(p) v
backward   dv = drop(p)^T dy    dp = drop(dy v^T)  ds = p (dp - rowsum(dp p))
           dq = ds k scale      dk = ds^T q scale

Softmax has no parameters of its own: ds is what remains of dp when its mean under p is taken away, so that each row of
ds sums to 0, which is also why a bias added to every key receives no gradient. Grouped heads (Ainslie et al. 2023)
share keys and values: query head h reads key head h // (H // G), and a key head's gradient is the sum over its group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from reference import philox, pieces

BLOCK = 128  # queries at a time: nearly half of the scores of a long causal sequence are never computed


def forward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    causal: bool = True,
    scale: float | None = None,
    rate: float = 0.0,
    noise: philox.Noise | None = None,
) -> tuple[np.ndarray, Any]:
    """q (B, H, T, D), k and v (B, G, S, D), G dividing H -> y (B, H, T, D), saved.

    Causal: the queries are the last T of the S positions, and a query sees no key after its own. A query that sees no
    key at all gives 0. `scale` is 1 / sqrt(D) unless given. `rate`, `noise`: dropout of p, see dropout.py.
    """
    B, H, T, D = q.shape
    G, S = k.shape[1:3]
    if k.shape != (B, G, S, D) or v.shape != k.shape or H % G:
        raise ValueError(f"k, v: expected both ({B}, G, S, {D}) with G dividing {H}, got {k.shape} and {v.shape}")
    scale = 1 / math.sqrt(D) if scale is None else scale
    q = q.reshape(B, G, H // G, T, D) * q.dtype.type(scale)  # which has fewer entries than the scores
    k, v = k[:, :, None], v[:, :, None]  # (B, G, 1, S, D)
    p = np.empty((B, G, H // G, T, S), q.dtype)
    p[..., : max(0, T - S), :] = 0  # where causal, what sees no key; the others are yet to be computed
    for rows, keys in _blocks(T, S, causal):
        np.matmul(q[..., rows, :], k[..., keys, :].swapaxes(-1, -2), out=p[..., rows, keys])
        p[..., rows, keys.stop :] = 0
        future = np.arange(keys.stop) > np.arange(rows.start, rows.stop)[:, None] + S - T if causal else None
        pieces.run(lambda s, future=future: _softmax(s, future), p.reshape(B * H, T, S)[:, rows, keys])
    dropped, keep = p, None
    if rate and noise is not None:
        keep = philox.keep_mask(noise, (B, H, T, S), rate).reshape(p.shape)
        dropped = p * keep
        dropped *= 1 / (1 - rate)
    y = np.zeros((B, T, G, H // G, D), q.dtype).transpose(0, 2, 3, 1, 4)  # in this order, joining heads needs no copy
    for rows, keys in _blocks(T, S, causal):
        np.matmul(dropped[..., rows, keys], v[..., keys, :], out=y[..., rows, :])
    return y.reshape(B, H, T, D), (q, k, v, p, dropped, keep, scale, rate, causal)


def backward(dy: np.ndarray, saved: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dy (B, H, T, D) -> dq (B, H, T, D), dk (B, G, S, D), dv (B, G, S, D)."""
    q, k, v, p, dropped, keep, scale, rate, causal = saved
    B, G, R, T, D = q.shape
    S = k.shape[3]
    dy = dy.reshape(q.shape)
    dp, dq = np.empty_like(p), np.zeros_like(q)
    dk, dv = np.empty((2, B, S, G, R, D), q.dtype).transpose(0, 1, 3, 4, 2, 5)  # splitting heads again needs no copy

    def softmax_backward(p: np.ndarray, dp: np.ndarray, *keep: np.ndarray) -> None:
        if keep:
            dp *= keep[0]
            dp *= 1 / (1 - rate)
        dp -= np.einsum("hts,hts->ht", dp, p)[..., None]
        dp *= p

    for rows, keys in _blocks(T, S, causal):
        np.matmul(dy[..., rows, :], v[..., keys, :].swapaxes(-1, -2), out=dp[..., rows, keys])
        heads = (array.reshape(B * G * R, T, S)[:, rows, keys] for array in (p, dp, keep) if array is not None)
        pieces.run(softmax_backward, *heads)
        np.matmul(dp[..., rows, keys], k[..., keys, :], out=dq[..., rows, :])  # dp is ds now
    first = 0
    for rows, keys in _blocks(T, S, causal):  # each block's own keys, those that no query before it sees
        rows, own, first = slice(rows.start, T), slice(first, keys.stop), keys.stop
        np.matmul(dp[..., rows, own].swapaxes(-1, -2), q[..., rows, :], out=dk[..., own, :])  # q holds the scale
        np.matmul(dropped[..., rows, own].swapaxes(-1, -2), dy[..., rows, :], out=dv[..., own, :])
    dq *= scale
    dk, dv = (dk.sum(axis=2), dv.sum(axis=2)) if R > 1 else (dk[:, :, 0], dv[:, :, 0])
    return dq.reshape(B, G * R, T, D), dk, dv


def _softmax(s: np.ndarray, future: np.ndarray | None) -> None:
    """Scores (n, T, S) become p; 0 where `future` (T, S)."""
    if future is not None:
        np.copyto(s, -np.inf, where=future)
    s -= np.maximum(s.max(axis=-1, keepdims=True), np.finfo(s.dtype).min)
    np.exp(s, out=s)
    s /= np.maximum(s.sum(axis=-1, keepdims=True), np.finfo(s.dtype).tiny)


def _blocks(T: int, S: int, causal: bool) -> Iterator[tuple[slice, slice]]:
    """Runs of queries, and the keys that the last of them sees: scores beyond need not be computed. Not where none."""
    for start in range(0, T, BLOCK if causal else T):
        stop = min(start + BLOCK, T) if causal else T
        seen = S - T + stop if causal else S
        if seen > 0:
            yield slice(start, stop), slice(0, seen)
