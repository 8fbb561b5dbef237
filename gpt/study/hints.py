"""What may be missing in a wrong tensor: mistakes are made in the layer's own equations until the numbers agree.

The simplest come first: the right numbers in another shape or order, with another sign, times a factor, summed too
little or too much. Then the equation's terms, each left out, turned around or counted twice; and then every single
change of this equation, or of one that leads to it: a factor, a condition, an exponent left out, a mean for a sum, one
tensor taken for another. Numbers that agree in every digit leave little doubt, though there may be another way to them.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from gpt.parity.laws import relative
from gpt.parity.ops import Problem
from gpt.study.changes import all_sizes, changes, everywhere, put, values_in
from gpt.study.equations import Equation
from gpt.study.notation import Plain, write
from gpt.study.record import Step, layer_of

__all__ = ["explain", "known_mistakes", "layer_of", "recomputed", "same"]

CLOSE = 1e-9  # of the largest entry, in float64: not the rounding, the algebra is looked at
SINGLE = 1e-5
MOST_TERMS = 4
Tree = list[Any]


def same(theirs: np.ndarray, ours: np.ndarray, bound: float = CLOSE) -> bool:
    """Whether arrays of one shape agree, in the digits that algebra decides. NaN is never the same."""
    if theirs.shape != ours.shape:
        return False
    size = float(np.max(np.abs(ours), initial=0.0))
    return bool(relative(theirs - ours, size if size else 1.0) <= bound)


def explain(step: Step, name: str, theirs: Mapping[str, np.ndarray]) -> list[str]:
    """What is wrong with the tensor `name`, in words; `theirs` has all that are wrong."""
    equations = {e.tensor: e for e in (*step.derivation.forward, *step.derivation.backward)}
    equation, true, got = equations[name], np.asarray(step.values[name]), theirs[name]
    letters = equation.indices
    if not np.isfinite(got).all():
        return _not_finite(name, got)
    if got.shape != true.shape:
        return _of_shape(name, true, got, letters)
    if got.dtype != np.float64 and same(got, true, SINGLE):
        return [f"{name} is right in the digits of {got.dtype}: arguments are float64, and so should it be"]
    for search in (_moved, _scaled, _summed):
        if found := search(step, equation, true, got):
            return [found]
    with np.errstate(all="ignore"):
        if found := _terms(step, equation, got):
            return [found, f"expected  {equation.plain}"]
        if lines := _picked(step, equation, got) or _changed(step, equation, theirs):
            return lines
    return [*_located(name, true, got, letters), f"expected  {equation.plain}"]


def _not_finite(name: str, got: np.ndarray) -> list[str]:
    count, kind = np.count_nonzero(~np.isfinite(got)), "NaN" if np.isnan(got).any() else "infinite"
    first = tuple(map(int, np.argwhere(~np.isfinite(got))[0]))
    place = f"[{','.join(map(str, first))}]" if first else ""
    return [f"{count} of {got.size} elements of {name} are {kind}, the first {name}{place}: 0 / 0, or an overflow"]


def _of_shape(name: str, true: np.ndarray, got: np.ndarray, letters: tuple[str, ...]) -> list[str]:
    """The right numbers in another shape; or else the shape alone."""
    for axes in itertools.permutations(range(got.ndim)):
        if same(got.transpose(axes), true):
            order = ", ".join(letters[axes.index(axis)] for axis in range(got.ndim))
            return [f"{name} is transposed: its axes are {order}, expected {', '.join(letters)}"]
    for count in range(1, got.ndim + 1):
        for over in itertools.combinations(range(got.ndim), count):
            for keep in (False, True):
                if same(got.sum(axis=over, keepdims=keep), true):
                    axes_text = _axes(over)
                    return [
                        f"{name} is not summed over all that it is a sum over: summed over {axes_text}, it is right"
                    ]
    for count in range(1, true.ndim + 1):
        for over in itertools.combinations(range(true.ndim), count):
            for keep in (False, True):
                for reduce, word in ((np.sum, "summed over"), (np.mean, "the mean over")):
                    if same(got, reduce(true, axis=over, keepdims=keep)):
                        return [
                            f"{name} is {word} {', '.join(letters[axis] for axis in over)} too, which it must not be"
                        ]
    if got.size == true.size and same(got.reshape(true.shape), true):
        return [f"{name} has the right numbers in shape {got.shape}, expected {true.shape}"]
    return [f"{name} has shape {got.shape}, expected {true.shape}: a number for each {', '.join(letters) or 'loss'}"]


def _axes(axes: tuple[int, ...]) -> str:
    return ("axis " if len(axes) == 1 else "axes ") + " and ".join(map(str, axes))


def _moved(step: Step, equation: Equation, true: np.ndarray, got: np.ndarray) -> str:
    """The right numbers in other places."""
    name, letters = equation.tensor, equation.indices
    for axes in itertools.permutations(range(true.ndim)):
        if axes != tuple(range(true.ndim)) and same(got.transpose(axes), true):
            swapped = ", ".join(letters[axis] for axis in axes)
            return f"{name} is transposed: its axes are {swapped}, expected {', '.join(letters)}"
    for axis, letter in enumerate(letters):
        for by in range(1, true.shape[axis]):
            if same(np.roll(got, by, axis), true):
                return f"{name} is shifted along {letter}, by {min(by, true.shape[axis] - by)}"
        if true.shape[axis] > 1 and same(np.flip(got, axis), true):
            return f"{name} is reversed along {letter}"
    return ""


def _scaled(step: Step, equation: Equation, true: np.ndarray, got: np.ndarray) -> str:
    """The right numbers times one factor."""
    norm = float(np.sum(true * true))
    if not norm or true.size == 1:
        factor = float(got.flat[0] / true.flat[0]) if norm else 0.0
    else:
        factor = float(np.sum(got * true)) / norm
    if not norm or not same(got, factor * true) or abs(factor) < CLOSE:
        return ""
    if math.isclose(factor, -1, rel_tol=CLOSE):
        return f"{equation.tensor} has the wrong sign"
    names = _names_of(abs(factor), step, equation)
    sign = "minus " if factor < 0 else ""
    if not names and true.size == 1:
        return ""  # any two numbers have a quotient
    return f"{equation.tensor} is {sign}{names or f'{abs(factor):.6g}'} times what it should be"


def _names_of(factor: float, step: Step, equation: Equation) -> str:
    """What a factor may be, by name: the layer's own numbers first, then small ones, then the sizes of axes."""
    equations = (*step.derivation.forward, *step.derivation.backward)
    names = {node[1] for e in equations for _, node in values_in(e.tree) if node[0] == "name"}
    own = {name: abs(float(step.values[name])) for name in sorted(names)}
    own |= {"(1 - rate)": 1 - own["rate"]} if "rate" in own else {}
    sizes = [(letter, float(size)) for letter, size in all_sizes(step).items()]
    counts = {f"(the number of {letter})": size for letter, size in sizes}
    counts |= {f"(the number of {a} and {b})": n * m for (a, n), (b, m) in itertools.combinations(sizes, 2)}
    small = {str(number): float(number) for number in (2, 3, 4, 6, 8)}
    forms: dict[str, float] = {}
    for known in (own, small, counts):
        known = {name: value for name, value in known.items() if value not in (0, 1)}
        forms |= known | {f"1/{name}": 1 / value for name, value in known.items()}
        if known is not small:
            roots = {f"sqrt({name.strip('()')})": math.sqrt(value) for name, value in known.items()}
            squares = {f"{name}²": value**2 for name, value in known.items()}
            forms |= roots | squares | {f"1/{name}": 1 / value for name, value in (roots | squares).items()}
    found = [name for name, value in forms.items() if math.isclose(factor, value, rel_tol=CLOSE)]
    return " or ".join(found[:2])


def _summed(step: Step, equation: Equation, true: np.ndarray, got: np.ndarray) -> str:
    """A sum, or a mean, over an axis of the result, handed out to all of that axis."""
    for count in range(1, true.ndim + 1):
        for over in itertools.combinations(range(true.ndim), count):
            for reduce, word in ((np.sum, "summed"), (np.mean, "averaged")):
                if same(got, np.broadcast_to(reduce(true, axis=over, keepdims=True), true.shape)):
                    return f"{equation.tensor} is {word} over {', '.join(equation.indices[a] for a in over)} as well"
    return ""


def _terms(step: Step, equation: Equation, got: np.ndarray) -> str:
    """The equation's terms, each as it is, left out, turned around or twice."""
    for multiplied_out in (False, True):
        terms = list(_additive(equation.tree, 1, multiplied_out))
        if 2 <= len(terms) <= MOST_TERMS and (found := _of_terms(equation, terms, step, got)):
            return found
    return ""


def _of_terms(equation: Equation, terms: list[tuple[int, Tree]], step: Step, got: np.ndarray) -> str:
    values = [equation.with_tree(tree).evaluate(step.values) for _, tree in terms]
    choices = sorted(itertools.product((1, 0, -1, 2), repeat=len(terms)), key=lambda c: sum(x != 1 for x in c))
    for chosen in choices[1:]:
        total = sum(sign * times * value for (sign, _), times, value in zip(terms, chosen, values, strict=True))
        if same(got, np.asarray(total)):
            parts = []
            for times, word in ((0, "without"), (-1, "with the wrong sign of"), (2, "with twice")):
                texts = [write(tree, Plain()) for (_, tree), here in zip(terms, chosen, strict=True) if here == times]
                parts += [f"{word} {' and '.join(texts)}"] if texts else []
            return f"{equation.tensor} is {', and '.join(parts)}"
    return ""


def _additive(tree: Tree, sign: int, multiplied_out: bool) -> Iterator[tuple[int, Tree]]:
    """The terms of a sum, with their signs; if so asked, also those of a sum that is a factor, or is divided."""
    kind, *parts = tree
    if kind in ("+", "-"):
        yield from _additive(parts[0], sign, multiplied_out)
        yield from _additive(parts[1], sign if kind == "+" else -sign, multiplied_out)
    elif kind == "neg":
        yield from _additive(parts[0], -sign, multiplied_out)
    elif kind == "*" and multiplied_out:
        for (s, a), (r, b) in itertools.product(*(list(_additive(part, 1, True)) for part in parts)):
            yield sign * s * r, b if a == ["number", 1] else a if b == ["number", 1] else ["*", a, b]
    elif kind == "/" and multiplied_out:
        for s, a in _additive(parts[0], sign, True):
            yield s, ["/", a, parts[1]]
    else:
        yield sign, tree


def _picked(step: Step, equation: Equation, got: np.ndarray) -> list[str]:
    """One of the terms that should be added up, of each sum or of its letters: the first that counts, or the last."""
    for path, node in values_in(equation.tree):
        if node[0] != "sum":
            continue
        letters, indices = node[1], [*equation.indices, *node[1]]
        terms = (
            Equation(f"terms[{','.join(indices)}] = 0")
            .with_tree(node[2])
            .evaluate({**step.values, "terms": np.empty([all_sizes(step)[letter] for letter in indices])})
        )
        rank = len(equation.indices)
        for count in range(1, len(letters) + 1):
            for chosen in itertools.combinations(range(len(letters)), count):
                summed = tuple(rank + i for i in range(len(letters)) if i not in chosen)
                shape = (*terms.shape[:rank], math.prod(terms.shape[rank + i] for i in chosen))
                flat = terms.sum(axis=summed).reshape(shape)
                for word, order in (("first", flat), ("last", flat[..., ::-1])):
                    place = np.argmax(order != 0, axis=-1)[..., None]
                    one = np.take_along_axis(order, place, axis=-1)[..., 0]
                    new: Tree = ["tensor", "one", [["index", letter] for letter in equation.indices]]
                    made = equation.with_tree(put(equation.tree, path, new if rank else ["name", "one"]))
                    if same(got, made.evaluate({**step.values, "one": one})):
                        over = ", ".join(letters[i] for i in chosen)
                        lines = [f"{equation.tensor} has of the sum over {over} the {word} term that counts, alone"]
                        return [*lines, f"expected  {equation.plain}"]
    return []


def _changed(step: Step, equation: Equation, theirs: Mapping[str, np.ndarray]) -> list[str]:
    """The change, of one equation or of a part wherever it stands, that explains most of what is wrong."""
    best: tuple[int, list[str]] = (0, [])
    for words, changed in _candidates(step, equation):
        values = recomputed(step, changed, {*theirs})
        if equation.tensor not in values or not same(theirs[equation.tensor], values[equation.tensor]):
            continue
        explained = sum(name in values and same(array, values[name]) for name, array in theirs.items())
        if explained > best[0]:
            expected = {e.tensor: e for e in (*step.derivation.forward, *step.derivation.backward)}
            which = ", ".join(theirs) if explained == len(theirs) else equation.tensor
            lines = [f"{which}: the same numbers as {words}"]
            for name, new in changed.items():
                lines += [f"as if     {new.plain}", f"expected  {expected[name].plain}"]
            best = explained, lines
        if explained == len(theirs):
            break
    return best[1]


def _candidates(step: Step, equation: Equation) -> Iterator[tuple[str, dict[str, Equation]]]:
    order = (*step.derivation.forward, *step.derivation.backward)
    for other in (equation, *reversed(order[: order.index(equation)])):
        for words, changed in changes(other, step):
            yield words, {other.tensor: changed}
    yield from everywhere(step)


def recomputed(step: Step, changed: Mapping[str, Equation], wanted: set[str]) -> dict[str, np.ndarray]:
    """The wanted tensors after equations have changed, of those that depend on them."""
    values, found = dict(step.values), dict[str, np.ndarray]()
    for equation in (*step.derivation.forward, *step.derivation.backward):
        if equation.tensor not in changed and not found.keys() & set(equation.reads):
            continue
        try:
            tensor = changed.get(equation.tensor, equation).evaluate(values)
        except (ValueError, KeyError):  # a change that makes no sense
            return {}
        values[equation.tensor] = found[equation.tensor] = tensor
    return {name: found[name] for name in found.keys() & wanted}


def _located(name: str, true: np.ndarray, got: np.ndarray, letters: tuple[str, ...]) -> list[str]:
    """Where it is wrong, if it is not wrong everywhere."""
    size = float(np.max(np.abs(true), initial=0.0)) or 1.0
    wrong = np.abs(got - true) > CLOSE * size
    count = np.count_nonzero(wrong)
    lines = [f"{count} of {true.size} elements of {name} are wrong"]
    for axis, letter in enumerate(letters):
        others = tuple(a for a in range(true.ndim) if a != axis)
        places = np.flatnonzero(wrong.any(axis=others)).tolist()
        if len(places) < true.shape[axis]:
            lines[0] += f", only where {letter} is {', '.join(map(str, places))}"
    return lines


def known_mistakes(given: Problem, name: str, theirs: np.ndarray) -> list[str]:
    """The check's known mistakes in this layer that give these numbers, each with its line."""
    from gpt.parity.defects import DEFECTS

    lines: list[str] = []
    for defect in DEFECTS:
        if defect.module != given.row.layer:
            continue
        try:
            with defect.seeded(), np.errstate(all="ignore"):
                found = given.run()
        except Exception:  # a mistake that does not run on these arguments is not theirs
            continue
        if name in found and same(theirs, np.asarray(found[name])):
            source = inspect.getsource(given.row.twin())
            line = source[: source.index(defect.old.strip())].count("\n") + 1
            lines.append(f'the same numbers as "{defect.name}" ({defect.file}, line {line})')
            lines += [f"  - {part.strip()}" for part in defect.old.strip().splitlines()]
            lines += [f"  + {part.strip()}" for part in defect.new.strip().splitlines()]
    return lines
