"""Layer normalization over the last axis (Ba, Kiros and Hinton 2016, equations 3 and 4).

forward    mean = E[x]    rstd = 1 / sqrt(E[(x - mean)^2] + eps)    h = (x - mean) rstd    y = h w + b
backward   g = dy w       dx = rstd (g - E[g] - h E[g h])           dw = sum of dy h       db = sum of dy

E is the mean over the C entries of a row, sums run over rows. dx follows from h having mean 0 and variance 1 whatever x
is: of g, the part along the constant vector and the part along h cannot reach x, and are taken away.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from reference import pieces


def forward(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, eps: float = 1e-5) -> tuple[np.ndarray, Any]:
    """x (..., C), weight (C,), bias (C,) or None -> y (..., C), saved."""
    h = x - x.mean(axis=-1, keepdims=True)  # (..., C)
    variance = np.einsum("...c,...c->...", h, h)[..., None] / x.shape[-1]  # (..., 1)
    rstd = 1 / np.sqrt(variance + eps)
    h *= rstd
    y = h * weight
    if bias is not None:
        y += bias
    return y, (h, rstd, weight, bias is not None)


def backward(dy: np.ndarray, saved: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """dy (..., C) -> dx (..., C), dweight (C,), dbias (C,) or None."""
    h, rstd, weight, has_bias = saved
    dx = dy * weight  # g
    g_along_h = np.einsum("...c,...c->...", dx, h)[..., None] / h.shape[-1]  # E[g h], (..., 1)
    dx -= dx.mean(axis=-1, keepdims=True)
    dx -= h * g_along_h
    dx *= rstd
    dy_rows = dy.reshape(-1, dy.shape[-1])
    dweight = np.einsum("nc,nc->c", dy_rows, h.reshape(dy_rows.shape))
    return dx, dweight, pieces.sum_rows(dy_rows) if has_bias else None
