"""Gradients of a recorded pass against finite differences of its whole loss, element by element.

A central difference (f(x + h) - f(x - h)) / 2h is off by a h^2 + b h^4 + ..., and by the rounding of f, some eps f / h:
a gradient that is small beside the loss has no step at which both are small. So the differences of a few steps are
extrapolated to a step of 0 (Ridders 1982): of two with steps h and h / c, d(h / c) + (d(h / c) - d(h)) / (c^2 - 1) is
off by h^4, of three by h^6, and so on. Of all that is found so, that is taken which agrees best with those that it was
made from. The gradient by hand plays no part in the choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from gpt.parity.laws import DIFFERENCES, relative
from gpt.parity.model import KEY_BIAS
from gpt.study.record import Recording

__all__ = ["derivative", "proofs_of"]

FIRST_STEP, SHRINK, STEPS = 0.02, 3.0, 9  # down to 3e-6, of the tensor's largest entry
BUDGET = 4e10  # multiplications: seconds
FEWEST = 2  # elements, of a model however large


def proofs_of(
    recording: Recording, per_tensor: int = 2, seed: int = 0, budget: float = BUDGET
) -> dict[str, list[dict[str, Any]]]:
    """Of each operation by name, for every argument that is differentiated: some elements of its total gradient.

    Of each tensor the element with the largest gradient, and others drawn at random; of a model that is too large for
    `budget` those of some tensors, drawn at random. `error` is relative to the tensor's largest gradient; of the key's
    bias, whose true gradient is 0, to its weight's.
    """
    rng = np.random.default_rng(seed)
    names = list(dict.fromkeys(of for step in recording.steps for _, of in _learnt(step.operation.tensors, step)))
    cost = recording.config.n_parameters * recording.tensors["tokens"].size * 2 * STEPS
    most = max(FEWEST, int(budget / cost))
    if len(names) * per_tensor > most:
        per_tensor = 1
        names = [names[i] for i in sorted(rng.permutation(len(names))[:most])]
    found = {of: [_proof(recording, of, index) for index in _elements(recording, of, per_tensor, rng)] for of in names}
    return {
        step.name: [
            {"tensor": argument, **proof}
            for argument, of in _learnt(step.operation.tensors, step)
            for proof in found.get(of, [])
        ]
        for step in recording.steps
    }


def _learnt(tensors: dict[str, str], step: Any) -> list[tuple[str, str]]:
    return [(argument, tensors[argument]) for argument, gradient in step.gradients.items() if gradient is not None]


def _elements(recording: Recording, of: str, count: int, rng: np.random.Generator) -> list[tuple[int, ...]]:
    gradient = recording.gradients[of]
    largest = int(np.argmax(np.abs(gradient)))
    others = [int(i) for i in rng.choice(gradient.size, min(count, gradient.size), replace=False) if i != largest]
    return [tuple(map(int, np.unravel_index(i, gradient.shape))) for i in [largest, *others][:count]]


def _proof(recording: Recording, of: str, index: tuple[int, ...]) -> dict[str, Any]:
    x, gradient = recording.tensors[of], recording.gradients[of]

    def loss(distance: float) -> float:
        moved = x.copy()
        moved[index] += distance
        return recording.loss_with(of, moved)

    largest = float(np.abs(x).max()) or 1.0
    measured = derivative(loss, FIRST_STEP * largest, abs(recording.loss))
    of_size = gradient
    if of.endswith(KEY_BIAS):
        of_size = recording.gradients[of.replace("bias", "weight")]
    return {
        "index": list(index),
        "by_hand": float(gradient[index]),
        "differences": measured,
        "error": relative(measured - float(gradient[index]), of_size),
        "bound": DIFFERENCES,
    }


def derivative(
    f: Callable[[float], float], step: float, size: float, steps: int = STEPS, shrink: float = SHRINK
) -> float:
    """df/dx at 0 of a function whose values are of this `size`: see the module's docstring."""
    best, found = math.inf, math.nan
    before: list[float] = []
    for _ in range(steps):
        rounding = 4 * np.finfo(np.float64).eps * size / step
        row = [(f(step) - f(-step)) / (2 * step)]
        factor = 1.0
        for coarser in before:
            factor *= shrink**2
            row.append(row[-1] + (row[-1] - coarser) / (factor - 1))
            off = max(abs(row[-1] - row[-2]), abs(row[-1] - coarser)) + rounding
            if off <= best:
                best, found = off, row[-1]
        before, step = row, step / shrink
    return found
