"""Rotary position embedding (Su et al. 2021, equation 34): position as an angle, in queries and keys.

A head's D entries are D / 2 pairs, and pair i of the token at position p is turned by the angle p f[i]:

forward    y[a] = x[a] cos - x[b] sin      y[b] = x[a] sin + x[b] cos
backward   the same with -sin: a rotation's transpose is its inverse

with f[i] = theta^(-2i/D). The pairs are (2i, 2i + 1), interleaved, as in the paper and Meta's code, or (i, i + D/2),
the two halves, as in Hugging Face's. One order of a head's entries turns the one into the other, see `interleave`.

Llama 3.1 stretches the context it was first trained with: with wavelength w = 2 pi / f and the old context length L,
frequencies of w < L / high stay, those of w > L / low are divided by `factor`, and between the two is a mean of both,
with the share (L / w - low) / (high - low) for the one that stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Scaling:
    """Llama 3.1's frequency scaling."""

    factor: float
    low: float = 1.0
    high: float = 4.0
    context_length: int = 8192  # L

    def __post_init__(self) -> None:
        if not (self.factor >= 1 and 0 < self.low < self.high and self.context_length >= 1):
            raise ValueError(f"rope_scaling: expected factor >= 1 and 0 < low < high, got {self}")


def frequencies(D: int, theta: float = 10000.0, scaling: Scaling | None = None) -> np.ndarray:
    """Radians a position for each pair, (D / 2,) float64."""
    f = theta ** (-np.arange(0, D, 2, dtype=np.float64) / D)  # of integers torch.compile would make float32
    if scaling is None:
        return f
    periods = scaling.context_length * f / (2 * math.pi)  # L / w, in the old context
    stays = np.clip((periods - scaling.low) / (scaling.high - scaling.low), 0, 1)
    return f * (stays + (1 - stays) / scaling.factor)


def angles(
    positions: np.ndarray, D: int, theta: float = 10000.0, scaling: Scaling | None = None, dtype: Any = "float32"
) -> tuple[np.ndarray, np.ndarray]:
    """positions (..., T) -> cos and sin of the angles of each pair, both (..., T, D / 2). Computed in float64."""
    turns = positions[..., None] * frequencies(D, theta, scaling)
    return np.cos(turns).astype(dtype), np.sin(turns).astype(dtype)


def forward(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, interleaved: bool = False) -> tuple[np.ndarray, Any]:
    """x (B, H, T, D), cos and sin (T, D / 2), or (B, T, D / 2) for rows at different positions -> y like x, saved."""
    return _rotated(x, cos, sin, interleaved), (cos, sin, interleaved)


def backward(dy: np.ndarray, saved: Any) -> np.ndarray:
    """dy (B, H, T, D) -> dx like dy."""
    cos, sin, interleaved = saved
    return _rotated(dy, cos, -sin, interleaved)


def _rotated(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, interleaved: bool) -> np.ndarray:
    if x.shape[-1] % 2 or cos.shape[-1] != x.shape[-1] // 2:
        raise ValueError(f"cos, sin: expected half of x's {x.shape[-1]} entries, which are even, got {cos.shape[-1]}")
    if cos.ndim == 3:
        cos, sin = cos[:, None], sin[:, None]  # (B, 1, T, D / 2)
    half = x.shape[-1] // 2
    first, second = (np.s_[..., 0::2], np.s_[..., 1::2]) if interleaved else (np.s_[..., :half], np.s_[..., half:])
    y = np.empty(x.shape, x.dtype)
    a, b = x[first], x[second]
    y[first] = a * cos
    y[first] -= b * sin
    y[second] = a * sin
    y[second] += b * cos
    return y


def interleave(D: int) -> np.ndarray:
    """Order (D,): x[..., interleave(D)] has as interleaved pairs what x has as halves."""
    return np.arange(D).reshape(2, D // 2).T.reshape(-1)
