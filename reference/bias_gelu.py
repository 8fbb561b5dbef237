"""Bias and GELU in one (gelu.py has the formulas of the activation).

forward    y = gelu(x + b)
backward   dx = dy gelu'(x + b)     db = sum over rows of dx

On a GPU the linear layer before it leaves its bias to this one, so that the sum never goes to memory and back.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from reference import gelu, pieces


def forward(x: np.ndarray, bias: np.ndarray, approximate: str = "none") -> tuple[np.ndarray, Any]:
    """x (..., C), bias (C,), approximate "none" or "tanh" -> y like x, saved."""
    return gelu.forward(x + bias, approximate)


def backward(dy: np.ndarray, saved: Any) -> tuple[np.ndarray, np.ndarray]:
    """dy (..., C) -> dx like dy, dbias (C,)."""
    dx = gelu.backward(dy, saved)
    return dx, pieces.sum_rows(dx.reshape(-1, dx.shape[-1]))
