"""Every single change of an equation that a mistake may have made: what hints try, one after another."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from gpt.study.equations import FUNCTIONS, Equation
from gpt.study.notation import COMPARISONS, Plain, write
from gpt.study.record import Step

__all__ = ["all_sizes", "changes", "everywhere", "put", "values_in"]

Tree = list[Any]
LEAVES = ("number", "index", "name", "tensor")


def changes(equation: Equation, step: Step) -> Iterator[tuple[str, Equation]]:
    """Each change in words, and the equation that it makes; what is there twice comes after what is missing."""
    found = [
        (words, put(equation.tree, path, new))
        for path, node in values_in(equation.tree)
        for words, new in _changes_of(node, step)
    ]
    for words, tree in sorted(found, key=lambda change: "twice" in change[0]):
        yield words, equation.with_tree(tree)


def everywhere(step: Step) -> Iterator[tuple[str, dict[str, Equation]]]:
    """What was changed wherever it stands in a pass, as a mask is that several equations have: in words, and the
    equations that it makes by the tensors that they define."""
    derivation = step.derivation
    for equations in (derivation.forward, derivation.backward, (*derivation.forward, *derivation.backward)):
        parts = {str(node): node for equation in equations for _, node in values_in(equation.tree)}
        for node in parts.values():
            changed = list(_changes_of(node, step)) if node[0] in (*COMPARISONS, "name") else []
            if node[0] in (*COMPARISONS, "tensor"):
                changed.insert(0, (f"without {write(node, Plain())}", ["number", 1]))
            for words, new in changed:
                found = {
                    equation.tensor: equation.with_tree(_replaced(equation.tree, node, new))
                    for equation in equations
                    if any(part == node for _, part in values_in(equation.tree))
                }
                if len(found) > 1:
                    yield f"{words}, in all of {', '.join(found)}", found


def _replaced(tree: Tree, old: Tree, new: Tree) -> Tree:
    """A tree with a part exchanged wherever it stands. A factor of 1 is not written."""
    if tree == old:
        return new
    if tree[0] in LEAVES:
        return tree
    if tree[0] in ("sum", "max"):
        return [tree[0], tree[1], _replaced(tree[2], old, new)]
    kind, *parts = [tree[0], *(_replaced(part, old, new) for part in tree[1:])]
    one = ["number", 1]
    if kind == "where" and parts[0] == one:
        return parts[1]
    if kind == "*" and one in parts:
        return parts[1] if parts[0] == one else parts[0]
    return [kind, *parts]


def values_in(tree: Tree, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Tree]]:
    """Every part of a tree that is a value, not an index, with the way to it."""
    yield path, tree
    if tree[0] in ("sum", "max"):
        yield from values_in(tree[2], (*path, 2))
    elif tree[0] not in LEAVES:
        for i, part in enumerate(tree[1:], 1):
            yield from values_in(part, (*path, i))


def all_sizes(step: Step) -> dict[str, int]:
    """How far each letter runs in a layer's equations."""
    sizes: dict[str, int] = {}
    for equation in (*step.derivation.forward, *step.derivation.backward):
        sizes |= equation.sizes(step.values)
    return sizes


def put(tree: Tree, path: tuple[int, ...], new: Tree) -> Tree:
    """A tree with another part at the end of a way."""
    if not path:
        return new
    return [put(part, path[1:], new) if i == path[0] else part for i, part in enumerate(tree)]


def _changes_of(node: Tree, step: Step) -> Iterator[tuple[str, Tree]]:
    """What may have become of a part."""
    kind, *parts = node
    texts = [] if kind in (*LEAVES, "sum", "max") else [write(part, Plain()) for part in parts]
    if kind == "+":
        yield f"without {texts[1]}", parts[0]
        yield f"without {texts[0]}", parts[1]
        yield f"with the wrong sign of {texts[1]}", ["-", *parts]
    elif kind == "-":
        yield f"without {texts[1]}", parts[0]
        yield f"without {texts[0]}", ["neg", parts[1]]
        yield f"with the wrong sign of {texts[1]}", ["+", *parts]
    elif kind == "neg":
        yield f"with the wrong sign of {texts[0]}", parts[0]
    elif kind == "*":
        for i in (0, 1):
            what = "the condition" if parts[i][0] in COMPARISONS else "the factor"
            yield f"without {what} {texts[i]}", parts[1 - i]
        for i in (0, 1):
            if parts[i][0] not in COMPARISONS:
                yield f"with the factor {texts[i]} twice", ["*", node, parts[i]]
    elif kind == "/":
        yield f"not divided by {texts[1]}", parts[0]
        yield f"multiplied with {texts[1]} instead of divided", ["*", *parts]
        yield f"divided by {texts[1]} twice", ["/", node, parts[1]]
    elif kind == "**":
        yield f"with {texts[0]} in place of its power", parts[0]
    elif kind in FUNCTIONS:
        yield f"without the {kind}", parts[0]
    elif kind == "where":
        yield f"without the condition {texts[0]}", parts[1]
        yield "with the two cases of a condition swapped", ["where", parts[0], parts[2], parts[1]]
    elif kind in ("<=", "<"):
        strict = "<" if kind == "<=" else "<="
        yield f"with {kind} taken for {strict}", [strict, *parts]
        yield "with the condition off by one", [kind, ["-", parts[0], ["number", 1]], parts[1]]
        yield "with the condition turned around", [">=" if kind == "<=" else ">", *parts]
    elif kind == "sum":
        yield from _other_sums(node, step)
    elif kind == "name":
        yield from _other_numbers(node, step)
    elif kind == "tensor":
        yield from _other_tensors(node, step)


def _other_sums(node: Tree, step: Step) -> Iterator[tuple[str, Tree]]:
    """A mean for a sum; the first or the last term of one of its letters alone."""
    _, letters, over = node
    for letter in letters:
        rest = [other for other in letters if other != letter]
        for place, word in ((0, "first"), (-1, "last")):
            inner = _at(over, letter, place, step)
            yield f"of the sum over {letter} the {word} term alone", ["sum", rest, inner] if rest else inner
    for letter in letters:
        yield f"with the mean over {letter} in place of the sum", ["/", node, ["number", all_sizes(step)[letter]]]
    yield "with the largest term in place of the sum", ["max", letters, over]


def _at(tree: Tree, letter: str, place: int, step: Step) -> Tree:
    """A tree with a letter fixed at its first or last place."""
    value = 0 if place == 0 else all_sizes(step)[letter] - 1

    def fixed(part: Any) -> Any:
        if isinstance(part, list):
            return ["number", value] if part == ["index", letter] else [fixed(p) for p in part]
        return part

    return fixed(tree)


def _other_numbers(node: Tree, step: Step) -> Iterator[tuple[str, Tree]]:
    """One less or one more of a count; the square, the root and the inverse of another number."""
    name = write(node, Plain())
    value = step.values[node[1]]
    if float(value).is_integer():
        yield f"with {name} - 1 in place of {name}", ["-", node, ["number", 1]]
        yield f"with {name} + 1 in place of {name}", ["+", node, ["number", 1]]
        for letter, size in all_sizes(step).items():
            yield f"with the number of {letter} in place of {name}", ["number", size]
        sizes = list(all_sizes(step).items())
        for (a, n), (b, m) in itertools.combinations(sizes, 2):
            yield f"with the number of {a} and {b} in place of {name}", ["number", n * m]
    else:
        yield f"with 1/{name} in place of {name}", ["/", ["number", 1], node]
        yield f"with {name}² in place of {name}", ["**", node, ["number", 2]]
        if float(value) > 0:
            yield f"with the root of {name} in place of {name}", ["sqrt", node]
    yield f"with 0 in place of {name}", ["number", 0]
    yield f"with 1 in place of {name}", ["number", 1]


def _other_tensors(node: Tree, step: Step) -> Iterator[tuple[str, Tree]]:
    """Two of its axes swapped; another tensor of this shape in its place."""
    _, name, indices = node
    shape = np.shape(step.values[name])
    for i, j in itertools.combinations(range(len(indices)), 2):
        if shape[i] == shape[j]:
            new = ["tensor", name, [indices[j if k == i else i if k == j else k] for k in range(len(indices))]]
            yield f"with {write(new, Plain())} in place of {write(node, Plain())}", new
    for other, value in step.values.items():
        if other != name and isinstance(value, np.ndarray) and value.shape == shape and value.dtype.kind == "f":
            new = ["tensor", other, indices]
            yield f"with {write(new, Plain())} in place of {write(node, Plain())}", new
