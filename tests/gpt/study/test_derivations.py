"""Every layer's equations against the layer: results and gradients, from the arguments alone, in all settings."""

import numpy as np
import pytest

from gpt.parity import ops
from gpt.parity.gates import error_of
from gpt.study.derivations import DERIVATIONS, derive
from gpt.study.layer import NAMES, station
from gpt.study.record import PLAIN

BOUND = 1e-12


def fits(case, row) -> bool:
    """Whether the equations' letters are the case's axes: they have an example and a token where a layer takes any."""
    shapes = [np.shape(x) for name, x in row.problem(case).arguments.items() if name in ("x", "gate", "logits")]
    return row.layer == "rope" or all(len(shape) == 3 for shape in shapes)


CASES = [
    (name, case)
    for name in NAMES
    for case in ops.ROWS[name].cases
    if fits(case, ops.ROWS[name]) and not (ops.ROWS[name].layer == "embedding" and len(case.size) > 4)
]


@pytest.mark.parametrize("name, case", CASES, ids=lambda part: str(part).replace(" ", "-"))
def test_equations_are_the_layer(name, case):
    """On the check's own cases: one row, one column, transposed and sliced arrays, large values, keys never seen."""
    problem = ops.ROWS[name].problem(case)
    derivation = derive(problem.row.layer, problem.arguments)
    result, true = derivation.forward[-1].tensor, problem.run()
    true[result] = true.pop(problem.row.results[0])
    shapes = {name: np.full_like(array, np.nan) for name, array in true.items()}
    found = derivation.evaluate(problem.arguments, {f"d{result}": problem.dy, **shapes})
    for tensor, array in true.items():
        size = np.array(problem.size(tensor if tensor != result else problem.row.results[0], array))
        assert error_of(found[tensor], array, size if size else np.array(1.0)) <= BOUND, tensor


@pytest.mark.parametrize("name", NAMES)
def test_every_intermediate_result_has_a_use_and_a_shape(name):
    """What is defined is read further on, or is the result or a gradient; nothing is defined twice."""
    step = station(name)
    equations = (*step.derivation.forward, *step.derivation.backward)
    defined = [equation.tensor for equation in equations]
    assert len(set(defined)) == len(defined)
    wanted = {step.result, *(f"d{argument}" for argument in step.gradients)}
    assert wanted <= set(defined)
    for i, equation in enumerate(equations):
        used = any(equation.tensor in later.reads for later in equations[i + 1 :])
        assert used or equation.tensor in wanted, equation.text
        assert np.ndim(step.values[equation.tensor]) == len(equation.indices)
        assert not [name for name in equation.reads if name not in step.values]


@pytest.mark.parametrize("name", NAMES)
def test_an_element_spelled_out_is_the_layers(name):
    step = station(name, seed=3)
    rng = np.random.default_rng(0)
    for equation in (*step.derivation.forward, *step.derivation.backward):
        array = np.asarray(step.values[equation.tensor])
        for _ in range(3):
            index = tuple(int(rng.integers(n)) for n in array.shape)
            spelled = equation.spell(step.values, index)
            assert spelled.value == pytest.approx(array[index], rel=1e-9, abs=1e-12), equation.text
            for name_read, places in spelled.read.items():
                assert all(len(place) == np.ndim(step.values[name_read]) for place in places)


def test_every_derivation_is_of_a_layer():
    layers = {row.layer for row in ops.ROWS.values()}
    assert set(DERIVATIONS) <= layers | set(PLAIN)


@pytest.mark.parametrize("name", PLAIN)
def test_what_lies_between_layers(name):
    x = np.random.default_rng(1).normal(size=(2, 5, 12) if name != "join_heads" else (2, 3, 5, 4))
    many = {
        "split_heads": [{"x": x, "head_dim": 4}],
        "join_heads": [{"x": x}],
        "add": [{"x": x, "branch": 2 * x}, {"x": x, "branch": x[0]}],
    }[name]
    for arguments in many:
        y, saved = PLAIN[name].forward(**arguments)
        dy = np.random.default_rng(2).normal(size=y.shape)
        returned = PLAIN[name].backward(dy, saved)
        returned = returned if isinstance(returned, tuple) else (returned,)
        true = {"y": y, **{f"d{a}": g for a, g in zip(("x", "branch"), returned, strict=False)}}
        shapes = {tensor: np.full_like(array, np.nan) for tensor, array in true.items()}
        found = derive(name, arguments).evaluate(arguments, {"dy": dy, **shapes})
        for tensor, array in true.items():
            np.testing.assert_allclose(found[tensor], array, rtol=1e-12, atol=1e-12)
