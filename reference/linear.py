"""Linear layer, y = x W^T + b, with W stored (out, in) as in PyTorch.

forward    y = x W^T + b
backward   dx = dy W      dW = dy^T x      db = sum over rows of dy
"""

from __future__ import annotations

from typing import Any

import numpy as np

from reference import pieces


def forward(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> tuple[np.ndarray, Any]:
    """x (..., I), weight (O, I), bias (O,) or None -> y (..., O), saved."""
    rows = x.reshape(-1, x.shape[-1])  # one large matrix product is faster than one for each leading index
    y = rows @ weight.T
    if bias is not None:
        y += bias
    return y.reshape(*x.shape[:-1], weight.shape[0]), (x, weight, bias is not None)


def backward(
    dy: np.ndarray, saved: Any, out: np.ndarray | None = None, frozen: bool = False
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """dy (..., O) -> dx (..., I), dweight (O, I), dbias (O,) or None. `out`: an array that dweight is written to.

    Of a `frozen` layer dx alone.
    """
    x, weight, has_bias = saved
    dy_rows = dy.reshape(-1, dy.shape[-1])
    x_rows = x.reshape(-1, x.shape[-1])
    dx = (dy_rows @ weight).reshape(x.shape)
    if frozen:
        return dx, None, None
    dweight = np.matmul(dy_rows.T, x_rows, out=out)
    return dx, dweight, pieces.sum_rows(dy_rows) if has_bias else None
