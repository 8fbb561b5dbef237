"""Odds-ratio preference optimization (Hong et al. 2024, equations 6 to 8): finetuning and preference in one loss.

forward    z = (a - b) - (log(1 - e^a) - log(1 - e^b))      loss = mean over pairs of -a + beta softplus(-z)
backward   qa = 1 - e^a    qb = 1 - e^b    r = e^(a - b)
           da = (-1 - beta / (qa + r qb)) / P      db = beta qa / (qb (qa + r qb)) / P

a and b are the mean log-probabilities of a token of the chosen and the rejected answer, so that e^a / (1 - e^a) are the
odds of the chosen answer and e^z is the odds ratio. -a is the chosen answer's cross entropy.

The gradient is what the chain rule gives, with its factors joined: sigmoid(-z), which vanishes where the answer is
nearly sure, and the derivative of log(1 - e^a), which grows without bound there, are each useless alone. 1 - e^a is
computed as -expm1(a), and is never less than the smallest normal number, which changes nothing but an answer with a
probability of exactly 1. What is large is divided in an order in which nothing overflows before it is small.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def forward(chosen: np.ndarray, rejected: np.ndarray, beta: float = 0.1) -> tuple[np.floating, Any]:
    """Mean log-probabilities of P answers each, (P,), at most 0 -> loss, a scalar, saved."""
    qa, qb = (not_probability(x) for x in (chosen, rejected))
    z = (chosen - rejected) - (np.log(qa) - np.log(qb))
    return np.mean(beta * np.logaddexp(0, -z) - chosen, dtype=z.dtype), (chosen, rejected, qa, qb, beta)


def backward(dloss: float, saved: Any) -> tuple[np.ndarray, np.ndarray]:
    """dloss, a scalar -> dchosen (P,), drejected (P,)."""
    a, b, qa, qb, beta = saved
    scale = dloss / len(a)
    with np.errstate(over="ignore", under="ignore"):  # r may be infinite or 0, and then so is what it should be
        r = np.exp(a - b)
        share = 1 / (1 + r * (qb / qa))  # qa / (qa + r qb), which is sigmoid(-z)
        dchosen = -scale - beta * scale / (qa + r * qb)
        return dchosen, beta * scale * (share / qb)


def not_probability(logp: np.ndarray) -> np.ndarray:
    """1 - e^logp."""
    return np.maximum(-np.expm1(logp), np.finfo(logp.dtype).tiny)
