"""Runs the checks and shows what they found: a table of operators, a table of models, and every failure in words."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from gpt.errors import is_installed
from gpt.parity import model, ops, subjects
from gpt.parity.gates import GATES, Result

NUMBER_GATES = ("differences", "laws", "autograd", "algebra", "rounding")  # shown as a number, the others as yes or no


@dataclass
class Report:
    """All that was measured, and what could not be."""

    results: list[Result] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)  # what -> why

    @property
    def passed(self) -> bool:
        return bool(self.results) and all(result.passed for result in self.results)

    @property
    def failures(self) -> list[Result]:
        return [result for result in self.results if not result.passed]

    def to_json(self) -> str:
        """One object: passed, left_out, and results with operator, gate, case, tensor, error, bound, passed, note."""
        results = [result.to_dict() for result in self.results]
        return json.dumps({"passed": self.passed, "left_out": self.left_out, "results": results}, indent=1)


def run(
    names: Sequence[str] = (),
    steps: int = 100,
    dtypes: Sequence[str] = tuple(model.LOCKSTEP),
    progress: Callable[[str], None] = lambda what: None,
) -> Report:
    """Check the operators of these names and, if "model" is among them, the whole model; without names, everything.

    With "kernels" among the names the kernels are checked: all of them and the model on them, or those that are named.
    Models train `steps` steps in lockstep for each of `dtypes`. Raises UserError for an unknown name.
    """
    report = Report()
    operators = [name for name in names if name not in ("model", "kernels")]
    rows = ops.select(operators)
    with one_thread():
        if "kernels" not in names:
            for row in rows if operators or not names else ():
                progress(row.label)
                report.results += operator_results(row, report.left_out)
            for name in model.CONFIGS if "model" in names or not names else ():
                progress(f"model {name}")
                report.results += model_results(name, steps, dtypes, report.left_out)
        if "kernels" in names or not names:
            with_model = "model" in names or not operators
            kernels = rows if operators or "model" not in names else []
            report.results += kernel_results(kernels, with_model, bool(names), report.left_out, progress)
    return report


def run_function(
    place: str, name: str, dtypes: Sequence[str] = ("float32",), progress: Callable[[str], None] = lambda what: None
) -> Report:
    """Hold the function at FILE.py:FUNCTION against an operator's reference and PyTorch's own, on every case.

    Raises UserError for an unknown operator, or where there is no such function.
    """
    report, subject = Report(), subjects.function(place, tuple(dtypes))
    with one_thread():
        for row in ops.select([name]):
            progress(row.of(subject).label)
            report.results += operator_results(row.of(subject), report.left_out)
    for operator in sorted(subject.forward_only):
        report.left_out[f"gradients of {operator}"] = f"what {subject.name} returns cannot be differentiated"
    return report


def kernel_results(
    rows: Sequence[ops.Row],
    with_model: bool,
    asked_for: bool,
    left_out: dict[str, str],
    progress: Callable[[str], None],
) -> Iterator[Result]:
    """All checks of the kernels of these operators; where not `asked_for`, only on a GPU, which takes no minutes."""
    if not asked_for and (missing("torch") or missing("triton") or not subjects.on_gpu()):
        left_out["kernels"] = "no CUDA GPU is here; `twingrad check kernels` has them interpreted, which takes minutes"
        return
    subject = subjects.kernels()
    for row in (row for row in rows if row.has_twin("kernels")):
        progress(row.of(subject).label)
        yield from operator_results(row.of(subject), left_out)
    for name in model.CONFIGS if with_model else ():
        progress(f"triton model {name}")
        yield from model.on_kernels(name, subject.device)


@contextmanager
def one_thread() -> Iterator[None]:
    """Hold PyTorch to one thread: in one process its pool and NumPy's make each other wait longer than they work."""
    if missing("torch"):
        yield
        return
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def operator_results(row: ops.Row, left_out: dict[str, str]) -> Iterator[Result]:
    """All gates of one operator; `left_out` is told of those that need a package that is not there."""
    for gate in (GATES[name] for name in row.subject.gates):
        if missing(gate.needs):
            left_out[f"gate {gate.name}"] = _why(gate.needs)
            continue
        for case in gate.cases(row):
            yield from gate.results(row, case)


def model_results(name: str, steps: int, dtypes: Sequence[str], left_out: dict[str, str]) -> Iterator[Result]:
    """All checks of one model."""
    for check, (function, needs) in model.CHECKS.items():
        if missing(needs):
            left_out[f"model {check}"] = _why(needs)
        else:
            yield from function(name)
    for dtype in dtypes if steps else ():
        if missing("torch"):
            left_out[f"model lockstep {dtype}"] = _why("torch")
        else:
            yield from model.lockstep(name, dtype, steps)


def missing(package: str) -> bool:
    """Whether a package that is needed ("" needs none) is not installed."""
    return bool(package) and not is_installed(package)


def _why(package: str) -> str:
    return f"{package} is not installed: pip install 'twingrad[{package}]'"


def render(report: Report) -> str:
    """The report as text."""
    models = [result for result in report.results if "model " in result.operator]
    operators = [result for result in report.results if "model " not in result.operator]
    parts = []
    for here in (lambda result: " " not in result.operator, lambda result: " " in result.operator):
        if chosen := [result for result in operators if here(result)]:
            parts.append(_operator_table(chosen))
    if models:
        parts.append(_model_table(models))
    parts += [f"FAILED  {line}" for line in _failure_lines(report.failures)]
    parts += [f"left out  {what}: {why}" for what, why in report.left_out.items()]
    failed = len(report.failures)
    verdict = f"{failed:,} beyond their bounds" if failed else "all within their bounds"
    parts.append(f"{len(report.results):,} measurements, {verdict}")
    return "\n\n".join(parts)


def _operator_table(results: list[Result]) -> str:
    """A line an operator, a column a gate, in it the worst error."""
    groups = _grouped(results)
    shown = [gate for gate in GATES.values() if any(gate.name == name for _, name in groups)]
    rows = [["operator", *(gate.name for gate in shown)], ["", *(gate.bound for gate in shown)]]
    for operator in dict.fromkeys(operator for operator, _ in groups):
        rows.append([operator, *(_cell(groups.get((operator, gate.name), []), gate.name) for gate in shown)])
    return align(rows)


def _cell(results: list[Result], gate: str) -> str:
    if not results:
        return ""
    worst = _worst(results)
    error = f"{worst.error:.1e}" if gate != "rounding" else f"{worst.error:.2f}x"
    passed = all(result.passed for result in results)
    return (error if gate in NUMBER_GATES else "yes") if passed else f"FAIL {error}"


def _model_table(results: list[Result]) -> str:
    """A line a check, with the worst of what it measured."""
    rows = [["model", "check", "measured", "worst", "error", "bound"]]
    for (operator, gate), group in _grouped(results).items():
        worst = _worst(group)
        row = [operator.replace("model ", ""), gate, str(len(group)), worst.tensor, f"{worst.error:.1e}"]
        rows.append([*row, f"{worst.bound:.0e}" if worst.bound < 1 else f"{worst.bound:g}"])
        if not all(result.passed for result in group):
            rows[-1].append("FAIL")
        elif gate.startswith("lockstep"):
            rows[-1].append(worst.case)
    return align(rows)


def _grouped(results: list[Result]) -> dict[tuple[str, str], list[Result]]:
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.operator, result.gate), []).append(result)
    return groups


def _worst(results: list[Result]) -> Result:
    """The first that failed, or the one nearest to its bound."""
    failed = [result for result in results if not result.passed]
    return failed[0] if failed else max(results, key=lambda result: result.error / result.bound if result.bound else 0)


def _failure_lines(failures: list[Result]) -> Iterator[str]:
    """For each operator and gate its first failure, and how many there are."""
    for group in _grouped(failures).values():
        more = f", and {len(group) - 1} more" if len(group) > 1 else ""
        yield f"{group[0]}{more}"


def align(rows: Sequence[Sequence[str]]) -> str:
    """Rows of words as a table in plain text."""
    columns = max(map(len, rows))
    widths = [max(len(row[i]) if i < len(row) else 0 for row in rows) for i in range(columns)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows
    )
