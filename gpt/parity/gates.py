"""The gates that an operator must pass, and how each bound is meant.

Bounds are not fitted to what passes. In float64 an error is relative to the largest entry of the true tensor: 1e-7
against central differences, whose own error is about 1e-10, and 1e-12 against automatic differentiation. In float32 it
is ||a - b|| / ||b|| against the float64 truth, at most twice that of PyTorch's own operator (three times for gradients
of attention). An error that is not a number never passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpt.parity.laws import DIFFERENCES, EXACT, Measure, relative
from gpt.parity.ops import Case, Row
from reference.gradcheck import numeric_gradient

SCALAR_DRAWS = 32


@dataclass(frozen=True)
class Result:
    """One thing measured. `operator`, `case` and `tensor` say where; `note` what went wrong where no number says it."""

    operator: str
    gate: str
    case: str
    tensor: str
    error: float
    bound: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # never true of NaN

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it: an error that is no finite number becomes null."""
        error = self.error if math.isfinite(self.error) else None
        return {**vars(self), "error": error, "passed": self.passed}

    def __str__(self) -> str:
        where = " ".join(filter(None, (self.operator, self.case and f"[{self.case}]", f"{self.gate}: {self.tensor}")))
        return f"{where} is off by {self.error:.3g}, bound {self.bound:.3g}" + (f" ({self.note})" if self.note else "")


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """||a - b|| / ||b||, computed in float64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return relative(float(np.linalg.norm(a - b)), float(np.linalg.norm(b))) if a.shape == b.shape else math.inf


def error_of(ours: np.ndarray, true: np.ndarray, size: np.ndarray | None = None) -> float:
    """Largest difference, relative to the largest entry of `size`, which is `true` unless given."""
    ours, true = np.asarray(ours), np.asarray(true)
    return relative(ours - true, true if size is None else size) if ours.shape == true.shape else math.inf


def differences(row: Row, case: Case) -> Iterator[Measure]:
    """By-hand gradients against central differences: all entries of a small tensor, else some and the largest."""
    problem = row.problem(case)
    gradients, rng = problem.run(), np.random.default_rng(0)
    for name, x in problem.inputs().items():
        gradient = gradients[f"d{name}"]
        chosen: Any = range(x.size)
        if x.size > 40:
            chosen = {int(np.argmax(np.abs(gradient))), *rng.choice(x.size, 8, replace=False).tolist()}
        indices = [tuple(map(int, np.unravel_index(flat, x.shape))) for flat in chosen]

        def weighted(value: np.ndarray, name: str = name) -> float:
            return float(np.sum(problem.dy * problem.replace(**{name: value}).forward()))

        numeric = numeric_gradient(weighted, x, problem.step(), indices)
        got, true = (np.array([array[index] for index in indices]) for array in (gradient, numeric))
        yield f"d{name}", relative(got - true, true), DIFFERENCES


def laws(row: Row, case: Case) -> Iterator[Measure]:
    """What holds for any input."""
    for law in row.laws:
        yield from law(row.problem(case))


def autograd(row: Row, case: Case) -> Iterator[Measure]:
    """Result and gradients against PyTorch's, in float64."""
    problem = row.problem(case)
    ours, truth = problem.run(), problem.run_torch()
    for name, true in truth.items():
        # Where a gradient is exactly 0, PyTorch's may hold rounding, which only dy gives a size to.
        size = problem.dy if name != "y" and not np.any(ours[name]) else true
        yield name, error_of(ours[name], true, size), EXACT


def rounding(row: Row, case: Case) -> Iterator[Measure]:
    """In float32, the error against the float64 truth, as a multiple of PyTorch's own in float32.

    No operator is asked to be closer than the rounding of its result to float32. The rounding of one number is chance:
    where the result is a scalar, many are drawn.
    """
    unit = float(np.finfo(np.float32).eps) / 2
    tensors: dict[str, list[np.ndarray]] = {}
    for number in range(SCALAR_DRAWS if row.problem(case).dy.ndim == 0 else 1):
        problem = row.problem(case, np.float32, number)
        for run in (problem.cast(np.float64).run(), problem.run(), problem.run_torch()):
            for name, tensor in run.items():
                tensors.setdefault(name, []).append(np.ravel(tensor))
    for name, runs in tensors.items():
        true, ours, theirs = (np.concatenate(runs[i::3]) for i in range(3))
        factor = 2.0 if name == "y" else row.gradient_factor
        yield name, distance(ours, true) / max(distance(theirs, true), unit), factor


def repeats(row: Row, case: Case) -> Iterator[Measure]:
    """The same inputs give the same bits twice. The error counts entries that differ."""
    problem = row.problem(case, np.float32)
    first, second = problem.run(), problem.run()
    for name in first:
        yield name, float(np.count_nonzero(first[name] != second[name])), 0.0


def pure(row: Row, case: Case) -> Iterator[Measure]:
    """No input is changed, and no gradient shares an input's memory. The error counts entries, or is 1."""
    problem = row.problem(case, np.float32)
    given = {name: value for name, value in problem.arguments.items() if isinstance(value, np.ndarray)}
    given["dy"] = problem.dy
    copies = {name: value.copy() for name, value in given.items()}
    results = problem.run()
    for name, value in given.items():
        yield f"{name} changed", float(np.count_nonzero(value != copies[name])), 0.0
        shared = [tensor for tensor, result in results.items() if np.shares_memory(result, value)]
        yield f"{', '.join(shared) or 'nothing'} in the memory of {name}", float(bool(shared)), 0.0


def dtypes(row: Row, case: Case) -> Iterator[Measure]:
    """float32 in, float32 out, and each gradient shaped like its input. The error is 1 where not."""
    problem = row.problem(case, np.float32)
    results, inputs = problem.run(), problem.inputs()
    for name, result in results.items():
        yield f"dtype of {name}", float(np.asarray(result).dtype != np.float32), 0.0
    for name, x in inputs.items():
        yield f"shape of d{name}", float(results[f"d{name}"].shape != x.shape), 0.0


@dataclass(frozen=True)
class Gate:
    """One way to hold an operator to account."""

    name: str
    bound: str  # in words, for the head of a table
    measure: Callable[[Row, Case], Iterator[Measure]]
    needs: str = ""  # a package without which it is left out

    def cases(self, row: Row) -> tuple[Case, ...]:
        return row.rounding if self.measure is rounding else row.cases

    def results(self, row: Row, case: Case) -> list[Result]:
        """What this gate measures of one operator on one case. An operator that raises has failed."""
        try:
            with np.errstate(invalid="ignore", over="ignore"):
                return [Result(row.name, self.name, str(case), *measure) for measure in self.measure(row, case)]
        except Exception as error:
            note = f"{type(error).__name__}: {error}"
            return [Result(row.name, self.name, str(case), "result", math.inf, 0.0, note)]


GATES: dict[str, Gate] = {
    gate.name: gate
    for gate in (
        Gate("differences", "1e-7", differences),
        Gate("laws", "1e-12, 1e-7", laws),
        Gate("autograd", "1e-12", autograd, needs="torch"),
        Gate("rounding", "2x PyTorch", rounding, needs="torch"),
        Gate("repeats", "same bits", repeats),
        Gate("pure", "unchanged", pure),
        Gate("dtype", "kept", dtypes),
    )
}
