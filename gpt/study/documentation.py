"""The layers' documentation, from what the layers are checked by: `python -m gpt.study.documentation`.

Every part of it is the one that is used elsewhere: a layer's docstring, the equations that the report shows and that
are held against the layer, the shapes of its arguments, the laws and the bounds of the check. It is written to
reference/LAYERS.md.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gpt.parity import ops
from gpt.parity.gates import ALGEBRA
from gpt.parity.laws import DIFFERENCES, EXACT
from gpt.parity.ops import Row
from gpt.study.derivations import DERIVATIONS
from gpt.study.layer import NAMES, station

__all__ = ["document", "main"]

HEAD = """\
# The layers

Every layer of the reference: what it computes, its gradient, and what both are held against. This file is generated
from the same source as the checks and the study report, by `python -m gpt.study.documentation`.

The equations are computed and compared with the layers, every element, to {exact:.0e} of the tensor's largest entry.
`twingrad study --layer NAME` shows one with numbers; with `--yours FILE.py` it holds your own beside it, and
`twingrad check NAME` takes all measurements named here, on all sizes.

A gradient is named after its tensor, $\\mathrm{{dx}}$ after $x$. $[\\ldots]$ is 1 where the condition holds and 0
elsewhere. Letters: b example, t and s token (of queries and of keys), c and o channel (in and out), h and g head (of
queries and of keys), d channel of a head, v word of the vocabulary, r rank, p pair of answers. Leading axes, here b and
t, may be any number; `...` stands for them.
"""
ORDER = (
    "embedding", "linear", "layer_norm", "add_layer_norm", "rms_norm", "add_rms_norm", "rope", "attention",
    "flash_attention", "cached_attention", "gelu", "bias_gelu", "swiglu", "dropout", "cross_entropy",
    "linear_cross_entropy", "token_logps", "lora", "dpo", "orpo",
)  # fmt: skip


def document() -> str:
    """The whole file."""
    layers: dict[str, list[Row]] = {}
    for row in ops.ROWS.values():
        layers.setdefault(row.layer, []).append(row)
    names = sorted(layers, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
    index = "\n".join(f"- [{name}](#{name}): {_first_line(name)}" for name in names)
    sections = ["\n".join(_section(name, layers[name])) for name in names]
    return "\n".join([HEAD.format(exact=EXACT), index, "", *sections])


def _section(name: str, rows: list[Row]) -> Iterator[str]:
    twin = any(row.has_twin("kernels") for row in rows)
    yield f"## {name}\n"
    where = f"[`reference/{name}.py`]({name}.py)"
    where += f", its Triton twin [`kernels/{name}.py`](../kernels/{name}.py)" if twin else ""
    yield f"{_first_line(name)}\n\n{where}\n"
    yield from _faces(name)
    shown: set[str] = set()  # texts of equations
    for row in (row for row in rows if row.name in NAMES):
        yield from _equations(row, shown)
    if name not in DERIVATIONS:
        yield f"```\n{_formulas(name)}\n```\n"
    yield from _checks(rows)


def _first_line(name: str) -> str:
    return _docstring(name).splitlines()[0]


def _docstring(name: str) -> str:
    return inspect.getdoc(importlib.import_module(f"reference.{name}")) or ""


def _formulas(name: str) -> str:
    """The paragraph of the docstring that has the formulas."""
    paragraphs = _docstring(name).split("\n\n")
    return next((p for p in paragraphs if p.startswith("forward")), paragraphs[-1])


def _faces(name: str) -> Iterator[str]:
    """The functions with the shapes of what they take and return, as their docstrings say."""
    module = importlib.import_module(f"reference.{name}")
    for function in (getattr(module, face, None) for face in ("forward", "backward")):
        if function is not None:
            arguments = ", ".join(inspect.signature(function).parameters)
            shapes = " ".join((inspect.getdoc(function) or "").split("\n\n")[0].split())
            yield f"- `{function.__name__}({arguments})`: {_escaped(shapes)}"
    yield ""


def _equations(row: Row, shown: set[str]) -> Iterator[str]:
    """The equations of a row that no row of the layer before it has."""
    step = station(row.name)
    for title, equations in (("Forward", step.derivation.forward), ("Backward", step.derivation.backward)):
        new = [equation for equation in equations if equation.text not in shown]
        if new:
            yield f"**{title}**, of `{row.name}` what differs\n" if shown else f"**{title}**\n"
            lines = " \\\\\n".join(equation.latex.replace(" = ", " &= ", 1) for equation in new)
            yield f"```math\n\\begin{{aligned}}\n{lines}\n\\end{{aligned}}\n```\n"
    shown |= {equation.text for equation in (*step.derivation.forward, *step.derivation.backward)}


def _checks(rows: list[Row]) -> Iterator[str]:
    """What the layer is held against, with the bounds."""
    yield "| held against | bound |"
    yield "|---|---|"
    first = rows[0]
    if first.gradients:
        gradients = ", ".join(f"d{name}" for name in first.gradients)
        yield f"| central finite differences: {gradients} | {DIFFERENCES:.0e} |"
    yield f"| PyTorch's own operator{' and its autograd' if first.gradients else ''}, float64 | {EXACT:.0e} |"
    for law in dict.fromkeys(law for row in rows for law in row.laws):
        text = " ".join((inspect.getdoc(law) or law.__name__).split())
        yield f"| {_escaped(text)} | {_bound(law, rows)} |"
    factor = max(row.gradient_factor for row in rows)
    more = f", gradients {factor:g} times" if first.gradients and factor != 2 else ""
    yield f"| the float64 truth, in float32 | 2 times PyTorch's own error{more} |"
    yield "| itself, run again; its inputs, before and after | the same bits |"
    if first.has_twin("kernels"):
        yield f"| its Triton twin, float64 | {ALGEBRA:.0e} |"
    names = ", ".join(f"`{row.name}`" for row in rows)
    yield f"\nChecked as {names}, on {sum(len(row.cases) for row in rows)} cases.\n"


def _bound(law: object, rows: list[Row]) -> str:
    """A law's bounds, from its measures on a small case."""
    row = next(row for row in rows if law in row.laws)
    case = min(row.cases, key=lambda case: (min(case.size) < 2, np.prod(case.size)))
    bounds = sorted({bound for _, _, bound in law(row.problem(case))})  # type: ignore[operator]
    return ", ".join("not one bit" if bound == 0 else f"{bound:.0e}" for bound in bounds)


def _escaped(text: str) -> str:
    """What Markdown would take for its own."""
    return re.sub(r"([|<*_])", r"\\\1", text)


def main() -> None:
    """Write the file into the repository that this module lies in, or to the path that is given."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2] / "reference" / "LAYERS.md"
    from gpt.data.files import atomic_write

    with atomic_write(path) as file:
        file.write(document().encode())
    print(path)


if __name__ == "__main__":
    main()
