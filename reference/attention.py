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

BLOCK = 64  # queries at a time, at least: nearly half of the scores of a long causal sequence are never computed


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
    keep = None
    if rate and noise is not None:
        keep = philox.keep_mask(noise, (B, H, T, S), rate).reshape(B, G, H // G, T, S)
    y = np.zeros((B, T, G, H // G, D), q.dtype).transpose(0, 2, 3, 1, 4)  # in this order, joining heads needs no copy
    saved = []
    for texts, heads, rows, keys in blocks((B, G, H // G, T, S), causal):
        s = np.matmul(q[texts, heads, :, rows], k[texts, heads, :, keys].swapaxes(-1, -2))
        if causal:
            last = slice(max(0, S - T + rows.start), keys.stop)  # keys that not all of these queries see
            future = np.arange(last.start, last.stop) > np.arange(rows.start, rows.stop)[:, None] + S - T
            np.copyto(s[..., last], -np.inf, where=future)
        s -= np.maximum(s.max(axis=-1, keepdims=True), np.finfo(s.dtype).min)
        p = np.exp(s, out=s)
        p /= np.maximum(pieces.dot_rows(p), np.finfo(p.dtype).tiny)
        dropped, kept = p, None
        if keep is not None:
            kept = keep[texts, heads, :, rows, keys]
            dropped = p * kept
            dropped *= 1 / (1 - rate)
        np.matmul(dropped, v[texts, heads, :, keys], out=y[texts, heads, :, rows])
        saved.append(((texts, heads, rows, keys), p, dropped, kept))
    return y.reshape(B, H, T, D), (q, k, v, saved, scale, rate)


def backward(dy: np.ndarray, saved: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dy (B, H, T, D) -> dq (B, H, T, D), dk (B, G, S, D), dv (B, G, S, D)."""
    q, k, v, saved, scale, rate = saved
    B, G, R, T, D = q.shape
    S = k.shape[3]
    dy = dy.reshape(q.shape)
    dq = np.zeros((B, T, G, R, D), q.dtype).transpose(0, 2, 3, 1, 4)
    dk, dv = np.zeros((2, B, S, G, R, D), q.dtype).transpose(0, 1, 3, 4, 2, 5)  # splitting heads again needs no copy
    for (texts, heads, rows, keys), p, dropped, kept in saved:
        dv[texts, heads, :, keys] += np.matmul(dropped.swapaxes(-1, -2), dy[texts, heads, :, rows])
        dp = np.matmul(dy[texts, heads, :, rows], v[texts, heads, :, keys].swapaxes(-1, -2))
        if kept is not None:
            dp *= kept
            dp *= 1 / (1 - rate)
        dp -= np.einsum("bgrts,bgrts->bgrt", dp, p)[..., None]
        ds = np.multiply(dp, p, out=dp)
        np.matmul(ds, k[texts, heads, :, keys], out=dq[texts, heads, :, rows])
        dk[texts, heads, :, keys] += np.matmul(ds.swapaxes(-1, -2), q[texts, heads, :, rows])  # q holds the scale
    dq *= scale
    dk, dv = (dk.sum(axis=2), dv.sum(axis=2)) if R > 1 else (dk[:, :, 0], dv[:, :, 0])
    return dq.reshape(B, G * R, T, D), dk, dv


def weights(saved: Any, dropped: bool = False) -> np.ndarray:
    """Of what `forward` saved p, or drop(p), (B, H, T, S)."""
    q, k, _, parts, *_ = saved
    whole = np.zeros((*q.shape[:4], k.shape[3]), q.dtype)
    for (texts, heads, rows, keys), p, dropped_p, _ in parts:
        whole[texts, heads, :, rows, keys] = dropped_p if dropped else p
    return whole.reshape(len(q), -1, *whole.shape[3:])


def rows_at_once(S: int) -> int:
    """How many queries a block has: of a long sequence more, for dk and dv are added to once a block."""
    return max(BLOCK, min(S // 16, 2 * BLOCK))


def blocks(shape: tuple[int, ...], causal: bool) -> Iterator[tuple[slice, slice, slice, slice]]:
    """Of scores (B, G, R, T, S) blocks for a core's cache: texts, key heads, queries, and the keys that the last of
    these queries sees; scores beyond need not be computed. None where there are none."""
    B, G, R, T, S = shape
    block = rows_at_once(S)
    many = max(1, pieces.PIECE // max(1, R * min(T, block) * S))
    texts, heads = max(1, many // G), min(many, G)
    for b in range(0, B, texts):
        for g in range(0, G, heads):
            for start in range(0, T, block):
                stop = min(start + block, T)
                seen = S - T + stop if causal else S
                if seen > 0:
                    yield slice(b, b + texts), slice(g, g + heads), slice(start, stop), slice(0, seen)
