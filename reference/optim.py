"""AdamW (Loshchilov and Hutter 2019, algorithm 2) and clipping by the global norm (Pascanu et al. 2013).

m = b1 m + (1 - b1) g      v = b2 v + (1 - b2) g^2
w = w (1 - lr decay) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from reference import pieces

Arrays = dict[str, np.ndarray]


class AdamW:
    """Updates the arrays of `params` in place.

    `decay` says which parameters decay: "all" (the book), or "matrices", those with two or more axes (the course).
    """

    def __init__(
        self,
        params: Arrays,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        decay: str = "all",
    ) -> None:
        if decay not in ("all", "matrices"):
            raise ValueError(f"decay: {decay!r} is not one of all, matrices")
        self.params, self.lr, self.betas, self.eps = params, lr, betas, eps
        self.weight_decay, self.decay = weight_decay, decay
        self.steps = 0
        # np.zeros asks for memory that is not there until it is written to: a model that never trains needs none of it.
        self.m = {name: np.zeros(w.shape, w.dtype) for name, w in params.items()}
        self.v = {name: np.zeros(w.shape, w.dtype) for name, w in params.items()}

    def step(self, grads: Arrays, lr: float | None = None, scale: float = 1.0) -> None:
        """One step along `grads`, each times `scale` (what clipping leaves), at `lr` if given, else at the own one."""
        lr = self.lr if lr is None else lr
        self.steps += 1
        b1, b2 = self.betas
        v_scale = 1 / math.sqrt(1 - b2**self.steps)
        step_size, eps = lr / (1 - b1**self.steps) / v_scale, self.eps / v_scale  # so that sqrt(v) needs no factor

        def update(w: np.ndarray, g: np.ndarray, m: np.ndarray, v: np.ndarray, keep: float) -> None:
            part = g * ((1 - b1) * scale)
            m *= b1
            m += part
            np.multiply(g, scale * math.sqrt(1 - b2), out=part)
            part *= part
            v *= b2
            v += part
            np.sqrt(v, out=part)
            part += eps
            np.divide(m, part, out=part)
            part *= step_size
            if keep != 1:
                w *= keep
            w -= part

        pieces.share(update, self._pieces(grads, 1 - lr * self.weight_decay))

    def _pieces(self, grads: Arrays, keep: float) -> Iterator[tuple[Any, ...]]:
        """Of each parameter w, g, m, v, some entries at a time, and what is left of w where it decays."""
        for name, w in self.params.items():
            decays = self.decay == "all" or w.ndim >= 2
            flat = [array.reshape(-1) for array in (w, grads[name], self.m[name], self.v[name])]
            for start in range(0, w.size, pieces.PIECE):
                yield *(array[start : start + pieces.PIECE] for array in flat), keep if decays else 1.0

    def state(self) -> dict[str, Any]:
        """The optimizer's memory: {"step": int, "m": name -> array, "v": name -> array}, not copied."""
        return {"step": self.steps, "m": self.m, "v": self.v}


def global_norm(grads: Arrays) -> float:
    """sqrt of the sum of squares of all entries of all gradients, summed in float64 from piece to piece."""
    total = 0.0
    for g in grads.values():
        flat = g.reshape(-1)
        for start in range(0, flat.size, pieces.PIECE):
            piece = flat[start : start + pieces.PIECE]
            total += float(np.dot(piece, piece))
    return math.sqrt(total)


def clip_scale(norm: float, max_norm: float) -> float:
    """What to multiply gradients of this norm by, so that it is at most max_norm (PyTorch's formula)."""
    return min(1.0, max_norm / (norm + 1e-6))
