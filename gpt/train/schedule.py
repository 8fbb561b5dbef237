"""Learning rate of each step, as a pure function of the step (Loshchilov and Hutter 2017; the book's appendix D).

    warmup    lr(s) = initial + s (peak - initial) / warmup                              0 <= s < warmup
    cosine    lr(s) = minimum + (peak - minimum) (1 + cos(pi p)) / 2                     warmup <= s
              p     = min(1, (s - warmup) / (total - warmup))

Steps count from 0, so a run of `total` steps ends just above `minimum`. Without warmup, with minimum = peak / 10, it is
PyTorch's CosineAnnealingLR; with peak 1 and minimum 0 it is the factor that LambdaLR multiplies a learning rate with.
"""

from __future__ import annotations

import math

__all__ = ["warmup_constant", "warmup_cosine"]


def warmup_cosine(
    step: int, total: int, peak: float, warmup: int = 0, initial: float = 0.0, minimum: float = 0.0
) -> float:
    """Learning rate of step 0, 1, ... of `total`. `warmup` may be 0, or `total` and more: then no cosine follows."""
    if step < warmup:
        return initial + step * (peak - initial) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_constant(step: int, peak: float, warmup: int = 0, initial: float = 0.0) -> float:
    """Learning rate of step 0, 1, ...: the same warmup, then `peak`."""
    return initial + step * (peak - initial) / warmup if step < warmup else peak
