"""Equations written down: as MathML for a page, LaTeX for a document, plain text for a terminal, and as their own text.

Each form says how a part is written; where parentheses are needed is decided once, for all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

__all__ = ["ATOM", "BINDING", "COMPARISONS", "SYMBOLS", "Form", "LaTeX", "MathML", "Plain", "Source", "write"]

Tree = list[Any]

COMPARISONS = ("==", "!=", "<=", "<", ">=", ">")
FUNCTIONS = ("exp", "log", "sqrt", "tanh", "cdf")
# How strongly an operation holds its operands together. Between + and *: a sum sign, whose end is open, and what
# Python would read as strongly as * but no reader of "2 * d % 2" does.
BINDING = {"+": 1, "-": 1, "%": 1.2, "//": 1.2, "*": 2, "/": 2, "neg": 2, "**": 3}
OPEN, ATOM = 1.5, 4
SYMBOLS = {"eps": "ε", "alpha": "α", "beta": "β", "kappa": "κ", "delta": "δ", "ddelta": "dδ", "pi": "π"}


class _Set(NamedTuple):
    """A part in some notation, how strongly its outermost operation binds, and whether it begins with a minus sign."""

    text: str
    binding: float
    signed: bool = False


def write(tree: Tree, form: Form) -> str:
    """A tree (see `equations.Equation.tree`) in a form of notation."""
    return _set(tree, form).text


def _set(tree: Tree, form: Form) -> _Set:
    kind, *parts = tree
    if kind == "number":
        return _Set(form.infinity if parts[0] >= 1e300 else form.number(f"{parts[0]:g}"), ATOM)
    if kind in ("index", "name"):
        return _Set(form.name(parts[0]), ATOM)
    if kind == "tensor":
        return _Set(form.tensor(parts[0], [_set(index, form).text for index in parts[1]]), ATOM)
    if kind in ("sum", "max"):
        over = _enclosed(_set(parts[1], form), OPEN, form)
        return _Set(form.reduction(kind, [form.name(letter) for letter in parts[0]], over), OPEN)
    operands = [_set(part, form) for part in parts]
    if kind == "where":
        comparison = parts[0] if parts[0][0] in COMPARISONS else None
        condition = _compared(comparison, form) if comparison else operands[0].text
        return _Set(form.cases(condition, operands[1].text, operands[2].text), ATOM)
    if kind in FUNCTIONS:
        return _Set(form.function(kind, operands[0].text), form.function_binding.get(kind, ATOM))
    if kind == "neg":
        inside = _enclosed(operands[0], OPEN, form, right=True)
        return _Set(f"{form.minus}{inside}", min(BINDING["neg"], operands[0].binding), signed=True)
    a, b = operands
    if kind in COMPARISONS:
        return _Set(form.condition(_compared(tree, form)), ATOM)
    if kind == "**":
        exponent = b.text if form.stacks else _enclosed(b, ATOM, form)
        return _Set(form.power(_enclosed(a, ATOM, form), exponent), BINDING["**"])
    if kind == "//":
        return _Set(form.floor(_enclosed(a, 2, form), _enclosed(b, 3, form)), ATOM)
    if kind == "/" and form.stacks:
        return _Set(form.fraction(a.text, b.text), ATOM)
    binding = BINDING[kind]
    needed = {"+": binding, "-": OPEN, "*": OPEN}.get(kind, 3)
    if b.binding == BINDING["%"]:  # nobody would read "2 d mod 2" as 2 (d mod 2), or "a + d mod 2"
        needed = ATOM
    left = _enclosed(a, 2 if kind == "%" else binding, form)
    ends_open = b.binding == OPEN and kind == "*"  # a sum's end is that of the product too
    text = f"{left}{form.signs[kind]}{_enclosed(b, needed, form, right=True)}"
    return _Set(text, OPEN if ends_open else binding, a.signed and left == a.text)


def _compared(tree: Tree, form: Form) -> str:
    kind, a, b = tree
    return f"{_set(a, form).text}{form.signs[kind]}{_set(b, form).text}"


def _enclosed(part: _Set, binding: float, form: Form, right: bool = False) -> str:
    """In parentheses where it binds less than what stands around it, or is a minus sign's and another sign's right."""
    return form.parentheses(part.text) if part.binding < binding or (right and part.signed) else part.text


class Form(ABC):
    """A notation: how its parts are written. `stacks`: exponents are raised, and fractions have a line."""

    stacks = True
    infinity = "∞"
    minus: str  # a sign; `signs` stand between two parts
    signs: ClassVar[dict[str, str]]
    function_binding: ClassVar[dict[str, float]] = {"exp": 3}

    @abstractmethod
    def number(self, text: str) -> str: ...

    @abstractmethod
    def name(self, name: str) -> str: ...

    @abstractmethod
    def tensor(self, name: str, indices: list[str]) -> str: ...

    @abstractmethod
    def reduction(self, kind: str, letters: list[str], over: str) -> str: ...

    @abstractmethod
    def cases(self, condition: str, a: str, b: str) -> str: ...

    @abstractmethod
    def function(self, name: str, of: str) -> str: ...

    @abstractmethod
    def condition(self, text: str) -> str: ...

    @abstractmethod
    def power(self, base: str, exponent: str) -> str: ...

    @abstractmethod
    def floor(self, a: str, b: str) -> str: ...

    def fraction(self, a: str, b: str) -> str:
        """Asked for by forms that stack alone."""
        return f"{a} / {b}"

    @abstractmethod
    def parentheses(self, text: str) -> str: ...


class MathML(Form):
    infinity = "<mi>&#x221E;</mi>"
    minus = "<mo>&#x2212;</mo>"
    signs: ClassVar[dict[str, str]] = {
        sign: f"<mo>{text}</mo>"
        for sign, text in {
            "+": "+", "*": "&#x22C5;", "-": "&#x2212;", "==": "=", "!=": "&#x2260;", "<=": "&#x2264;",
            ">=": "&#x2265;", "<": "&lt;", ">": "&gt;", "%": "mod",
        }.items()
    }  # fmt: skip

    def number(self, text: str) -> str:
        return f"<mn>{text}</mn>"

    def name(self, name: str) -> str:
        return f"<mi>{SYMBOLS.get(name, name.replace('_', ' '))}</mi>"

    def tensor(self, name: str, indices: list[str]) -> str:
        return f"<msub>{self.name(name)}<mrow>{'<mo>,</mo>'.join(indices)}</mrow></msub>"

    def reduction(self, kind: str, letters: list[str], over: str) -> str:
        sign = "<mo>&#x2211;</mo>" if kind == "sum" else '<mo rspace="0.2em" movablelimits="false">max</mo>'
        return f"<mrow><munder>{sign}<mrow>{'<mo>,</mo>'.join(letters)}</mrow></munder>{over}</mrow>"

    def cases(self, condition: str, a: str, b: str) -> str:
        first = f"<mtr><mtd>{a}</mtd><mtd><mtext>if&#xa0;</mtext>{condition}</mtd></mtr>"
        rows = f"{first}<mtr><mtd>{b}</mtd><mtd><mtext>otherwise</mtext></mtd></mtr>"
        return f"<mrow><mo>{{</mo><mtable>{rows}</mtable></mrow>"

    def function(self, name: str, of: str) -> str:
        if name == "exp":
            return f"<msup><mi>e</mi><mrow>{of}</mrow></msup>"
        if name == "sqrt":
            return f"<msqrt>{of}</msqrt>"
        return f"<mrow><mi>{'Φ' if name == 'cdf' else name}</mi><mo>(</mo>{of}<mo>)</mo></mrow>"

    def condition(self, text: str) -> str:
        return f"<mrow><mo>[</mo>{text}<mo>]</mo></mrow>"

    def power(self, base: str, exponent: str) -> str:
        return f"<msup><mrow>{base}</mrow><mrow>{exponent}</mrow></msup>"

    def floor(self, a: str, b: str) -> str:
        return f"<mrow><mo>&#x230A;</mo>{a}<mo>/</mo>{b}<mo>&#x230B;</mo></mrow>"

    def fraction(self, a: str, b: str) -> str:
        return f"<mfrac><mrow>{a}</mrow><mrow>{b}</mrow></mfrac>"

    def parentheses(self, text: str) -> str:
        return f"<mrow><mo>(</mo>{text}<mo>)</mo></mrow>"


class LaTeX(Form):
    infinity = r"\infty"
    minus = "-"
    signs: ClassVar[dict[str, str]] = {
        "+": " + ", "-": " - ", "*": r" \, ", "==": " = ", "!=": r" \ne ", "<=": r" \le ", ">=": r" \ge ",
        "<": " < ", ">": " > ", "%": r" \bmod ",
    }  # fmt: skip
    symbols: ClassVar[dict[str, str]] = {
        "ε": r"\varepsilon", "α": r"\alpha", "β": r"\beta", "κ": r"\kappa", "δ": r"\delta", "dδ": r"\mathrm{d}\delta",
        "π": r"\pi",
    }  # fmt: skip

    def number(self, text: str) -> str:
        mantissa, _, exponent = text.partition("e")
        if not exponent:
            return text
        power = f"10^{{{int(exponent)}}}"
        return power if mantissa == "1" else rf"{mantissa} \cdot {power}"

    def name(self, name: str) -> str:
        if name in SYMBOLS:
            return self.symbols[SYMBOLS[name]]
        spaced = name.replace("_", r"\ ")
        return name if len(name) == 1 else rf"\mathrm{{{spaced}}}"

    def tensor(self, name: str, indices: list[str]) -> str:
        return f"{self.name(name)}_{{{','.join(indices)}}}"

    def reduction(self, kind: str, letters: list[str], over: str) -> str:
        return rf"\{kind}_{{{','.join(letters)}}} {over}"

    def cases(self, condition: str, a: str, b: str) -> str:
        rows = rf"{a} & \text{{if }} {condition} \\ {b} & \text{{otherwise}}"
        return rf"\begin{{cases}} {rows} \end{{cases}}"

    def function(self, name: str, of: str) -> str:
        if name == "exp":
            return f"e^{{{of}}}"
        if name == "sqrt":
            return rf"\sqrt{{{of}}}"
        symbol = "Phi" if name == "cdf" else name
        return rf"\{symbol}\left({of}\right)"

    def condition(self, text: str) -> str:
        return rf"\left[{text}\right]"

    def power(self, base: str, exponent: str) -> str:
        return f"{{{base}}}^{{{exponent}}}"

    def floor(self, a: str, b: str) -> str:
        return rf"\left\lfloor {a} / {b} \right\rfloor"

    def fraction(self, a: str, b: str) -> str:
        return rf"\frac{{{a}}}{{{b}}}"

    def parentheses(self, text: str) -> str:
        return rf"\left({text}\right)"


class Plain(Form):
    stacks = False
    minus = "−"
    function_binding: ClassVar[dict[str, float]] = {}
    signs: ClassVar[dict[str, str]] = {
        "+": " + ", "-": " − ", "*": " · ", "/": " / ", "==": " = ", "!=": " ≠ ", "<=": " ≤ ", ">=": " ≥ ",
        "<": " < ", ">": " > ", "%": " mod ",
    }  # fmt: skip

    def number(self, text: str) -> str:
        return text

    def name(self, name: str) -> str:
        return SYMBOLS.get(name, name)

    def tensor(self, name: str, indices: list[str]) -> str:
        return f"{self.name(name)}[{','.join(indices)}]"

    def reduction(self, kind: str, letters: list[str], over: str) -> str:
        return f"{'Σ' if kind == 'sum' else 'max'}_{','.join(letters)} {over}"

    def cases(self, condition: str, a: str, b: str) -> str:
        return f"({a} if {condition} else {b})"

    def function(self, name: str, of: str) -> str:
        return f"{ {'sqrt': '√', 'cdf': 'Φ'}.get(name, name) }({of})"

    def condition(self, text: str) -> str:
        return f"[{text}]"

    def power(self, base: str, exponent: str) -> str:
        return f"{base}{ {'2': '²', '3': '³'}.get(exponent, f'^{exponent}') }"

    def floor(self, a: str, b: str) -> str:
        return f"⌊{a} / {b}⌋"

    def parentheses(self, text: str) -> str:
        return f"({text})"


class Source(Form):
    """As `equations.Equation` reads it."""

    stacks = False
    infinity = "1e300"
    minus = "-"
    function_binding: ClassVar[dict[str, float]] = {}
    signs: ClassVar[dict[str, str]] = {sign: f" {sign} " for sign in ("+", "-", "*", "/", "%", *COMPARISONS)}

    def number(self, text: str) -> str:
        return text

    def name(self, name: str) -> str:
        return name

    def tensor(self, name: str, indices: list[str]) -> str:
        return f"{name}[{','.join(indices)}]"

    def reduction(self, kind: str, letters: list[str], over: str) -> str:
        return f"{kind}({', '.join([*letters, over])})"

    def cases(self, condition: str, a: str, b: str) -> str:
        return f"where({condition}, {a}, {b})"

    def function(self, name: str, of: str) -> str:
        return f"{name}({of})"

    def condition(self, text: str) -> str:
        return f"({text})"

    def power(self, base: str, exponent: str) -> str:
        return f"{base}**{exponent}"

    def floor(self, a: str, b: str) -> str:
        return f"({a} // {b})"

    def parentheses(self, text: str) -> str:
        return f"({text})"
