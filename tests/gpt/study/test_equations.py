"""Equations: the same value as a whole, element by element, spelled out, and read back from what is written."""

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.study.equations import Equation
from gpt.study.notation import Source, write
from reference.gelu import normal_cdf

SIZES = {"a": 2, "b": 3, "c": 4}  # of the letters
NAMES = {"exp": math.exp, "log": math.log, "sqrt": math.sqrt, "tanh": math.tanh}
NAMES["cdf"] = lambda x: float(normal_cdf(np.float64(x)))


def tensors(seed: int) -> dict[str, np.ndarray | float]:
    """A tensor for each set of letters, of positive numbers between which nothing cancels; and two numbers."""
    rng = np.random.default_rng(seed)
    shapes = {"".join(letters): letters for letters in ([], *([x] for x in "abc"), *("ab", "bc", "ac", "abc"))}
    found = {
        f"x_{name}": rng.uniform(0.5, 1.5, [SIZES[i] for i in letters]) for name, letters in shapes.items() if name
    }
    return {**found, "eps": 0.37, "scale": 1.83}


# Numbers: positive, of size 1, so that logarithms, roots, quotients and powers all have a meaning.
LEAVES = st.sampled_from(
    ["x_a[a]", "x_b[b]", "x_c[c]", "x_ab[a,b]", "x_bc[b,c]", "x_ac[a,c]", "x_abc[a,b,c]", "eps", "scale", "2", "0.5",
     "x_b[b // 2]", "x_c[(c + 2) % 4]", "x_c[c + 1 - 2 * (c % 2)]"]
)  # fmt: skip
CONDITIONS = st.sampled_from(["a == 1", "b <= c", "c != 2", "a + 1 > b", "b // 2 < a", "c % 2 >= a"])
SUMS = st.sampled_from(["b", "c", "b, c", "a, c"])


LARGER = (  # from smaller ones, each in parentheses: where they are needed the equation has to know itself
    "({0}) + ({1})", "({0}) - ({1})", "({0}) * ({1})", "({0}) / (1 + ({1})**2)", "-({0})", "({0})**2", "(({0})**2)**2",
    "sqrt(1 + ({0})**2)", "log(1 + ({0})**2)", "exp(tanh({0}))", "cdf({0})", "({c}) * ({0})", "({0}) * ({c})",
    "where({c}, {0}, {1})", "sum({s}, {0})", "max({s}, {0})", "sum({s}, {0}) * ({1})",
)  # fmt: skip


def grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    parts = st.tuples(st.sampled_from(LARGER), inner, inner, CONDITIONS, SUMS)
    return parts.map(lambda part: part[0].format(part[1], part[2], c=part[3], s=part[4]))


EXPRESSIONS = st.recursive(LEAVES, grown, max_leaves=8)


def by_hand(tree, values, at):
    """An element of a tree's value, by plain Python."""
    kind, *parts = tree
    if kind == "number":
        return parts[0]
    if kind == "index":
        return at[parts[0]]
    if kind == "name":
        return values[parts[0]]
    if kind == "tensor":
        array = values[parts[0]]
        place = [by_hand(index, values, at) for index in parts[1]]
        return float(array[tuple(min(max(i, 0), n - 1) for i, n in zip(place, array.shape, strict=True))])
    if kind in ("sum", "max"):
        letters, over = parts
        terms = []
        for place in np.ndindex(*(SIZES[letter] for letter in letters)):
            terms.append(by_hand(over, values, {**at, **dict(zip(letters, place, strict=True))}))
        return math.fsum(terms) if kind == "sum" else max(terms)
    if kind == "where":
        return by_hand(parts[1] if by_hand(parts[0], values, at) else parts[2], values, at)
    operands = [by_hand(part, values, at) for part in parts]
    if kind == "neg":
        return -operands[0]
    return NAMES[kind](*operands) if kind in NAMES else eval(f"a {kind} b", dict(zip("ab", operands, strict=True)))


def closed(expression: str) -> Equation:
    """With every letter either the result's or summed over; `one` says how far each of them runs."""
    return Equation(f"y[a,b] = sum(c, one[a,b,c] * ({expression}))")


@settings(deadline=None, max_examples=200)
@given(EXPRESSIONS, st.integers(0, 99), st.integers(0, 1), st.integers(0, 2))
def test_every_way_to_compute_an_element_gives_the_same(expression, seed, a, b):
    """Evaluated as a whole, by plain Python, spelled out, and the spelled text itself computed."""
    written, values = closed(expression), tensors(seed) | {"one": np.ones((2, 3, 4))}
    true = by_hand(written.tree, values, {"a": a, "b": b})
    close = pytest.approx(true, rel=1e-9, abs=1e-9)
    assert written.evaluate(values)[a, b] == close
    spelled = written.spell(values, (a, b), terms=10**6, digits=17)
    assert spelled.value == close
    text = spelled.text.replace("·", "*").replace("^", "**")
    assert eval(text, {**NAMES, "max": lambda *numbers: max(numbers), "__builtins__": {}}) == close


@settings(deadline=None, max_examples=60)
@given(
    st.permutations(["x_ab[a,b]", "x_c[c]", "x_bc[b,c]", "x_a[a]", "x_ac[a,(c + 1) % 4]"]),
    st.lists(st.sampled_from("+-*/"), min_size=4, max_size=4),
    st.lists(CONDITIONS, min_size=2, max_size=2),
)
def test_what_is_read_is_what_has_an_influence(leaves, signs, conditions):
    """Each tensor stands once, so that nothing cancels: another number shows where an element is read."""
    one, two, three, four, five = leaves
    inner = f"{three} {signs[2]} max(c, {five}) + ({conditions[1]}) * {four}"
    written = closed(f"({one} {signs[0]} where({conditions[0]}, {two}, 2)) {signs[1]} ({inner})")
    values, index = tensors(5) | {"one": np.ones((2, 3, 4))}, (1, 2)
    spelled = written.spell(values, index)
    for name, array in values.items():
        for place in np.ndindex(np.shape(array)) if np.ndim(array) else ():
            changes = []
            for other in (100.0, 1e-3):  # the one becomes the largest, the other leaves it
                moved = array.copy()
                moved[place] = other
                changes.append(written.spell({**values, name: moved}, index).value != spelled.value)
            assert (place in spelled.read.get(name, [])) == any(changes), (written.text, name, place)


@settings(deadline=None, max_examples=100)
@given(EXPRESSIONS)
def test_mathml_is_xml_and_latex_closes_what_it_opens(expression):
    written = closed(expression)
    assert ElementTree.fromstring(written.mathml).tag == "math"
    latex = written.latex.replace(r"\left", "").replace(r"\right", "")
    for opening, closing in ("{}", "()", "[]"):
        assert latex.count(opening) == latex.count(closing)
    assert written.latex.count(r"\left") - written.latex.count(r"\leq") >= written.latex.count(r"\right")


class Readable(Source):
    """The equation's own text, but for the sum's sign and its reach, which has no parentheses."""

    def reduction(self, kind, letters, over):
        return f"Σ{kind},{','.join(letters)}: {over}"


def python_of(text: str) -> str:
    """What is after a sum's sign belongs to the sum as far as products go."""
    while found := re.search(r"Σ(sum|max),([a-z,]+): (?!.*Σ)", text):
        depth = 0
        for end in range(found.end(), len(text) + 1):
            depth += (text[end : end + 1] in tuple("([")) - (text[end : end + 1] in tuple(")]"))
            if depth < 0 or end == len(text) or (depth == 0 and re.match(r" ([-+%<>=!]|//)|,", text[end:])):
                break
        text = f"{text[: found.start()]}{found[1]}({found[2]}, {text[found.end() : end]}){text[end:]}"
    return text


@settings(deadline=None, max_examples=200)
@given(EXPRESSIONS, st.integers(0, 99))
def test_what_is_written_is_read_as_it_was_meant(expression, seed):
    """Parentheses stand where a reader needs them."""
    written, values = closed(expression), tensors(seed) | {"one": np.ones((2, 3, 4))}
    for again in (Equation(f"y[a,b] = {python_of(write(written.tree, Readable()))}"), written.with_tree(written.tree)):
        np.testing.assert_allclose(again.evaluate(values), written.evaluate(values), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "text",
    ["", "y", "y[t] + 1", "y[t] = ", "y[t] = foo(x[t])", "y[t] = x[t] and 1", "y[t] = sum(x[t])", "y = z = 1; 2",
     "y[t] = x.T[t]", "y[t] = x[t]; z = 1", "y[t] = 'a'", "y = a < b < c"],
)  # fmt: skip
def test_what_is_no_equation_is_refused_with_its_text(text):
    with pytest.raises(ValueError, match="equation: cannot read") as error:
        _ = Equation(text).tree
    assert repr(text) in str(error.value)


@pytest.mark.parametrize(
    "text, values, message",
    [
        ("y[t] = x[t,c]", {"x": np.ones(3)}, "x: has shape (3,), and 2 indices"),
        ("y[t] = x[t] + z[t]", {"x": np.ones(3), "z": np.ones(4)}, "z: t runs over 4, elsewhere over 3"),
    ],
)
def test_shapes_that_do_not_fit_are_named(text, values, message):
    with pytest.raises(ValueError, match="x:|z:") as error:
        Equation(text).evaluate(values)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "text, at, spelled",
    [
        ("y[a] = sum(b, x[a,b]**2)", (1,), "1^2 + (-2)^2 + 3^2"),
        ("y[a] = 2 / sum(b, (b == 1) * (x[a,b] - 1))", (1,), "2 / (-2 - 1)"),
        ("y[a] = max(b, where(b == 1, -x[a,b], -1e300))", (0,), "max(-0.5)"),
        ("y[a] = max(b, x[a,b] - 3)", (1,), "max(1 - 3, -2 - 3, 3 - 3)"),
        ("y[a] = sum(b, (b > 4) * x[a,b])", (0,), "0"),
        ("y[a] = (x[a,0]**2)**2 * (a % 2)", (1,), "(1^2)^2 · (1 % 2)"),
        ("y[a] = -(x[a,1] - 1)", (1,), "-(-2 - 1)"),
    ],
)
def test_an_element_in_numbers(text, at, spelled):
    x = np.array([[4.0, 0.5, 2.0], [1.0, -2.0, 3.0]])
    written = Equation(text)
    found = written.spell({"x": x}, at)
    assert found.text == spelled
    assert found.value == written.evaluate({"x": x})[at]


def test_a_long_sum_is_cut_and_its_rest_added_up():
    x = np.arange(1.0, 10.0)
    found = Equation("y = sum(t, x[t])").spell({"x": x}, (), terms=3)
    assert found.text == "1 + 2 + 3 + (6 more, together 39)"
    assert found.value == 45
    assert found.read == {"x": [(t,) for t in range(9)]}


def test_a_sum_sign_does_not_reach_past_its_own_sum():
    written = Equation("y[t] = sum(c, x[t,c]) * w[t] / 2 - sum(c, x[t,c] - w[t]) + 3 * sum(c, x[t,c] * (c % 2))")
    assert written.plain == "y[t] = (Σ_c x[t,c]) · w[t] / 2 − Σ_c (x[t,c] − w[t]) + 3 · Σ_c x[t,c] · (c mod 2)"
    assert written.latex == (
        r"y_{t} = \frac{\left(\sum_{c} x_{t,c}\right) \, w_{t}}{2} - \sum_{c} \left(x_{t,c} - w_{t}\right)"
        r" + 3 \, \sum_{c} x_{t,c} \, \left(c \bmod 2\right)"
    )
