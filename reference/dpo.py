"""Direct preference optimization (Rafailov et al. 2023, equation 7): prefer the chosen to the rejected answer.

forward    z = beta ((c - c0) - (r - r0))      loss = mean over pairs of softplus(-z)
backward   g = -beta sigmoid(-z) / P      dc = g      dr = -g

c and r are the log-probabilities of the chosen and the rejected answer, summed over their tokens, c0 and r0 those of
the model that training began with, which is the reference. At the beginning z is 0 and the loss log 2. softplus(-z) =
log(1 + exp(-z)) is computed without an exponential that overflows.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def forward(
    chosen: np.ndarray, rejected: np.ndarray, chosen0: np.ndarray, rejected0: np.ndarray, beta: float = 0.1
) -> tuple[np.floating, Any]:
    """Log-probabilities of P answers each, (P,) -> loss, a scalar, saved."""
    z = beta * ((chosen - chosen0) - (rejected - rejected0))
    return np.mean(np.logaddexp(0, -z), dtype=z.dtype), (z, beta)


def backward(dloss: float, saved: Any) -> tuple[np.ndarray, np.ndarray]:
    """dloss, a scalar -> dchosen (P,), drejected (P,)."""
    z, beta = saved
    dchosen = np.exp(-np.logaddexp(0, z)) * (-beta * dloss / len(z))  # exp(-softplus(z)) is sigmoid(-z)
    return dchosen, -dchosen
