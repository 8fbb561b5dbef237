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
from typing import Any

import numpy as np

from reference import philox, pieces


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
    q = q.reshape(B, G, H // G, T, D)
    k, v = k[:, :, None], v[:, :, None]  # (B, G, 1, S, D)
    p = np.empty((B, G, H // G, T, S), q.dtype)  # in rows whatever the order of q and k, for work in place
    np.matmul(q, k.swapaxes(-1, -2), out=p)
    future = np.arange(S) > np.arange(S - T, S)[:, None] if causal else None  # (T, S)

    def softmax(s: np.ndarray) -> None:
        s *= scale
        if future is not None:
            np.copyto(s, -np.inf, where=future)
        s -= np.maximum(s.max(axis=-1, keepdims=True), np.finfo(s.dtype).min)
        np.exp(s, out=s)
        s /= np.maximum(s.sum(axis=-1, keepdims=True), np.finfo(s.dtype).tiny)

    pieces.run(softmax, p.reshape(B * H, T, S))
    dropped, keep = p, None
    if rate and noise is not None:
        keep = philox.keep_mask(noise, (B, H, T, S), rate).reshape(p.shape)
        dropped = p * keep
        dropped *= 1 / (1 - rate)
    y = np.empty((B, T, G, H // G, D), q.dtype).transpose(0, 2, 3, 1, 4)  # in this order, joining heads needs no copy
    np.matmul(dropped, v, out=y)
    return y.reshape(B, H, T, D), (q, k, v, p, dropped, keep, scale, rate)


def backward(dy: np.ndarray, saved: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dy (B, H, T, D) -> dq (B, H, T, D), dk (B, G, S, D), dv (B, G, S, D)."""
    q, k, v, p, dropped, keep, scale, rate = saved
    B, G, R, T, D = q.shape
    S = k.shape[3]
    dy = dy.reshape(q.shape)
    dv = dropped.swapaxes(-1, -2) @ dy  # (B, G, R, S, D)
    dp = np.matmul(dy, v.swapaxes(-1, -2), out=np.empty_like(p))  # (B, G, R, T, S)

    def softmax_backward(p: np.ndarray, dp: np.ndarray, *keep: np.ndarray) -> None:
        if keep:
            dp *= keep[0]
            dp *= 1 / (1 - rate)
        dp -= np.einsum("hts,hts->ht", dp, p)[..., None]
        dp *= p
        dp *= scale

    heads = (B * G * R, T, S)
    pieces.run(softmax_backward, p.reshape(heads), dp.reshape(heads), *([] if keep is None else [keep.reshape(heads)]))
    dq = dp @ k  # dp holds ds * scale now
    dk = dp.swapaxes(-1, -2) @ q
    return dq.reshape(B, G * R, T, D), dk.sum(axis=2), dv.sum(axis=2)
