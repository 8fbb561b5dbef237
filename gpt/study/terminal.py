"""A layer, or somebody's layer beside it, as text for a terminal."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from gpt.study.equations import Equation
from gpt.study.notation import SYMBOLS
from gpt.study.record import Step, layer_of

if TYPE_CHECKING:
    from gpt.study.layer import Check
    from gpt.study.yours import Comparison

__all__ = ["array_lines", "render_comparison", "render_layer", "write_out"]

MOST_ROWS, MOST_COLUMNS = 5, 8  # of an array's first matrix
WIDEST = 140
GAP = "   "


def write_out(text: str) -> None:
    """Print, with headings and verdicts in colour on a terminal."""
    if not sys.stdout.isatty():
        print(text)
        return
    from rich.console import Console
    from rich.text import Text

    styled = Text(text)
    styled.highlight_regex(r"(?m)^\S.*$", "bold")
    styled.highlight_regex(r"(?m)(?<=  )(WRONG|FAIL)\b.*$", "bold red")
    styled.highlight_regex(r"(?m)(?<=  )(right|holds)$", "green")
    Console(highlight=False).print(styled, soft_wrap=True)


def render_layer(step: Step, checks: Sequence[Check], width: int = 0) -> str:
    """Formulas, numbers, elements spelled out, and checks, in this order."""
    width = width or min(WIDEST, shutil.get_terminal_size((120, 24)).columns)
    derivation, values = step.derivation, step.values
    title = (layer_of(step.operation).__doc__ or "").strip().splitlines()[0]
    numbers = {name: value for name, value in values.items() if isinstance(value, int | float) or np.shape(value) == ()}
    settings = [f"{symbol(name)} = {value:.4g}" for name, value in numbers.items() if not isinstance(value, bool | str)]
    parts = [
        f"{step.name}: {title}",
        *("  with " + ", ".join(settings) for _ in settings[:1]),
        "",
        "Forward",
        *_formulas(derivation.forward),
        "",
        "Backward",
        *_formulas(derivation.backward),
        "",
        "Numbers (of each tensor the first matrix)",
        *side_by_side([array_lines(symbol(name), value) for name, value in _arrays(step)], width),
        "",
        "Elements, in numbers",
        *_elements(step),
        "",
        "Checks",
        *_checks(checks),
    ]
    return "\n".join(parts)


def _arrays(step: Step) -> list[tuple[str, np.ndarray]]:
    """All of a step's arrays: what it got, then what was computed, in order."""
    computed = [[equation.tensor for equation in part] for part in (step.derivation.forward, step.derivation.backward)]
    computed[1].insert(0, f"d{step.result}")
    names = [name for name in step.values if name not in {*computed[0], *computed[1]}]
    arrays = [(name, step.values[name]) for name in (*names, *computed[0], *computed[1])]
    return [(name, array) for name, array in arrays if isinstance(array, np.ndarray) and array.ndim]


def symbol(name: str) -> str:
    """A name as the formulas have it."""
    return SYMBOLS.get(name, name)


def _formulas(equations: Iterable[Equation]) -> list[str]:
    """One a line, their signs of equality below each other."""
    sides = [equation.plain.split(" = ", 1) for equation in equations]
    width = max(len(left) for left, _ in sides)
    return [f"  {left:>{width}} = {right}" for left, right in sides]


def _elements(step: Step) -> list[str]:
    """One of the result and one of each gradient. It stands in the middle, where no axis begins or ends."""
    lines = []
    gradients = {f"d{argument}" for argument in step.gradients}
    for equation in (*step.derivation.forward, *step.derivation.backward):
        if equation.tensor == step.result or equation.tensor in gradients:
            array = np.asarray(step.values[equation.tensor])
            index = tuple(n // 2 for n in array.shape)
            if not array[index]:  # nothing to see
                index = tuple(map(int, np.unravel_index(np.argmax(np.abs(array)), array.shape)))
            lines.append(f"  {spelled(equation, step, index)}")
    return lines


def spelled(equation: Equation, step: Step, index: tuple[int, ...]) -> str:
    """An element as the sum that it is: "y[0,1] = 2 · 3 + 1 = 7"."""
    found = equation.spell(step.values, index)
    value = f"{found.value + 0.0:.4g}"
    text = f" = {found.text}" if found.text != value else ""
    return f"{element(equation.tensor, index)}{text} = {value}"


def element(name: str, index: tuple[int, ...]) -> str:
    """An element's name: "y[0,1]", or "loss"."""
    return f"{name}[{','.join(map(str, index))}]" if index else name


def _checks(checks: Sequence[Check]) -> list[str]:
    titles = {
        "differences": "central differences of Σ dy · y, every element",
        "equations": "the equations above against the layer",
        "laws": "laws that hold for any input",
    }
    width = max(len(check.what) for check in checks)
    lines = []
    for kind, title in titles.items():
        chosen = [check for check in checks if check.kind == kind]
        if chosen:
            lines.append(f"  {title}")
        for check in chosen:
            verdict = "holds" if check.passed else "FAIL"
            lines.append(f"    {check.what:<{width}}  {check.error:.1e}  bound {check.bound:.0e}  {verdict}")
    return lines


def array_lines(name: str, array: np.ndarray, at: tuple[int, ...] = (), digits: int = 4) -> list[str]:
    """A name with its shape, and below it the array's first matrix, or the one `at` a place, cut where it is large."""
    array = np.asarray(array)
    at = at or (0,) * len(array.shape[:-2])
    matrix = array[at]
    head = f"{element(name, at)} {shape_text(array.shape)}" if array.ndim else name
    rows = matrix.reshape(1, -1) if matrix.ndim < 2 else matrix
    cells = [[_number(x, digits) for x in row[:MOST_COLUMNS]] for row in rows[:MOST_ROWS]]
    width = max((len(cell) for row in cells for cell in row), default=0)
    more = " …" if rows.shape[1] > MOST_COLUMNS else ""
    lines = [" ".join(f"{cell:>{width}}" for cell in row) + more for row in cells]
    return [head, *lines, *["…"] * (len(rows) > MOST_ROWS)]


def shape_text(shape: tuple[int, ...]) -> str:
    """(2, 3) as "2×3"."""
    return "×".join(map(str, shape)) if shape else "a number"


def _number(x: np.generic, digits: int) -> str:
    if isinstance(x, np.integer):
        return str(int(x))
    return f"{float(x) + 0.0:.{digits}g}"


def side_by_side(blocks: Sequence[list[str]], width: int) -> list[str]:
    """Blocks of lines beside each other as far as they fit, then below."""
    lines: list[str] = []
    row: list[list[str]] = []

    def end_row() -> None:
        widths = [max(map(len, block)) for block in row]
        for i in range(max(map(len, row))):
            cells = [block[i] if i < len(block) else "" for block in row]
            lines.append("  " + GAP.join(f"{c:<{w}}" for c, w in zip(cells, widths, strict=True)).rstrip())
        lines.append("")
        row.clear()

    for block in blocks:
        used = 2 + sum(max(map(len, other)) + len(GAP) for other in row)
        if row and used + max(map(len, block)) > width:
            end_row()
        row.append(block)
    if row:
        end_row()
    return lines[:-1]


def render_comparison(comparison: Comparison, width: int = 0) -> str:
    """Each tensor's largest difference, the first wrong one beside what was expected, and what it may come from."""
    width = width or min(WIDEST, shutil.get_terminal_size((120, 24)).columns)
    lines = [f"{comparison.name} in {comparison.file}: {', '.join(comparison.functions)}, beside {comparison.beside}"]
    lines += [f"  {note}" for note in comparison.notes]
    rows = [["tensor", "expected shape", "largest difference", "where", "yours", "expected", ""]]
    for tensor in comparison.tensors:
        error, *at = "", "", "", ""
        if tensor.comparable:
            error = f"{tensor.error:.1e}"
        elif tensor.theirs is not None:
            error = f"{shape_text(tensor.theirs.shape)} came"
        if tensor.comparable and tensor.theirs is not None and not tensor.right:
            index = tensor.where
            at = [element(tensor.name, index), *(_number(a[index], 6) for a in (tensor.theirs, tensor.ours))]
        rows.append([tensor.name, shape_text(tensor.ours.shape), error, *at, tensor.verdict])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += ["", *("  " + "  ".join(f"{c:<{w}}" for c, w in zip(r, widths, strict=True)).rstrip() for r in rows)]
    wrong = comparison.first_wrong
    if wrong is not None and wrong.theirs is not None:
        matrix = wrong.where[:-2] if wrong.comparable else ()
        blocks = [array_lines("expected", wrong.ours, matrix), array_lines("yours", wrong.theirs, matrix)]
        if wrong.comparable:
            blocks.append(array_lines("yours − expected", wrong.difference, matrix))
        lines += ["", wrong.name, *side_by_side(blocks, width)]
        if comparison.spelled:
            lines += ["", f"  {comparison.spelled}"]
    for title, hints in (("Hint", comparison.hints), ("Known mistakes", comparison.known)):
        if hints:
            lines += ["", title, *(f"  {line}" for line in hints)]
    lines += ["", f"  {comparison.verdict}"]
    return "\n".join(lines)
