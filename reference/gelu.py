"""Gaussian error linear unit (Hendrycks and Gimpel 2016), exact or with GPT-2's tanh in place of the error function.

exact      y = x P(x)                 P(x) = (1 + erf(x / sqrt 2)) / 2, the normal distribution's cumulative function
           dx = dy (P + x exp(-x^2 / 2) / sqrt(2 pi))
tanh       y = x (1 + t) / 2          t = tanh(u),  u = c (x + a x^3),  c = sqrt(2 / pi),  a = 0.044715
           dx = dy ((1 + t) / 2 + x (1 - t^2) c (1 + 3 a x^2) / 2)

With e = exp(-2 u), (1 + t) / 2 = 1 / (1 + e) and (1 - t) / 2 = e / (1 + e), which keep their digits near t = -1 and 1.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.polynomial.chebyshev import cheb2poly

from reference import pieces

C = math.sqrt(2 / math.pi)
A = 0.044715
_MOST = 80.0  # of -2 u, either way: with 1 / (1 + exp(80)) no digit of y is left, and no float32 has overflowed


def forward(x: np.ndarray, approximate: str = "none") -> tuple[np.ndarray, Any]:
    """x (..., R, C), approximate "none" or "tanh" -> y like x, saved."""
    if approximate not in _FORWARD:
        raise ValueError(f"approximate: {approximate!r} is not one of none, tanh")
    x = np.ascontiguousarray(x)
    y, kept = np.empty_like(x), np.empty_like(x)  # P or e
    pieces.run(_FORWARD[approximate], *map(pieces.rows, (x, kept, y)))
    return y, (x, kept, approximate)


def backward(dy: np.ndarray, saved: Any) -> np.ndarray:
    """dy (..., R, C) -> dx like dy."""
    x, kept, approximate = saved
    dy = np.ascontiguousarray(dy)
    dx = np.empty_like(dy)
    pieces.run(_BACKWARD[approximate], *map(pieces.rows, (dy, x, kept, dx)))
    return dx


def _tanh_forward(x: np.ndarray, e: np.ndarray, y: np.ndarray) -> None:
    np.multiply(x, x, out=e)
    e *= -2 * C * A
    e += -2 * C
    e *= x  # -2 u
    np.clip(e, -_MOST, _MOST, out=e)
    np.exp(e, out=e)
    np.add(e, 1, out=y)
    np.divide(x, y, out=y)


def _tanh_backward(dy: np.ndarray, x: np.ndarray, e: np.ndarray, dx: np.ndarray) -> None:
    gate = e + 1
    np.reciprocal(gate, out=gate)
    np.multiply(x, x, out=dx)
    dx *= 6 * A * C
    dx += 2 * C
    dx *= x
    dx *= gate
    dx *= e
    dx += 1  # 1 + x 2 u' (1 - t) / 2
    dx *= gate
    dx *= dy


def _exact_forward(x: np.ndarray, p: np.ndarray, y: np.ndarray) -> None:
    p[:] = normal_cdf(x)
    np.multiply(x, p, out=y)


def _exact_backward(dy: np.ndarray, x: np.ndarray, p: np.ndarray, dx: np.ndarray) -> None:
    np.multiply(x, x, out=dx)
    dx *= -0.5
    np.exp(dx, out=dx)
    dx *= 1 / math.sqrt(2 * math.pi)
    dx *= x
    dx += p
    dx *= dy


_FORWARD = {"none": _exact_forward, "tanh": _tanh_forward}
_BACKWARD = {"none": _exact_backward, "tanh": _tanh_backward}


def normal_cdf(x: np.ndarray) -> np.ndarray:
    """P(x) = erfc(-x / sqrt 2) / 2 to the last few digits of x's dtype, as NumPy has no error function.

    erfc(z) = exp(-z^2) f(t) with t = 2 / (2 + z), z >= 0, and f is smooth: a Chebyshev series in t gives it. Its
    coefficients are computed below from the standard library's scalar erfc, so that there is no table to mistype. They
    fall so fast that the same polynomial in powers, which takes fewer operations, loses no digit: the powers'
    coefficients add up to 1.01.
    """
    z = np.abs(x) * (1 / math.sqrt(2))
    u = 2 / (2 + np.clip(z, 0, _Z_MAX))  # t, in [_T_MIN, 1]
    u -= (1 + _T_MIN) / 2
    u *= 2 / (1 - _T_MIN)  # in [-1, 1]
    highest, *lower = _POWERS[x.dtype == np.float32]
    tail = u * highest
    for coefficient in lower[:-1]:  # Horner's rule
        tail += coefficient
        tail *= u
    tail += lower[-1]
    z *= z
    tail *= np.exp(-z)  # P(-|x|)
    return np.abs((x > 0) - tail)  # P(x) = 1 - P(-x)


_Z_MAX = 10.0  # beyond it exp(-z^2) < 1e-43 leaves nothing to be right about
_T_MIN = 2 / (2 + _Z_MAX)


def _chebyshev_series(n: int) -> list[float]:
    angles = [math.pi * (k + 0.5) / n for k in range(n)]
    zs = [2 / ((1 + _T_MIN + (1 - _T_MIN) * math.cos(angle)) / 2) - 2 for angle in angles]
    values = [math.erfc(z) * math.exp(z * z) / 2 for z in zs]
    sums = [2 / n * sum(f * math.cos(j * a) for f, a in zip(values, angles, strict=True)) for j in range(n)]
    return [sums[0] / 2, *sums[1:]]


_SERIES = _chebyshev_series(21)
# The highest power first; in float32 fewer will do.
_POWERS = {short: cheb2poly(_SERIES[:11] if short else _SERIES)[::-1].tolist() for short in (True, False)}
