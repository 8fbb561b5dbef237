"""Inverted dropout (Srivastava et al. 2014): zero each element with probability p, scale the others by 1 / (1 - p).

forward    y = x m / (1 - p)
backward   dx = dy m / (1 - p)

The mask m is a function of (seed, step, layer, site, element), see philox.py. This module keeps it, at a byte an
element; a recomputation, the other engine or a GPU kernel computes the same one again.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from reference import philox


def forward(x: np.ndarray, rate: float, noise: philox.Noise | None) -> tuple[np.ndarray, Any]:
    """x (..., R, C), 0 <= rate < 1, noise (key, first), a keep mask shaped like x, or None: no dropout -> y, saved."""
    if not rate or noise is None:
        return x, (None, 0.0)
    saved = philox.keep_mask(noise, x.shape, rate), rate
    return backward(x, saved), saved


def backward(dy: np.ndarray, saved: Any) -> np.ndarray:
    """dy (..., R, C) -> dx like dy."""
    keep, rate = saved
    if keep is None:
        return dy
    dx = dy * keep
    dx *= 1 / (1 - rate)
    return dx
