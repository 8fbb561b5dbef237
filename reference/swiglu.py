"""SwiGLU without its projections (Shazeer 2020, equation 6): one half of a gated MLP's hidden entries opens the other.

forward    y = silu(gate) up        silu(g) = g s,   s = 1 / (1 + exp(-g))
backward   dgate = dy up s (1 + g (1 - s))      dup = dy silu(gate)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from reference import pieces

_MOST = 80.0  # of -g: with 1 / (1 + exp(80)) no digit of y is left, and no float32 has overflowed


def forward(gate: np.ndarray, up: np.ndarray) -> tuple[np.ndarray, Any]:
    """gate and up (..., R, C) -> y like gate, saved."""
    gate, up = np.ascontiguousarray(gate), np.ascontiguousarray(up)
    y, s = np.empty_like(gate), np.empty_like(gate)

    def swiglu(gate: np.ndarray, up: np.ndarray, s: np.ndarray, y: np.ndarray) -> None:
        np.negative(gate, out=s)
        np.minimum(s, _MOST, out=s)
        np.exp(s, out=s)
        s += 1
        np.divide(1, s, out=s)
        np.multiply(gate, s, out=y)
        y *= up

    pieces.run(swiglu, *map(pieces.rows, (gate, up, s, y)))
    return y, (gate, up, s)


def backward(dy: np.ndarray, saved: Any) -> tuple[np.ndarray, np.ndarray]:
    """dy (..., R, C) -> dgate and dup like dy."""
    gate, up, s = saved
    dy = np.ascontiguousarray(dy)
    dgate, dup = np.empty_like(dy), np.empty_like(dy)

    def swiglu_backward(
        dy: np.ndarray, gate: np.ndarray, up: np.ndarray, s: np.ndarray, dgate: np.ndarray, dup: np.ndarray
    ) -> None:
        np.multiply(gate, s, out=dup)  # silu
        np.subtract(gate, dup, out=dgate)  # g (1 - s)
        dgate += 1
        dgate *= s
        dgate *= up
        dgate *= dy
        dup *= dy

    pieces.run(swiglu_backward, *map(pieces.rows, (dy, gate, up, s, dgate, dup)))
    return dgate, dup
