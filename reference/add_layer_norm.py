"""Residual addition and layer normalization in one (layer_norm.py has the formulas of the normalization).

forward    total = x + residual     y = layer_norm(total)
backward   dx = dresidual = dtotal + layer_norm's gradient of dy

A block adds a branch to its shortcut and normalizes what comes out for the next branch; both are handed on. On a GPU
the sum then need not be read again.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from reference import layer_norm


def forward(
    x: np.ndarray, residual: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, eps: float = 1e-5
) -> tuple[tuple[np.ndarray, np.ndarray], Any]:
    """x and residual (..., C), weight (C,), bias (C,) or None -> (y, total) like x, saved."""
    total = x + residual
    y, saved = layer_norm.forward(total, weight, bias, eps)
    return (y, total), saved


def backward(
    dresults: tuple[np.ndarray, np.ndarray], saved: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """(dy, dtotal) like x -> dx and dresidual, which are one array, dweight (C,), dbias (C,) or None."""
    dy, dtotal = dresults
    dx, dweight, dbias = layer_norm.backward(dy, saved)
    dx += dtotal
    return dx, dx, dweight, dbias
