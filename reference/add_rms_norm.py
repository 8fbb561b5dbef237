"""Residual addition and root-mean-square normalization in one (rms_norm.py has the formulas of the normalization).

forward    total = x + residual     y = rms_norm(total)
backward   dx = dresidual = dtotal + rms_norm's gradient of dy

The twin of add_layer_norm.py: a block adds a branch to its shortcut and normalizes what comes out for the next branch.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from reference import rms_norm


def forward(
    x: np.ndarray, residual: np.ndarray, weight: np.ndarray, eps: float = 1e-6
) -> tuple[tuple[np.ndarray, np.ndarray], Any]:
    """x and residual (..., C), weight (C,) -> (y, total) like x, saved."""
    total = x + residual
    y, saved = rms_norm.forward(total, weight, eps)
    return (y, total), saved


def backward(dresults: tuple[np.ndarray, np.ndarray], saved: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(dy, dtotal) like x -> dx and dresidual, which are one array, dweight (C,)."""
    dy, dtotal = dresults
    dx, dweight = rms_norm.backward(dy, saved)
    dx += dtotal
    return dx, dx, dweight
