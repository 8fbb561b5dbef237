"""Central finite differences, the definition of a derivative that needs no derivation: (f(x + h) - f(x - h)) / 2h."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np


def numeric_gradient(
    f: Callable[[np.ndarray], float],
    x: np.ndarray,
    step: float = 1e-5,
    indices: Iterable[tuple[int, ...]] | None = None,
) -> np.ndarray:
    """df/dx of a scalar function at x, float64, by central differences; its error falls with step^2 to a point.

    `indices`: only these elements, the others come back as NaN. x is not changed: f sees copies.
    """
    if x.dtype != np.float64:
        raise ValueError(f"x: expected float64, in which differences keep their digits; got {x.dtype}")
    gradient = np.full(x.shape, np.nan)
    for index in np.ndindex(x.shape) if indices is None else indices:
        plus, minus = x.copy(), x.copy()
        plus[index] += step
        minus[index] -= step
        gradient[index] = (f(plus) - f(minus)) / (plus[index] - minus[index])
    return gradient
