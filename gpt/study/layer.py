"""One layer alone, on arguments small enough to be looked at: its formulas, its numbers, and what it must obey.

A layer's name is that of an operator of the check (`twingrad check`): a layer, or a layer with some of its settings,
such as "attention-grouped". Arguments are drawn as there, so that mistakes show: axes of different sizes, weights that
are neither 0, nor 1, nor small, and a random gradient that arrives.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpt.errors import UserError
from gpt.options import did_you_mean
from gpt.parity import ops
from gpt.parity.laws import DIFFERENCES, relative
from gpt.parity.ops import Case, Problem
from gpt.parity.subjects import as_tuple
from gpt.study.derivations import DERIVATIONS
from gpt.study.record import Operation, Recording, Step, layer_of
from reference.config import GPTConfig
from reference.gradcheck import numeric_gradient

__all__ = ["NAMES", "Check", "checks", "page_data", "problem", "show", "station", "step_of"]

NAMES = tuple(name for name, row in ops.ROWS.items() if row.layer in DERIVATIONS)
# Of a row's or else a layer's case, as `ops` draws it: few numbers, and axes of different sizes; ids that repeat.
SIZES = {
    "embedding": (5, 7, 3, 4), "linear": (4, 2, 3, 5), "layer_norm": (2, 3, 5), "rms_norm": (2, 3, 5),
    "rope": (2, 3, 5, 4), "swiglu": (2, 3, 5), "gelu": (2, 3, 5), "bias_gelu": (2, 3, 5), "dropout": (2, 3, 5),
    "attention": (2, 3, 3, 5, 5, 7), "attention-full": (2, 3, 3, 4, 5, 7), "attention-past": (2, 3, 3, 4, 5, 7),
    "attention-grouped": (2, 6, 3, 5, 5, 7), "flash_attention": (1, 2, 2, 3, 4, 5), "cross_entropy": (2, 5, 7),
    "linear_cross_entropy": (7, 2, 5, 3), "token_logps": (2, 5, 7), "lora": (6, 4, 2, 3, 5), "dpo": (5,), "orpo": (5,),
}  # fmt: skip


def problem(name: str, seed: int = 0) -> Problem:
    """The arguments of a layer and the gradient that arrives, the same for a seed. UserError for an unknown name."""
    if name not in NAMES:
        close = "" if name in ops.ROWS else did_you_mean(name, NAMES)
        raise UserError(f"layer: expected one of {', '.join(NAMES)}, got {name!r}{close}")
    if seed < 0:
        raise UserError(f"seed: expected at least 0, got {seed}")
    row = ops.ROWS[name]
    return row.problem(Case(SIZES.get(name) or SIZES[row.layer]), number=seed)


def station(name: str, seed: int = 0) -> Step:
    """A layer as if it were an operation of a model, with its numbers in both passes. UserError for an unknown name."""
    return step_of(problem(name, seed))


def step_of(given: Problem) -> Step:
    """Both passes over a problem."""
    row, arguments = given.row, given.arguments
    tensors = {
        name: name
        for name, value in arguments.items()
        if value is not None and name in (*row.gradients, "ids", "targets")
    }
    constants = {name: value for name, value in arguments.items() if name not in tensors}
    operation = Operation(row.name, row.layer, tensors, constants)
    y, saved = layer_of(operation).forward(**arguments)
    dy = np.asarray(given.upstream()[0])
    returned = zip(row.gradients, as_tuple(layer_of(operation).backward(dy, saved)), strict=True)
    gradients = {name: gradient for name, gradient in returned if gradient is not None}
    return Step(operation, dict(arguments), np.asarray(y), saved, dy, gradients)


@dataclass(frozen=True)
class Check:
    """What was measured: `kind` is differences, equations or laws; `what` says it in words."""

    kind: str
    what: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # never true of NaN


def checks(given: Problem) -> list[Check]:
    """Gradients, every element, against central differences; equations against the layer; the laws of its row."""
    return [*_differences(given), *_equations(given), *_laws(given)]


def _differences(given: Problem) -> Iterator[Check]:
    gradients = given.run()
    for name, x in given.inputs().items():
        true = numeric_gradient(functools.partial(weighed, given, name), x, given.step())
        error = relative(gradients[f"d{name}"] - true, given.size(f"d{name}", true))
        yield Check("differences", f"d{name}", error, DIFFERENCES)


def weighed(given: Problem, name: str, value: np.ndarray) -> float:
    """The sum of dy times y with another value of an argument: what the gradients are the gradients of."""
    return given.weighed(given.replace(**{name: value}).forward())


def _equations(given: Problem) -> Iterator[Check]:
    """What the equations say of results and gradients, each from the arguments alone."""
    step, bound = step_of(given), 1e-12
    true = {step.result: step.y} | {f"d{name}": gradient for name, gradient in step.gradients.items()}
    found = step.derivation.evaluate(step.arguments, {f"d{step.result}": step.dy, **true})
    for name, tensor in true.items():
        yield Check("equations", name, relative(found[name] - tensor, given.size(name, tensor)), bound)


def _laws(given: Problem) -> Iterator[Check]:
    for law in given.row.laws:
        for what, error, bound in law(given):
            yield Check("laws", what, error, bound)


def show(name: str, yours: str = "", seed: int = 1, out: str = "") -> int:
    """Print a layer's formulas, numbers and checks; or hold the FILE.py `yours` against it. Returns the exit status.

    With `out`, a page about the layer is written instead. UserError for an unknown name, or a file that is of no use.
    """
    from gpt.study import terminal

    given = problem(name, seed)
    if yours:
        from gpt.study.yours import compare

        comparison = compare(given, yours)
        terminal.write_out(terminal.render_comparison(comparison))
        return 0 if comparison.right else 1
    measured = checks(given)
    if out:
        from gpt.study import page, report

        data = page_data(given, measured)
        page.write(Path(out), data["title"], data, report.SCRIPTS)
        print(f"{out}  open it in a browser")
    else:
        terminal.write_out(terminal.render_layer(step_of(given), measured))
    return 0 if all(check.passed for check in measured) else 1


def page_data(given: Problem, measured: Sequence[Check]) -> dict[str, Any]:
    """What a page shows of a layer alone: a report's data with one station, all of whose gradients are proved."""
    from gpt.study import report

    step = step_of(given)
    arrays = {name: value for name, value in step.arguments.items() if isinstance(value, np.ndarray)}
    contributions = {name: [(step.name, name, gradient)] for name, gradient in step.gradients.items()}
    recording = Recording(
        GPTConfig(vocab_size=1, context_length=1, emb_dim=1, n_layers=1, n_heads=1),  # of no model
        [step],
        arrays | {step.name: step.y},
        step.gradients | {step.name: step.dy},
        contributions,
    )
    tensors: dict[str, dict[str, Any]] = {}
    limit = max(max(np.shape(value), default=1) for value in step.values.values())
    station = report.station(step, recording, tensors, limit)
    station["title"] = step.name.replace("_", " ").capitalize()
    station["proofs"] = [_proof(given, step, name) for name in step.gradients]
    station["laws"] = [
        {"name": c.what, "error": c.error, "bound": c.bound, "passed": c.passed, "doc": ""}
        for c in measured
        if c.kind == "laws"
    ]
    return {
        "title": f"{step.name}, forward and backward",
        "text": "",
        "notes": ["One layer alone, on random arguments."],
        "model": {name: "×".join(map(str, value.shape)) for name, value in arrays.items()},
        "tokens": [],
        "targets": [],
        "vocabulary": [],
        "loss": given.weighed([step.y]),
        "checked": {"tensors": len(step.gradients) + 1, "different": []},
        "complete": True,
        "tensors": tensors,
        "stations": [station],
        "contributions": {},
        "sections": {},
    }


def _proof(given: Problem, step: Step, name: str) -> dict[str, Any]:
    """The largest element of a gradient, by hand and by central differences."""
    gradient = step.gradients[name]
    index = tuple(map(int, np.unravel_index(np.argmax(np.abs(gradient)), gradient.shape)))
    f = functools.partial(weighed, given, name)
    differences = float(numeric_gradient(f, given.arguments[name], given.step(), [index])[index])
    by_hand = float(gradient[index])
    error = relative(by_hand - differences, given.size(f"d{name}", gradient))
    return {"tensor": name, "index": index, "by_hand": by_hand, "differences": differences, "error": error,
            "bound": DIFFERENCES}  # fmt: skip
