"""AdamW (Loshchilov and Hutter 2019, algorithm 2) and clipping by the global norm (Pascanu et al. 2013).

m = b1 m + (1 - b1) g      v = b2 v + (1 - b2) g^2
w = w (1 - lr decay) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from reference import pieces

Arrays = dict[str, np.ndarray]
SMALL = 1 << 13  # entries: of parameters with fewer, a call for each takes longer than their numbers do


class AdamW:
    """Updates the arrays of `params` in place, which are contiguous in C order: ValueError where one is not.

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
        for name, w in params.items():
            if not w.flags.c_contiguous:  # some entries at a time: the flat array would be a copy
                raise ValueError(f"params: {name} is not contiguous; expected what np.ascontiguousarray makes of it")
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

        keep = {name: 1 - lr * self.weight_decay if self._decays(w) else 1.0 for name, w in self.params.items()}
        large = [name for name, w in self.params.items() if w.size >= SMALL]
        pieces.share(update, self._pieces(large, grads, keep))
        for part in set(keep.values()):
            small = [name for name, w in self.params.items() if w.size < SMALL and keep[name] == part]
            if small:
                self._together(update, small, grads, part)

    def _decays(self, w: np.ndarray) -> bool:
        return self.decay == "all" or w.ndim >= 2

    def _pieces(self, names: list[str], grads: Arrays, keep: dict[str, float]) -> Iterator[tuple[Any, ...]]:
        """Of each of these parameters w, g, m, v, some entries at a time, and what is left of w where it decays."""
        for name in names:
            flat = [arrays[name].reshape(-1) for arrays in (self.params, grads, self.m, self.v)]
            for start in range(0, flat[0].size, pieces.PIECE):
                yield *(array[start : start + pieces.PIECE] for array in flat), keep[name]

    def _together(self, update: Callable[..., None], names: list[str], grads: Arrays, keep: float) -> None:
        """Update these parameters as one array, made of theirs."""
        own = self.params, self.m, self.v
        w, m, v, g = (np.concatenate([arrays[name].reshape(-1) for name in names]) for arrays in (*own, grads))
        update(w, g, m, v, keep)
        stop = 0
        for name in names:
            start, stop = stop, stop + self.params[name].size
            for arrays, joined in zip(own, (w, m, v), strict=True):
                arrays[name].reshape(-1)[:] = joined[start:stop]

    def rows(self, part: int, parts: int) -> AdamW:
        """One that updates such a part of each parameter's rows, in the memory of this one; see `rows` below."""
        own = AdamW(rows(self.params, part, parts), self.lr, self.betas, self.eps, self.weight_decay, self.decay)
        own.m, own.v = rows(self.m, part, parts), rows(self.v, part, parts)
        return own

    def state(self) -> dict[str, Any]:
        """The optimizer's memory: {"step": int, "m": name -> array, "v": name -> array}, not copied."""
        return {"step": self.steps, "m": self.m, "v": self.v}


def rows(arrays: Arrays, part: int, parts: int) -> Arrays:
    """Of each array a part of its rows, which together are all of them; not copied."""
    return {name: a[len(a) * part // parts : len(a) * (part + 1) // parts] for name, a in arrays.items()}


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
