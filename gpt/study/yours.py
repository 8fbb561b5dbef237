"""Somebody's own layer beside the reference's: what is expected, what came, where they part, and what may be missing.

The file has the layer's face: `forward(...)`, which returns the result and what the gradient needs, and
`backward(dy, saved)`; or only one of the two. `saved` may be anything. The file's code runs in this process, as a test
would run it, on copies of the arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpt.errors import UserError
from gpt.parity.laws import DIFFERENCES, relative
from gpt.parity.ops import Problem
from gpt.parity.subjects import line_in, load_module
from gpt.study import hints
from gpt.study.layer import step_of
from gpt.study.record import Step
from gpt.study.terminal import spelled
from reference.gradcheck import numeric_gradient

__all__ = ["Comparison", "Tensor", "compare"]


@dataclass
class Tensor:
    """One result or gradient: what is expected, and what came, which is None where nothing did."""

    name: str
    ours: np.ndarray
    theirs: np.ndarray | None
    note: str = ""

    @property
    def right(self) -> bool:
        return self.theirs is not None and hints.same(self.theirs, self.ours)

    @property
    def comparable(self) -> bool:
        """Whether there is an element for each one that is expected."""
        return self.theirs is not None and self.theirs.shape == self.ours.shape

    @property
    def difference(self) -> np.ndarray:
        assert self.theirs is not None
        return self.theirs - self.ours

    @property
    def error(self) -> float:
        """The largest difference, relative to the largest entry expected."""
        return relative(self.difference, self.ours)

    @property
    def where(self) -> tuple[int, ...]:
        """The element that differs most; one that is no number before all others."""
        size = np.abs(self.difference)
        flat = int(np.argmax(np.where(np.isnan(size), np.inf, size)))
        return tuple(map(int, np.unravel_index(flat, size.shape)))

    @property
    def verdict(self) -> str:
        return "right" if self.right else "MISSING" if self.theirs is None else f"WRONG{self.note}"


@dataclass
class Comparison:
    """All that is to be said of a file. `hints`: lines on the first wrong tensor; `known`: mistakes like it."""

    name: str
    file: str
    beside: str
    functions: list[str] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)
    known: list[str] = field(default_factory=list)
    spelled: str = ""

    @property
    def right(self) -> bool:
        return not self.changed and all(tensor.right for tensor in self.tensors)

    @property
    def first_wrong(self) -> Tensor | None:
        """The first tensor that came and is not what it should be."""
        return next((tensor for tensor in self.tensors if not tensor.right and tensor.theirs is not None), None)

    @property
    def verdict(self) -> str:
        parts = []
        for word, chosen in (
            ("wrong", [tensor.name for tensor in self.tensors if not tensor.right and tensor.theirs is not None]),
            ("missing", [tensor.name for tensor in self.tensors if tensor.theirs is None]),
            ("changed, though an input is somebody else's", self.changed),
        ):
            parts += [f"{word}: {', '.join(chosen)}"] if chosen else []
        return "; ".join(parts) or f"right: {', '.join(tensor.name for tensor in self.tensors)}"


def compare(given: Problem, file: str) -> Comparison:
    """Run the file's functions on a problem's arguments. UserError where the file, or what it returns, is of no use."""
    theirs = Theirs(file)
    comparison = Comparison(given.row.name, file, f"reference/{given.row.layer}.py")
    if theirs.forward is not None:
        given = theirs.take(given, comparison.notes)
    step = step_of(given)
    copies = {name: np.array(x) for name, x in given.arguments.items() if isinstance(x, np.ndarray)}
    saved: Any = step.saved
    if theirs.forward is not None:
        comparison.functions.append(f"forward({', '.join(theirs.taken)})")
        y, saved = theirs.run_forward({**given.arguments, **copies})
        comparison.tensors.append(Tensor(step.result, step.y, y))
        comparison.changed += [f"{name} by forward" for name in _changed(copies, given)]
    if theirs.backward is not None:
        comparison.functions.append("backward(dy, saved)")
        if theirs.forward is None:
            comparison.notes.append(f"saved is what the forward of {comparison.beside} saves")
            _, saved = hints.layer_of(step.operation).forward(**{**given.arguments, **copies})
        dy, before = np.array(step.dy), _changed(copies, given)
        gradients = theirs.run_backward(dy if dy.ndim else dy[()], saved, step, given.row.gradients)
        comparison.tensors += [Tensor(f"d{name}", step.gradients[name], x) for name, x in gradients.items()]
        changed = [name for name in _changed(copies, given) if name not in before]
        changed += [] if np.array_equal(dy, step.dy) else [f"d{step.result}"]
        comparison.changed += [f"{name} by backward" for name in changed]
    _explain(comparison, theirs, given, step)
    return comparison


def _changed(copies: Mapping[str, np.ndarray], given: Problem) -> list[str]:
    return [name for name, x in copies.items() if not np.array_equal(x, given.arguments[name])]


class Theirs:
    """The functions of a file, and how its forward wants its arguments."""

    def __init__(self, file: str) -> None:
        self.file = file
        module = load_module("yours", file)
        self.forward, self.backward = (self._function(module, name) for name in ("forward", "backward"))
        self.taken: tuple[str, ...] = ()  # the arguments that forward takes, in its order
        self.names: dict[str, str] | None = None  # theirs, where they are ours; else arguments are given in order
        if self.forward is None and self.backward is None:
            raise UserError(f"yours: {file} has neither a function forward nor a function backward")

    def _function(self, module: Any, name: str) -> Callable[..., Any] | None:
        found = getattr(module, name, None)
        if found is not None and not callable(found):
            raise UserError(f"yours: {self.file}: {name} is {type(found).__name__}, expected a function")
        return found

    def take(self, given: Problem, notes: list[str]) -> Problem:
        """The problem with our defaults for what their forward does not take. UserError where it takes too little."""
        assert self.forward is not None
        ours = list(given.arguments)
        try:
            parameters = list(inspect.signature(self.forward).parameters.values())
        except (TypeError, ValueError):
            parameters = [inspect.Parameter("arguments", inspect.Parameter.VAR_POSITIONAL)]
        named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        required = [p.name for p in parameters if p.name in named and p.default is p.empty]
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            self.taken, self.names = tuple(ours), {name: name for name in ours}
        elif any(p.kind is p.VAR_POSITIONAL for p in parameters):
            self.taken = tuple(ours)
        elif set(required) <= set(ours) and set(named) & set(ours):
            self.taken = tuple(name for name in named if name in ours)
            self.names = {name: name for name in self.taken}
        else:
            count = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
            self.taken = tuple(ours[:count])
        defaults: dict[str, Any] = {}
        our_parameters = inspect.signature(given.row.twin().forward).parameters
        for name in ours:
            if name not in self.taken and given.arguments[name] is not None:
                defaults[name] = our_parameters[name].default
                if defaults[name] is inspect.Parameter.empty:
                    expected = ", ".join(ours)
                    raise UserError(f"yours: {self.file}: forward takes no {name}, expected forward({expected})")
                if defaults[name] != given.arguments[name]:
                    notes.append(f"forward takes no {name}: it is the reference's default here, {defaults[name]}")
        return given.replace(**defaults)

    def run_forward(self, arguments: Mapping[str, Any]) -> tuple[np.ndarray, Any]:
        """Their result and what they save."""
        assert self.forward is not None
        values = {name: arguments[name] for name in self.taken}
        if self.names is not None:
            returned = self._run("forward", self.forward, **values)
        else:
            returned = self._run("forward", self.forward, *values.values())
        if isinstance(returned, tuple | list) and len(returned) == 2:
            return self._array("the result", returned[0]), returned[1]
        if self.backward is not None:
            raise UserError(f"yours: {self.file}: forward returned {_kind(returned)}, expected a pair: result, saved")
        return self._array("the result", returned), None

    def run_backward(self, dy: Any, saved: Any, step: Step, arguments: tuple[str, ...]) -> dict[str, np.ndarray | None]:
        """Their gradients by argument; None for one that they have not got."""
        assert self.backward is not None
        returned = self._run("backward", self.backward, dy, saved)
        expected = tuple(name for name in arguments if name in step.gradients)
        if isinstance(returned, Mapping):
            found = {name: returned.get(f"d{name}", returned.get(name)) for name in expected}
        else:
            values = list(returned) if isinstance(returned, tuple | list) else [returned]
            names = arguments if len(values) == len(arguments) else expected
            if len(values) != len(names):
                wanted = ", ".join(f"d{name}" for name in expected)
                raise UserError(
                    f"yours: {self.file}: backward returned {len(values)} gradients, expected {len(expected)}: {wanted}"
                )
            found = {name: x for name, x in zip(names, values, strict=True) if name in expected}
        return {name: None if x is None else self._array(f"d{name}", x) for name, x in found.items()}

    def _run(self, name: str, function: Callable[..., Any], *values: Any, **named: Any) -> Any:
        try:
            with np.errstate(all="ignore"):
                return function(*values, **named)
        except (Exception, SystemExit) as error:
            line = line_in(self.file, error)
            at = f", line {line}" if line else ""
            message = f"{type(error).__name__}: {error}".removesuffix(": ")
            raise UserError(f"yours: {self.file}{at}: {name} raised {message}") from error

    def _array(self, name: str, value: Any) -> np.ndarray:
        try:
            array = np.array(value)
        except Exception:
            array = np.array(None)
        if array.dtype.kind not in "fiub":
            raise UserError(f"yours: {self.file}: {name} is {_kind(value)}, expected an array of numbers")
        return array if array.dtype.kind == "f" else array.astype(np.float64)


def _kind(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"an array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__


def _explain(comparison: Comparison, theirs: Theirs, given: Problem, step: Step) -> None:
    """Say of the first wrong tensor what it may come from, and of gradients whether they fit a wrong forward pass."""
    wrong = comparison.first_wrong
    if wrong is None:
        return
    assert wrong.theirs is not None
    others = {t.name: t.theirs for t in comparison.tensors if t.theirs is not None and not t.right}
    comparison.hints = hints.explain(step, wrong.name, others)
    comparison.known = hints.known_mistakes(given, wrong.name, wrong.theirs)
    equations = {e.tensor: e for e in (*step.derivation.forward, *step.derivation.backward)}
    if wrong.comparable:
        comparison.spelled = f"expected: {spelled(equations[wrong.name], step, wrong.where)}"
    if wrong.name == step.result and theirs.backward is not None:
        for tensor in comparison.tensors[1:]:
            if tensor.comparable and not tensor.right and fits_forward(theirs, given, tensor):
                tensor.note = ", though it is the gradient of your forward"


def fits_forward(theirs: Theirs, given: Problem, tensor: Tensor) -> bool:
    """Whether a gradient of theirs is that of their own forward, by central differences."""
    assert tensor.theirs is not None
    name = tensor.name[1:]

    def weighed(value: np.ndarray) -> float:
        copies = {key: np.array(x) if isinstance(x, np.ndarray) else x for key, x in given.arguments.items()}
        y, _ = theirs.run_forward({**copies, name: np.array(value)})
        return float(np.sum(given.upstream()[0] * y))

    true = numeric_gradient(weighed, given.arguments[name], given.step())
    return relative(tensor.theirs - true, true) <= DIFFERENCES
