"""How good a finite difference is, measured: its error against the step, in float64 and float32.

With the gradient by hand to hold it against, the two errors of a difference can be seen apart. What Taylor's series
leaves out falls with the step, and the rounding of the loss, divided by the step, grows as it falls:

    forward    (f(x + h) - f(x)) / h            f'' h / 2        eps f / h        best at h = sqrt(2 eps f / f'')
    central    (f(x + h) - f(x - h)) / 2h       f''' h^2 / 6     eps f / 2h       best at h = (3/2 eps f / f''')^(1/3)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from gpt.study.record import Recording, layer_of

__all__ = ["laboratory_of"]

A_DECADE = 4  # steps
SMALLEST = {"float64": -14, "float32": -8}  # powers of ten, of the tensor's largest entry
BEND = 1e-3  # the step at which f'' and f''' are taken
BUDGET = 4e10  # multiplications: seconds


def laboratory_of(recording: Recording, budget: float = BUDGET) -> dict[str, Any]:
    """Of a handful of parameters, for the element with the largest gradient: errors at each step, by precision.

    Empty lists, and why, for a model too large for `budget`.
    """
    config = recording.config
    last = config.n_layers - 1
    names = [
        name
        for name in ("tok_emb.weight", "blocks.0.norm1.weight", "blocks.0.attn.query.weight",
                     "blocks.0.attn.key.weight", f"blocks.{last}.mlp.down.weight", "final_norm.weight", "head.weight")
        if name in recording.gradients
    ]  # fmt: skip
    runs = len(names) * 2 * A_DECADE * -sum(SMALLEST.values())
    if runs * config.n_parameters * recording.tensors["tokens"].size > budget:
        return {"tensors": [], "why": f"{runs} losses of a model with {config.n_parameters:,} parameters take minutes."}
    precisions = {dtype: _rounded(recording, dtype) for dtype in SMALLEST}
    return {"tensors": [_measured(recording, precisions, name) for name in names], "loss": recording.loss, "why": ""}


def _rounded(recording: Recording, dtype: str) -> Recording:
    """The same pass, to be run again in another precision."""

    def rounded(value: Any) -> Any:
        return value.astype(dtype) if isinstance(value, np.ndarray) and value.dtype.kind == "f" else value

    steps = [
        dataclasses.replace(step, arguments={name: rounded(value) for name, value in step.arguments.items()})
        for step in recording.steps
    ]
    tensors = {name: rounded(value) for name, value in recording.tensors.items()}
    for step in steps:  # results are not rounded, but made of what was
        arguments = step.arguments | {a: tensors[of] for a, of in step.operation.tensors.items()}
        tensors[step.name] = np.asarray(layer_of(step.operation).forward(**arguments)[0])
    return dataclasses.replace(recording, steps=steps, tensors=tensors)


def _measured(recording: Recording, precisions: dict[str, Recording], name: str) -> dict[str, Any]:
    gradient = recording.gradients[name]
    index = np.unravel_index(np.argmax(np.abs(gradient)), gradient.shape)
    true, largest = float(gradient[index]), float(np.abs(recording.tensors[name]).max()) or 1.0
    third, second = _bends(recording, name, index, BEND * largest)
    found: dict[str, Any] = {
        "name": name,
        "index": list(map(int, index)),
        "by_hand": true,
        "largest": largest,
        "second": second,
        "third": third,
    }
    for dtype, rounded in precisions.items():
        count = -SMALLEST[dtype] * A_DECADE + 1
        steps = (np.logspace(SMALLEST[dtype], 0, count)[::-1] * largest).tolist()
        errors = np.array([_errors(rounded, name, index, step, true) for step in steps])
        rounding = float(np.finfo(dtype).eps) * recording.loss
        found[dtype] = {
            "steps": steps,
            "central": errors[:, 0].tolist(),
            "forward": errors[:, 1].tolist(),
            "best": {  # as the formulas have it
                "central": (1.5 * rounding / third) ** (1 / 3) if third else largest,
                "forward": (2 * rounding / second) ** 0.5 if second else largest,
            },
            "rounding": rounding / abs(true) if true else 0.0,  # beside 1 / h
        }
    return found


def _losses(recording: Recording, name: str, index: Any, step: float) -> tuple[float, float]:
    """The loss with the element moved by the step, and how far it was moved, which is rounded too."""
    x = recording.tensors[name].copy()
    before = x[index]
    x[index] += step
    return recording.loss_with(name, x), float(x[index]) - float(before)


def _errors(recording: Recording, name: str, index: Any, step: float, true: float) -> tuple[float, float]:
    """Of the central and the forward difference, relative to the gradient; 1 where the step was rounded away."""
    (up, plus), (here, _), (down, minus) = (_losses(recording, name, index, h) for h in (step, 0.0, -step))
    central = (up - down) / (plus - minus) if plus != minus else 0.0
    forward = (up - here) / plus if plus else 0.0
    return abs(central - true) / (abs(true) or 1.0), abs(forward - true) / (abs(true) or 1.0)


def _bends(recording: Recording, name: str, index: Any, h: float) -> tuple[float, float]:
    """|f'''| and |f''|, themselves by differences."""
    f = {n: _losses(recording, name, index, n * h)[0] for n in (-2, -1, 0, 1, 2)}
    return abs(f[2] - 2 * f[1] + 2 * f[-1] - f[-2]) / (2 * h**3), abs(f[1] - 2 * f[0] + f[-1]) / h**2
