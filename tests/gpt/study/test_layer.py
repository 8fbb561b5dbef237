"""One layer alone, and a learner's layer beside it: right ones pass, and of wrong ones the mistake is named."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt.errors import UserError
from gpt.parity import ops
from gpt.study import hints, layer, terminal
from gpt.study.changes import changes
from gpt.study.yours import compare
from tests.gpt.study.mistakes import ATTENTION, LAYER_NORM, LINEAR, MISTAKES, RIGHT

SMALLEST = 1e-9  # of an error that counts


def study(*arguments):
    """The command, in a process of its own."""
    command = [sys.executable, "-m", "gpt", "study", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def written(tmp_path, text, name="mine.py") -> str:
    path = tmp_path / name
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", layer.NAMES)
def test_checks_pass_on_what_is_shown(name):
    for seed in range(3):
        given = layer.problem(name, seed)
        measured = layer.checks(given)
        assert all(check.passed for check in measured), [check for check in measured if not check.passed]
        assert {f"d{argument}" for argument in given.inputs()} <= {c.what for c in measured if c.kind == "differences"}


@pytest.mark.parametrize("name", layer.NAMES)
def test_what_is_drawn_shows_mistakes(name):
    """Not small, no two alike, other numbers for another seed; where axes differ, their sizes do."""
    step, again, other = layer.station(name, 1), layer.station(name, 1), layer.station(name, 2)
    for argument in step.gradients:
        array = step.arguments[argument]
        assert np.array_equal(array, again.arguments[argument])
        assert not np.array_equal(array, other.arguments[argument])
        assert np.unique(array).size == array.size
        assert np.abs(array).max() > 0.4
    assert np.ptp(np.append(step.dy, 0)) > 0


def test_text_has_formulas_numbers_elements_and_checks():
    step = layer.station("layer_norm", 1)
    text = terminal.render_layer(step, layer.checks(layer.problem("layer_norm", 1)), width=100)
    sections = [line for line in text.splitlines() if line and not line.startswith(" ")]
    assert sections[1:] == [
        "Forward", "Backward", "Numbers (of each tensor the first matrix)", "Elements, in numbers", "Checks"
    ]  # fmt: skip
    assert "rstd[b,t] = 1 / √(variance[b,t] + ε)" in text
    assert f"{step.arguments['x'][0, 1, 2]:.4g}" in text
    for argument in step.gradients:
        (line,) = [line for line in text.splitlines() if line.startswith(f"  d{argument}[") and line.count(" = ") == 2]
        index = tuple(map(int, line[line.index("[") + 1 : line.index("]")].split(",")))
        assert line.endswith(f" = {step.gradients[argument][index]:.4g}")
    assert text.count("holds") == len(layer.checks(layer.problem("layer_norm", 1)))
    assert max(map(len, text.splitlines())) < 200


def test_the_command_prints_it_and_loads_no_framework():
    code = (
        "import sys; from gpt.cli import main; status = main(sys.argv[1:])\n"
        "print('LOADED', *[n for n in ('torch', 'matplotlib', 'triton') if n in sys.modules]); sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "study", "--layer", "attention-grouped"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "LOADED"
    assert "dk[b,g,s,d] = scale · Σ_h,t [⌊h / R⌋ = g] · dscores[b,h,t,s] · q[b,h,t,d]" in done.stdout
    assert "y of earlier queries" in done.stdout


def test_a_failed_check_is_status_1(monkeypatch, capsys):
    """A layer whose backward is not the derivative of its forward."""
    from reference import linear

    backward = linear.backward
    monkeypatch.setattr(linear, "backward", lambda dy, saved: (2 * backward(dy, saved)[0], *backward(dy, saved)[1:]))
    assert layer.show("linear") == 1
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines() if line.endswith("FAIL")] == ["dx", "dx", "<dy,"]


@pytest.mark.parametrize(
    "name, message",
    [
        ("layernorm", "did you mean layer_norm?"),
        ("add_layer_norm", "got 'add_layer_norm'"),
        ("", "layer: expected one of embedding"),
    ],
)
def test_an_unknown_layer_is_refused(name, message):
    with pytest.raises(UserError) as error:
        layer.problem(name)
    assert message in str(error.value)


@pytest.mark.parametrize("name", layer.NAMES)
def test_the_reference_is_right_beside_itself(name, tmp_path):
    module = ops.ROWS[name].layer
    file = written(tmp_path, f"from reference.{module} import backward, forward\n")
    for seed in range(2):
        comparison = compare(layer.problem(name, seed), file)
        assert comparison.right, comparison.verdict
        assert comparison.notes == comparison.hints == comparison.known == []


@pytest.mark.parametrize("name", RIGHT)
def test_a_learners_right_layer_is_right(name, tmp_path):
    assert compare(layer.problem(name, 5), written(tmp_path, RIGHT[name])).right


@pytest.mark.parametrize("name, old, new, said", MISTAKES)
def test_a_mistake_is_named(name, old, new, said, tmp_path):
    source = RIGHT[name]
    assert old in source
    comparison = compare(layer.problem(name), written(tmp_path, source.replace(old, new, 1)))
    assert not comparison.right
    text = terminal.render_comparison(comparison, width=100)
    assert said in "\n".join([*comparison.hints, *comparison.known])
    assert said in text
    assert "wrong: " in text.splitlines()[-1]


def test_right_wrong_and_unusable_are_three_statuses(tmp_path):
    right = study("--layer", "layer_norm", "--yours", written(tmp_path, LAYER_NORM))
    assert (right.returncode, right.stderr) == (0, "")
    assert right.stdout.splitlines()[-1].strip() == "right: y, dx, dweight, dbias"
    source = LAYER_NORM.replace("direct - through_mean - through_variance", "direct - through_variance")
    wrong = study("--layer", "layer_norm", "--yours", written(tmp_path, source))
    assert (wrong.returncode, wrong.stderr) == (1, "")
    assert "dx is without through_mean[b,t]" in wrong.stdout
    assert '"layer norm without its mean term" (reference/layer_norm.py, line ' in wrong.stdout
    unusable = study("--layer", "layer_norm", "--yours", tmp_path / "none.py")
    assert (unusable.returncode, unusable.stdout) == (2, "")
    assert unusable.stderr == f"error: yours: there is no file {tmp_path / 'none.py'}\n"


@pytest.mark.parametrize(
    "text, message",
    [
        ("x = 1\n", "has neither a function forward nor a function backward"),
        ("forward = 3\n", "forward is int, expected a function"),
        ("def forward(x)\n    return x\n", "does not import: SyntaxError: expected ':' (mine.py, line 1)"),
        ("import numpy\nnumpy.nothing\n", "has no attribute 'nothing' (line 2)"),
        ("def forward(x, weight, bias):\n    y = x @ weight\n    return y, x\n",
         "mine.py, line 2: forward raised ValueError: matmul"),
        ("def forward(*, none_of_it):\n    return 1\n", "takes no x, expected forward(x, weight, bias)"),
        ("def forward(x):\n    return x\n", "takes no weight, expected forward(x, weight, bias)"),
        ("def forward(x, weight, bias):\n    return 'y'\n", "the result is str, expected an array of numbers"),
        ("def forward(x, weight, bias):\n    raise SystemExit(3)\n", "line 2: forward raised SystemExit: 3"),
        ("def forward(x, weight, bias):\n    return x\ndef backward(dy, saved):\n    return dy\n",
         "forward returned an array of float64, expected a pair: result, saved"),
        ("def backward(dy, saved):\n    return dy, dy\n",
         "backward returned 2 gradients, expected 3: dx, dweight, dbias"),
        ("def backward(dy):\n    return dy\n", "backward raised TypeError"),
        ("def backward(dy, saved):\n    return dy, {}, dy\n", "dweight is dict, expected an array of numbers"),
    ],
)  # fmt: skip
def test_what_is_of_no_use_is_one_line(text, message, tmp_path):
    with pytest.raises(UserError) as error:
        compare(layer.problem("linear"), written(tmp_path, text))
    assert message in str(error.value)
    assert str(error.value).startswith("yours: ")
    assert "\n" not in str(error.value).strip()


def test_one_function_is_enough(tmp_path):
    forward, backward = LINEAR.split("def backward")
    comparison = compare(
        layer.problem("linear"), written(tmp_path, forward.replace("return y, (x, weight)", "return y"))
    )
    assert comparison.right
    assert [tensor.name for tensor in comparison.tensors] == ["y"]
    source = f"import numpy as np\ndef backward{backward}".replace("x, weight = saved", "x, weight, has_bias = saved")
    comparison = compare(layer.problem("linear"), written(tmp_path, source))
    assert comparison.right
    assert [tensor.name for tensor in comparison.tensors] == ["dx", "dweight", "dbias"]
    assert comparison.notes == ["saved is what the forward of reference/linear.py saves"]


def test_gradients_by_name_and_gradients_not_yet_there(tmp_path):
    by_name = LINEAR.replace("return dx, dweight, dbias", 'return {"dx": dx, "weight": dweight, "dbias": dbias}')
    assert compare(layer.problem("linear"), written(tmp_path, by_name)).right
    unfinished = LINEAR.replace("return dx, dweight, dbias", "return dx, dweight, None")
    comparison = compare(layer.problem("linear"), written(tmp_path, unfinished))
    assert not comparison.right
    assert comparison.verdict == "missing: dbias"
    assert "MISSING" in terminal.render_comparison(comparison)


def test_arguments_in_order_where_names_are_their_own(tmp_path):
    """And what a function does not take is the reference's default for both."""
    renamed = ATTENTION.replace("forward(q, k, v)", "forward(queries, keys, values)").replace(
        "    B, H", "    q, k, v = queries, keys, values\n    B, H", 1
    )
    assert compare(layer.problem("attention"), written(tmp_path, renamed)).right
    without_eps = LAYER_NORM.replace("bias, eps=1e-5", "bias").replace("variance + eps", "variance + 1e-5")
    comparison = compare(layer.problem("layer_norm"), written(tmp_path, without_eps))
    assert comparison.right
    assert comparison.notes == ["forward takes no eps: it is the reference's default here, 1e-05"]


def test_an_input_that_is_changed_is_reported(tmp_path):
    source = LINEAR.replace("    y = x @", "    x *= 1.5; x /= 1.5; x[0, 0, 0] = 7.0\n    y = x @").replace(
        "    dx = dy @ weight", "    dx = dy @ weight\n    dy += 1\n    weight[0] = 0"
    )
    comparison = compare(layer.problem("linear"), written(tmp_path, source))
    assert comparison.changed == ["x by forward", "weight by backward", "dy by backward"]
    harmless = LINEAR.replace("    y = x @ weight.T", "    y = x @ weight.T\n    weight[0] += 1e-30\n    weight.sort()")
    comparison = compare(layer.problem("linear"), written(tmp_path, harmless))
    assert not comparison.right
    assert "weight by forward" in comparison.verdict


def test_nan_is_said_to_be_nan(tmp_path):
    source = LAYER_NORM.replace("rstd * (direct", "np.sqrt(-abs(rstd)) * (direct")
    comparison = compare(layer.problem("layer_norm"), written(tmp_path, source))
    assert not comparison.right
    assert comparison.hints == ["30 of 30 elements of dx are NaN, the first dx[0,0,0]: 0 / 0, or an overflow"]
    assert "nan" in terminal.render_comparison(comparison)


def test_gradients_that_fit_a_wrong_forward_are_told_from_others(tmp_path):
    source = ATTENTION.replace("scale = 1 / np.sqrt(D)", "scale = 1 / D")
    verdicts = [t.verdict for t in compare(layer.problem("attention"), written(tmp_path, source)).tensors]
    assert verdicts == ["WRONG", *["WRONG, though it is the gradient of your forward"] * 3]
    both = source.replace("ds = p * (dp - delta)", "ds = p * dp")
    verdicts = [t.verdict for t in compare(layer.problem("attention"), written(tmp_path, both)).tensors]
    assert verdicts == ["WRONG", "WRONG", "WRONG", "WRONG, though it is the gradient of your forward"]


def test_their_code_gets_copies(tmp_path):
    given = layer.problem("linear")
    before = {name: np.array(x) for name, x in given.arguments.items()}
    source = LINEAR.replace("    y = x @ weight.T", "    x[:] = 0\n    weight[:] = 0\n    y = x @ weight.T")
    assert not compare(given, written(tmp_path, source)).right
    for name, array in before.items():
        assert np.array_equal(given.arguments[name], array)


def test_a_known_mistake_leaves_the_layer_sound(tmp_path):
    """Known mistakes are seeded one after another to be compared, and taken out again."""
    source = LAYER_NORM.replace("direct - through_mean - through_variance", "direct - through_mean")
    comparison = compare(layer.problem("layer_norm"), written(tmp_path, source))
    assert "layer norm without its variance term" in comparison.known[0]
    assert all(check.passed for check in layer.checks(layer.problem("layer_norm")))


def test_yours_wants_a_layer(tmp_path):
    done = study("--yours", written(tmp_path, LINEAR))
    assert done.returncode == 2
    assert done.stderr == "error: yours: a file of your own is held against a layer, expected --layer NAME beside it\n"


@pytest.mark.parametrize("name", ["linear", "attention-dropout", "cross_entropy-ignored", "rope", "orpo"])
def test_a_page_has_the_layer_as_its_one_station(name):
    given = layer.problem(name, 1)
    data = layer.page_data(given, layer.checks(given))
    (station,) = data["stations"]
    step = layer.step_of(given)
    for local, key in station["wires"].items():
        assert tuple(data["tensors"][key]["shape"]) == np.shape(step.values[local]), local
    assert {name for equation in step.derivation.backward for name in equation.reads} <= {
        *station["wires"], *station["constants"]
    }  # fmt: skip
    assert len(station["proofs"]) == len(step.gradients)
    for proof in station["proofs"]:
        assert proof["error"] <= proof["bound"]
        assert proof["by_hand"] == step.gradients[proof["tensor"]][tuple(proof["index"])]
    assert station["laws"]
    json.dumps(data, default=str)


def test_out_writes_a_page(tmp_path):
    done = study("--layer", "gelu", "--out", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    assert "gelu, forward and backward" in Path(tmp_path / "page.html").read_text("utf-8")
    done = study("--layer", "gelu", "--text_only", "--out", tmp_path / "other.html")
    assert "dx[b,t,c] = dy[b,t,c] · (Φ(x[b,t,c])" in done.stdout
    assert not Path(tmp_path / "other.html").exists()


@pytest.mark.parametrize("name", ["layer_norm", "attention-dropout", "gelu-tanh", "cross_entropy-ignored", "lora"])
def test_every_change_of_an_equation_is_found_again(name):
    """Results and gradients of the layer with one thing changed: the hint has found a change that gives the same."""
    step = layer.station(name, 1)
    equations = (*step.derivation.forward, *step.derivation.backward)
    wanted = {step.result, *(f"d{argument}" for argument in step.gradients)}
    candidates = [found for equation in equations for found in changes(equation, step)]
    rng, named = np.random.default_rng(0), 0
    with np.errstate(all="ignore"):
        for i in rng.choice(len(candidates), 25, replace=False):
            words, changed = candidates[i]
            theirs = hints.recomputed(step, {changed.tensor: changed}, wanted)
            theirs = {n: theirs[n] for n in [e.tensor for e in equations] if n in theirs}
            theirs = {n: array for n, array in theirs.items() if not hints.same(array, np.asarray(step.values[n]))}
            if theirs and all(np.isfinite(array).all() for array in theirs.values()):
                lines = hints.explain(step, next(iter(theirs)), theirs)
                assert "elements of" not in lines[0], (changed.plain, words, lines)
                named += 1
    assert named > 8
