"""Equations between tensors, element by element, that can be shown and computed from one text.

An equation is written as Python would read it, and says how one element comes from others:

    y[b,t,o] = sum(c, x[b,t,c] * weight[o,c]) + bias[o]

A single small letter that stands alone is an index; it runs over the axis of each tensor that it selects from. Other
names that stand alone are numbers. A comparison is 1 where it holds and 0 elsewhere, as in `(ids[b,t] == v) * dy[b,t]`.
`sum` and `max` take the letters that they run over and what they run over; besides them there are exp, log, sqrt, tanh,
cdf (of the normal distribution) and `where(condition, a, b)`.

The same text is evaluated as a whole, so that it can be held against what a layer computes; evaluated at one element
and spelled out in numbers; set as MathML, as LaTeX and as plain text; and handed to a page as a tree, so that the page
computes it too. A product with a comparison that does not hold is 0, whatever the other factor is.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from gpt.study.notation import ATOM, BINDING, COMPARISONS, LaTeX, MathML, Plain, Source, write
from reference.gelu import normal_cdf

__all__ = ["Equation", "Spelled"]

Values = Mapping[str, Any]  # tensors and numbers by name
Tree = list[Any]  # [kind, ...]: see `tree`

OPERATORS: dict[type, str] = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%", ast.Pow: "**",
    ast.Eq: "==", ast.NotEq: "!=", ast.LtE: "<=", ast.Lt: "<", ast.GtE: ">=", ast.Gt: ">",
}  # fmt: skip
COMPUTE: dict[str, Callable[[Any, Any], Any]] = {
    "+": np.add, "-": np.subtract, "*": np.multiply, "/": np.true_divide, "//": np.floor_divide, "%": np.mod,
    "**": np.power, "==": np.equal, "!=": np.not_equal, "<=": np.less_equal, "<": np.less, ">=": np.greater_equal,
    ">": np.greater,
}  # fmt: skip
FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "exp": np.exp, "log": np.log, "sqrt": np.sqrt, "tanh": np.tanh,
    "cdf": lambda x: normal_cdf(np.asarray(x, np.float64)),
}  # fmt: skip
NOTHING = -1e300  # what a masked element is to `max`


@dataclass
class Spelled:
    """One element, in numbers: its value, the sum that it is, and which elements of which tensors it came from."""

    value: float
    text: str
    read: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Equation:
    """See the module's docstring. A text that is no such equation raises ValueError when it is first used."""

    text: str

    @cached_property
    def tensor(self) -> str:
        """The name of what is defined."""
        return str(self._sides[0][1])

    @cached_property
    def indices(self) -> tuple[str, ...]:
        """The letters of its axes, in order; none of a number."""
        target = self._sides[0]
        return tuple(index[1] for index in target[2]) if target[0] == "tensor" else ()

    @cached_property
    def tree(self) -> Tree:
        """The right side: ["number", 2.0], ["index", "c"], ["name", "eps"], ["tensor", name, [trees of indices]],
        [operator, a, b], ["neg", a], [function, a], ["where", condition, a, b], ["sum" or "max", [letters], a]."""
        return self._sides[1]

    @cached_property
    def reads(self) -> tuple[str, ...]:
        """The names on the right, in the order in which they first appear."""
        return tuple(dict.fromkeys(node[1] for node in _walk(self.tree) if node[0] in ("tensor", "name")))

    @cached_property
    def _sides(self) -> tuple[Tree, Tree]:
        try:
            (statement,) = ast.parse(self.text.strip()).body
            assert isinstance(statement, ast.Assign)
            return _tree(statement.targets[0]), _tree(statement.value)
        except (SyntaxError, AssertionError, ValueError, TypeError) as error:
            raise ValueError(f"equation: cannot read {self.text!r}: {error}") from error

    def sizes(self, values: Values) -> dict[str, int]:
        """How far each letter runs, from the shapes of the tensors that it selects from."""
        sizes: dict[str, int] = {}
        nodes = [node for node in (self._sides[0], *_walk(self.tree)) if node[0] == "tensor" and node[1] in values]
        for _, name, indices in nodes:
            shape = np.shape(values[name])
            if len(shape) != len(indices):
                raise ValueError(f"{name}: has shape {shape}, and {len(indices)} indices in {self.text!r}")
            for index, size in zip(indices, shape, strict=True):
                if index[0] == "index" and sizes.setdefault(index[1], size) != size:
                    raise ValueError(f"{name}: {index[1]} runs over {size}, elsewhere over {sizes[index[1]]}")
        return sizes

    def evaluate(self, values: Values) -> np.ndarray:
        """The whole tensor. `values` may hold it, to say its shape where the right side does not."""
        sizes = self.sizes(values)
        letters = [*self.indices, *sorted(set(sizes) - set(self.indices))]
        ranges = {
            letter: np.arange(sizes[letter]).reshape([-1 if other == letter else 1 for other in letters])
            for letter in letters
        }
        axes = {letter: axis for axis, letter in enumerate(letters)}
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # where the other value is taken
            result = np.asarray(_evaluate(self.tree, values, ranges, axes))
        shape = tuple(sizes[letter] for letter in self.indices)
        if not result.ndim:
            return np.broadcast_to(result, shape).copy()
        whole = np.broadcast_to(result, (*shape, *[1] * (len(letters) - len(shape))))
        return whole.reshape(shape).copy()

    def spell(self, values: Values, index: tuple[int, ...], terms: int = 6, digits: int = 4) -> Spelled:
        """The element at `index`; of a sum at most so many terms are written, in numbers of so many digits."""
        sizes = self.sizes(values)
        spelled = Spelled(0.0, "")
        at = dict(zip(self.indices, index, strict=True))
        spelled.value, spelled.text, _ = _spell(self.tree, values, at, sizes, (terms, digits), spelled.read)
        return spelled

    def with_tree(self, tree: Tree) -> Equation:
        """The equation of the same tensor with another right side."""
        return Equation(f"{write(self._sides[0], Source())} = {write(tree, Source())}")

    @cached_property
    def mathml(self) -> str:
        """The equation as a MathML element, for a page."""
        left, right = (write(side, MathML()) for side in self._sides)
        return f'<math display="block"><mrow>{left}<mo>=</mo>{right}</mrow></math>'

    @cached_property
    def latex(self) -> str:
        """The equation as LaTeX, to stand between dollar signs."""
        left, right = (write(side, LaTeX()) for side in self._sides)
        return f"{left} = {right}"

    @cached_property
    def plain(self) -> str:
        """The equation as text in Unicode, for a terminal."""
        left, right = (write(side, Plain()) for side in self._sides)
        return f"{left} = {right}"


def _tree(node: ast.AST) -> Tree:
    match node:
        case ast.Constant(value=int() | float() as value):
            return ["number", value]
        case ast.Name(id=name):
            return ["index", name] if len(name) == 1 and name.islower() else ["name", name]
        case ast.Subscript(value=ast.Name(id=name), slice=ast.Tuple(elts=elements)):
            return ["tensor", name, [_tree(element) for element in elements]]
        case ast.Subscript(value=ast.Name(id=name), slice=element):
            return ["tensor", name, [_tree(element)]]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return ["neg", _tree(operand)]
        case ast.BinOp(left=left, op=operator, right=right):
            return [OPERATORS[type(operator)], _tree(left), _tree(right)]
        case ast.Compare(left=left, ops=[operator], comparators=[right]):
            return [OPERATORS[type(operator)], _tree(left), _tree(right)]
        case ast.Call(func=ast.Name(id="sum" | "max" as name), args=[*letters, over]) if letters:
            return [name, [_tree(letter)[1] for letter in letters], _tree(over)]
        case ast.Call(func=ast.Name(id="where"), args=[condition, a, b]):
            return ["where", _tree(condition), _tree(a), _tree(b)]
        case ast.Call(func=ast.Name(id=name), args=[argument]) if name in FUNCTIONS:
            return [name, _tree(argument)]
    raise ValueError(f"{ast.unparse(node)!r} is not part of an equation")


def _walk(tree: Tree) -> Iterable[Tree]:
    yield tree
    for part in tree[1:]:
        if isinstance(part, list):
            for subtree in [part] if part and isinstance(part[0], str) and part[0] in _KINDS else part:
                if isinstance(subtree, list):
                    yield from _walk(subtree)


_KINDS = {"number", "index", "name", "tensor", "neg", "where", "sum", "max", *COMPUTE, *FUNCTIONS}


def _evaluate(tree: Tree, values: Values, ranges: Mapping[str, np.ndarray], axes: Mapping[str, int]) -> Any:
    """Every letter has an axis of its own; `sum` leaves an axis of one, so that what is left broadcasts."""
    kind, *parts = tree
    if kind == "number":
        return parts[0]
    if kind == "index":
        return ranges[parts[0]]
    if kind == "name":
        return values[parts[0]]
    if kind == "tensor":
        array = np.asarray(values[parts[0]])
        indices = [_evaluate(index, values, ranges, axes) for index in parts[1]]
        # An index beyond the axis stands where `where` takes the other value.
        return array[tuple(np.clip(index, 0, size - 1) for index, size in zip(indices, array.shape, strict=True))]
    if kind in ("sum", "max"):
        letters, over = parts
        array = np.asarray(_evaluate(over, values, ranges, axes))
        shape = list(array.shape or [1] * len(axes))
        for letter in letters:
            shape[axes[letter]] = ranges[letter].size
        reduce = np.sum if kind == "sum" else np.max
        return reduce(np.broadcast_to(array, shape), axis=tuple(axes[letter] for letter in letters), keepdims=True)
    operands = [_evaluate(part, values, ranges, axes) for part in parts]
    if kind == "*" and any(part[0] in COMPARISONS for part in parts):
        condition, other = operands if parts[0][0] in COMPARISONS else operands[::-1]
        return np.where(condition, other, 0)
    if kind == "where":
        return np.where(*operands)
    if kind == "neg":
        return -operands[0]
    if kind in COMPARISONS:
        return COMPUTE[kind](*operands) * 1  # a number: truths do not add up
    return FUNCTIONS[kind](*operands) if kind in FUNCTIONS else COMPUTE[kind](*operands)


def _spell(
    tree: Tree,
    values: Values,
    at: dict[str, int],
    sizes: Mapping[str, int],
    form: tuple[int, int],
    read: dict[str, list[tuple[int, ...]]],
) -> tuple[float, str, float]:
    """Value, text in numbers, and how strongly the text's outermost operation binds."""
    kind, *parts = tree
    if kind == "number":
        return parts[0], f"{parts[0]:g}", ATOM
    if kind in ("index", "name"):
        value = at[parts[0]] if kind == "index" else float(values[parts[0]])
        return value, _number(value, form[1]), ATOM
    if kind == "tensor":
        array = np.asarray(values[parts[0]])
        wanted = [int(_spell(index, values, at, sizes, form, read)[0]) for index in parts[1]]
        place = tuple(min(max(i, 0), size - 1) for i, size in zip(wanted, array.shape, strict=True))
        value = array[place].item()
        places = read.setdefault(parts[0], [])
        if place not in places:
            places.append(place)
        return value, _number(value, form[1]), ATOM
    if kind in ("sum", "max"):
        return _spell_reduction(kind, parts[0], parts[1], values, at, sizes, form, read)
    if kind == "where":
        condition = _spell(parts[0], values, at, sizes, form, read)[0]
        return _spell(parts[1] if condition else parts[2], values, at, sizes, form, read)
    if kind == "*":  # what is multiplied by a condition that does not hold is not read
        conditions = [part for part in parts if part[0] in COMPARISONS]
        if any(not _spell(part, values, at, sizes, form, {})[0] for part in conditions):
            return 0.0, "0", ATOM
        if conditions:
            (other,) = [part for part in parts if part not in conditions][:1] or [["number", 1]]
            for part in conditions:
                _spell(part, values, at, sizes, form, read)
            return _spell(other, values, at, sizes, form, read)
        first = _spell(parts[0], values, at, sizes, form, read)
        if first[1] == "0":  # and so is what only multiplies a zero
            return first
        spelled = [first, _spell(parts[1], values, at, sizes, form, read)]
    else:
        spelled = [_spell(part, values, at, sizes, form, read) for part in parts]
    if kind in FUNCTIONS:
        return float(FUNCTIONS[kind](np.float64(spelled[0][0]))), f"{kind}({spelled[0][1]})", ATOM
    if kind in COMPARISONS:
        holds = int(COMPUTE[kind](spelled[0][0], spelled[1][0]))
        return holds, str(holds), ATOM
    if kind == "neg":
        return -spelled[0][0], f"-{_inside(spelled[0], 2)}", BINDING["neg"]
    (a, b), binding = spelled, BINDING[kind]
    with np.errstate(all="ignore"):
        value = float(COMPUTE[kind](np.float64(a[0]), np.float64(b[0])))
    sign = {"*": "·", "**": "^"}.get(kind, kind)
    text = f"{_inside(a, binding + (kind == '**'))} {sign} {_inside(b, binding + (kind not in '+*'))}"
    return value, text.replace(" ^ ", "^") if kind == "**" else text, binding


def _spell_reduction(
    kind: str,
    letters: list[str],
    over: Tree,
    values: Values,
    at: dict[str, int],
    sizes: Mapping[str, int],
    form: tuple[int, int],
    read: dict[str, list[tuple[int, ...]]],
) -> tuple[float, str, float]:
    terms = []
    for place in np.ndindex(*(sizes[letter] for letter in letters)):
        here = {**at, **dict(zip(letters, place, strict=True))}
        term = _spell(over, values, here, sizes, form, read)
        if (term[0] > NOTHING) if kind == "max" else (term[1] != "0"):
            terms.append(term)
    if not terms:
        return (NOTHING, f"{NOTHING:g}", BINDING["neg"]) if kind == "max" else (0.0, "0", ATOM)
    total = (_sum if kind == "sum" else max)([term[0] for term in terms])
    shown = [_inside(term, 1) for term in terms[: form[0]]]
    if rest := terms[form[0] :]:
        more = f"{len(rest)} more" + (f", together {_number(_sum([t[0] for t in rest]), form[1])}" * (kind == "sum"))
        shown.append(f"({more})")
    if kind == "max":
        return total, f"max({', '.join(shown)})", ATOM
    return total, " + ".join(shown), 1 if len(shown) > 1 else terms[0][2]


def _sum(numbers: list[float]) -> float:
    """As exact as can be; fsum knows no infinities of both signs."""
    return math.fsum(numbers) if all(map(math.isfinite, numbers)) else sum(numbers)


def _inside(part: tuple[float, str, float], binding: float) -> str:
    """A part's text, in parentheses where it binds less than what stands around it."""
    negative = part[1].startswith("-") and binding > 1
    return f"({part[1]})" if part[2] < binding or negative else part[1]


def _number(value: float, digits: int) -> str:
    return f"{value:d}" if isinstance(value, int) else f"{value + 0.0:.{digits}g}"  # -0.0 + 0.0 is 0.0
