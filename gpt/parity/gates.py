"""The gates that an operator must pass, and how each bound is meant.

Bounds are not fitted to what passes. In float64 an error is relative to the largest entry of the true tensor: 1e-7
against central differences, whose own error is about 1e-10, 1e-12 against automatic differentiation, and 1e-11 for a
kernel against the reference. In float32, float16 and bfloat16 it is ||a - b|| / ||b|| against the float64 truth, at
most twice that of PyTorch's own operator (three times for gradients of attention). An error that is not a number never
passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpt.parity.laws import DIFFERENCES, EXACT, Measure, relative
from gpt.parity.ops import Case, Problem, Row
from gpt.parity.subjects import REFERENCE, PyTorch, Subject
from reference.gradcheck import numeric_gradient

ALGEBRA = 1e-11  # of a kernel in float64, relative to the largest entry
UNIT = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # the largest error of one rounding
SCALAR_DRAWS = 32
NUMBERS, MOST_DRAWS = 2000, 64  # so many numbers make an average, where few at a time are drawn


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
            return problem.weighed(problem.replace(**{name: value}).forward())

        numeric = numeric_gradient(weighted, x, problem.step(), indices)
        got, true = (np.array([array[index] for index in indices]) for array in (gradient, numeric))
        yield f"d{name}", relative(got - true, problem.size(f"d{name}", true)), DIFFERENCES


def laws(row: Row, case: Case) -> Iterator[Measure]:
    """What holds for any input."""
    for law in row.laws:
        yield from law(row.problem(case))


def autograd(row: Row, case: Case) -> Iterator[Measure]:
    """Results and gradients against PyTorch's, in float64."""
    yield from _against(row.problem(case), PyTorch(), EXACT)


def algebra(row: Row, case: Case) -> Iterator[Measure]:
    """Results and gradients against the reference's, in float64: there rounding hides no mistake."""
    yield from _against(row.problem(case), REFERENCE, ALGEBRA)


def _against(problem: Problem, truth: Subject, bound: float) -> Iterator[Measure]:
    ours = problem.run()
    for name, true in problem.on(truth).run().items():
        if name in ours or name in problem.row.results:
            yield name, error_of(ours[name], true, np.array(problem.size(name, true))), bound


def rounding(row: Row, case: Case) -> Iterator[Measure]:
    """The error against the float64 truth, as a multiple of PyTorch's own in the same type.

    No operator is asked to be closer than the rounding of its result to that type. The rounding of one number is
    chance: where a case has few, many are drawn. What overflows in PyTorch's own operator gives no measure.
    """
    for dtype in row.subject.dtypes:
        peer = PyTorch("cuda" if getattr(row.subject, "device", "cpu") == "cuda" else "cpu")
        tensors: dict[str, list[np.ndarray]] = {}
        sizes: dict[str, float] = {}
        for number in range(_draws(row, case)):
            problem = row.problem(case, dtype, number)
            truth, ours = problem.cast("float64").on(REFERENCE), problem.run()
            true, theirs = truth.run(), problem.on(peer).run()
            for name, tensor in ours.items():
                sizes[name] = truth.size(name, true[name])
                tensors.setdefault(name, []).extend(map(np.ravel, (true[name], tensor, theirs[name])))
        for name, runs in tensors.items():
            joined, mine, others = (np.concatenate(runs[i::3]).astype(np.float64) for i in range(3))
            if np.isfinite(others).all():
                norm = float(np.linalg.norm(joined))
                unit = UNIT[dtype] * (norm if np.any(joined) else sizes[name] * math.sqrt(joined.size))
                error = relative(
                    float(np.linalg.norm(mine - joined)), max(float(np.linalg.norm(others - joined)), unit)
                )
                factor = 2.0 if name in row.results else row.gradient_factor
                yield name if dtype == "float32" else f"{name} in {dtype}", error, factor


def _draws(row: Row, case: Case) -> int:
    numbers = row.problem(case).upstream()[0].size
    if row.subject.every_case:
        return max(1, min(MOST_DRAWS, math.ceil(NUMBERS / numbers)))
    return SCALAR_DRAWS if row.problem(case).upstream()[0].ndim == 0 else 1


def conduct(row: Row, case: Case) -> Iterator[Measure]:
    """The same bits twice, inputs unchanged, their memory not handed out, float32 kept, gradients shaped like inputs.

    An error counts entries that are not as they were, or is 1.
    """
    problem, subject = row.problem(case, "float32"), row.subject
    arguments, dy = subject.prepare(problem)
    given = {name: arguments[name] for name, value in problem.arguments.items() if isinstance(value, np.ndarray)}
    given |= dict(zip(["dy"] if len(dy) == 1 else [f"d{name}" for name in row.results], dy, strict=True))
    copies = {name: subject.copy(value) for name, value in given.items()}
    results = subject.execute(row, arguments, dy)
    for name, value in given.items():
        yield f"{name} changed", _count(subject.numpy(value) != subject.numpy(copies[name])), 0.0
        shared = [tensor for tensor, result in results.items() if subject.share_memory(result, value)]
        yield f"{', '.join(shared) or 'nothing'} in the memory of {name}", float(bool(shared)), 0.0
    again = problem.run()
    inputs = {f"d{name}": x for name, x in problem.inputs().items()}
    for name, result in ((name, subject.numpy(result)) for name, result in results.items()):
        yield f"{name} repeated", _count(result != again[name]), 0.0
        yield f"dtype of {name}", float(result.dtype != np.float32), 0.0
        if name in inputs:
            yield f"shape of {name}", float(result.shape != inputs[name].shape), 0.0


def _count(true: np.ndarray) -> float:
    return float(np.count_nonzero(true))


@dataclass(frozen=True)
class Gate:
    """One way to hold an operator to account."""

    name: str
    bound: str  # in words, for the head of a table
    measure: Callable[[Row, Case], Iterator[Measure]]
    needs: str = ""  # a package without which it is left out

    def cases(self, row: Row) -> tuple[Case, ...]:
        """Rounding of small tensors is chance: without the draws that it takes, large ones have to do. Of a layer
        without gradients there are no differences."""
        if self.measure is differences and not row.gradients:
            return ()
        if self.measure is not rounding:
            return row.cases
        return row.cases + row.rounding if row.subject.every_case else row.rounding

    def results(self, row: Row, case: Case) -> list[Result]:
        """What this gate measures of one operator on one case. An operator that raises has failed."""
        try:
            with np.errstate(invalid="ignore", over="ignore"):
                return [Result(row.label, self.name, str(case), *measure) for measure in self.measure(row, case)]
        except Exception as error:
            note = f"{type(error).__name__}: {error}"
            return [Result(row.label, self.name, str(case), "result", math.inf, 0.0, note)]


GATES: dict[str, Gate] = {
    gate.name: gate
    for gate in (
        Gate("differences", "1e-7", differences),
        Gate("laws", "1e-12, 1e-7", laws),
        Gate("autograd", "1e-12", autograd, needs="torch"),
        Gate("algebra", "1e-11", algebra, needs="torch"),
        Gate("rounding", "2x PyTorch", rounding, needs="torch"),
        Gate("conduct", "none", conduct),
    )
}
