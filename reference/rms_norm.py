"""Root-mean-square normalization over the last axis (Zhang and Sennrich 2019, equation 4).

forward    rstd = 1 / sqrt(E[x^2] + eps)      h = x rstd      y = h w
backward   g = dy w                           dx = rstd (g - h E[g h])      dw = sum of dy h

E is the mean over the C entries of a row, the sum runs over rows. As layer normalization without the mean: h has the
mean square 1 whatever x is, so the part of g along h cannot reach x, and is taken away.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from reference import pieces


def forward(x: np.ndarray, weight: np.ndarray, eps: float = 1e-6) -> tuple[np.ndarray, Any]:
    """x (..., C), weight (C,) -> y (..., C), saved."""
    mean_square = np.einsum("...c,...c->...", x, x)[..., None] / x.shape[-1]  # (..., 1)
    rstd = 1 / np.sqrt(mean_square + eps)
    h = x * rstd
    return h * weight, (h, rstd, weight)


def backward(dy: np.ndarray, saved: Any) -> tuple[np.ndarray, np.ndarray]:
    """dy (..., C) -> dx (..., C), dweight (C,)."""
    h, rstd, weight = saved
    C = h.shape[-1]
    dy_h = dy * h
    dweight = pieces.sum_rows(dy_h.reshape(-1, C))
    dx = dy * weight  # g
    h_part = np.multiply(h, pieces.dot_rows(dy_h, weight) / C, out=dy_h)  # h E[g h]
    dx -= h_part
    dx *= rstd
    return dx, dweight
