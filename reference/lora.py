"""Low-rank adaptation, LoRA (Hu et al. 2022, section 4.1): what a linear layer learns while its weight is frozen.

forward    u = drop(x) A^T      y = s u B^T
backward   du = s dy B      dB = s dy^T u      dA = du^T drop(x)      dx = drop'(du A)

y is added to the layer's own x W^T + b. A (r, I) is drawn as PyTorch draws a linear weight, B (O, r) is 0, so that
training begins with the model as it was. s is alpha / r as in the paper, or alpha alone. After training, W + s B A is
one weight that does the same without a further product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from reference import dropout, philox

TARGETS = ("query", "key", "value", "out", "gate", "up", "down", "head")
SCALINGS = ("alpha/rank", "alpha")
SITES = {target: 4 + i for i, target in enumerate(TARGETS)}  # of dropout; philox.py has the model's own


@dataclass(frozen=True)
class LoRA:
    """Which linear layers are adapted, and how. A wrong setting raises ValueError with its name."""

    rank: int
    alpha: float
    scaling: str = "alpha/rank"  # s: alpha / rank as in the paper, or alpha
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS  # "mlp" stands for gate, up and down; one alone may be given as its name

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ValueError(f"lora rank: {self.rank!r} is not a whole number of at least 1")
        if not isinstance(self.alpha, (int, float)) or not 0 < self.alpha < float("inf"):
            raise ValueError(f"lora alpha: {self.alpha!r} is not a positive number")
        if self.scaling not in SCALINGS:
            raise ValueError(f"lora scaling: {self.scaling!r} is not one of {', '.join(SCALINGS)}")
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(f"lora dropout: {self.dropout!r} is not a rate, 0 <= rate < 1")
        targets = (self.targets,) if isinstance(self.targets, str) else self.targets
        given = {name for target in targets for name in (TARGETS[4:7] if target == "mlp" else (target,))}
        if not given or given - set(TARGETS):
            wrong = ", ".join(map(str, sorted(given - set(TARGETS), key=str))) or "none"
            raise ValueError(f"lora targets: {wrong}, expected some of {', '.join(TARGETS)}, mlp")
        object.__setattr__(self, "targets", tuple(name for name in TARGETS if name in given))

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / self.rank if self.scaling == "alpha/rank" else float(self.alpha)


def forward(
    x: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float, rate: float = 0.0, noise: philox.Noise | None = None
) -> tuple[np.ndarray, Any]:
    """x (..., I), a (r, I), b (O, r), dropout as in dropout.py -> y (..., O), saved."""
    dropped, saved_dropout = dropout.forward(x, rate, noise)
    rows = dropped.reshape(-1, x.shape[-1])
    u = rows @ a.T  # (N, r)
    y = (u * scale) @ b.T
    return y.reshape(*x.shape[:-1], b.shape[0]), (dropped, saved_dropout, u, a, b, scale)


def backward(dy: np.ndarray, saved: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dy (..., O) -> dx (..., I), da (r, I), db (O, r)."""
    dropped, saved_dropout, u, a, b, scale = saved
    dy_rows = dy.reshape(-1, dy.shape[-1])
    du = (dy_rows @ b) * scale  # (N, r)
    db = dy_rows.T @ (u * scale)
    da = du.T @ dropped.reshape(-1, a.shape[1])
    return dropout.backward((du @ a).reshape(dropped.shape), saved_dropout), da, db
