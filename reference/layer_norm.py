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
    C = x.shape[-1]
    h = x - pieces.dot_rows(x) / C  # (..., C)
    variance = np.einsum("...c,...c->...", h, h)[..., None] / C  # (..., 1)
    rstd = 1 / np.sqrt(variance + eps)
    h *= rstd
    y = h * weight
    if bias is not None:
        y += bias
    return y, (h, rstd, weight, bias is not None)


def backward(dy: np.ndarray, saved: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """dy (..., C) -> dx (..., C), dweight (C,), dbias (C,) or None."""
    h, rstd, weight, has_bias = saved
    C = h.shape[-1]
    dy_h = dy * h
    dweight = pieces.sum_rows(dy_h.reshape(-1, C))
    dbias = pieces.sum_rows(dy.reshape(-1, C)) if has_bias else None
    dx = dy * weight  # g
    dx -= pieces.dot_rows(dy, weight) / C  # E[g]
    h_part = np.multiply(h, pieces.dot_rows(dy_h, weight) / C, out=dy_h)  # h E[g h]
    dx -= h_part
    dx *= rstd
    return dx, dweight, dbias
