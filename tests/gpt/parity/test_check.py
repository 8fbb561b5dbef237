"""What a check reports: errors and bounds, failures by name, what was left out, and the exit status."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt import cli
from gpt.parity import check, model
from gpt.parity.gates import GATES, Result, distance, error_of
from gpt.parity.ops import ROWS
from gpt.parity.subjects import REFERENCE
from reference import gelu

ROOT = Path(__file__).parents[3]
SOUND_BACKWARD, NUMBERS = gelu.backward, itertools.count(1)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("error", [math.nan, math.inf, 1.1e-7])
def test_neither_nan_nor_infinity_nor_more_than_the_bound_passes(error):
    assert not Result("linear", "autograd", "5x7", "y", error, 1e-7).passed


def test_an_error_of_the_bound_itself_passes():
    assert Result("linear", "repeats", "5x7", "y", 0.0, 0.0).passed


@pytest.mark.parametrize("measure", [distance, error_of])
def test_errors_are_relative_and_see_nan_and_shapes(measure):
    b = np.array([3.0, -4.0])
    assert measure(b * 1.01, b) == pytest.approx(0.01)
    assert measure(b, b) == 0
    assert math.isnan(measure(np.array([3.0, np.nan]), b))
    assert math.isnan(measure(b, np.array([3.0, np.nan])))
    assert measure(b[None], b) == math.inf
    assert measure(b, np.zeros(2)) == math.inf
    assert measure(np.zeros(2), np.zeros(2)) == 0


def test_an_error_is_relative_to_the_largest_entry():
    assert error_of(np.array([100.0, 1.0]), np.array([100.0, 0.0])) == pytest.approx(0.01)


def failures(gate: str, row: str = "gelu") -> list[Result]:
    results = [r for case in GATES[gate].cases(ROWS[row]) for r in GATES[gate].results(ROWS[row], case)]
    return [result for result in results if not result.passed]


def off_by_a_thousandth(dy, saved):
    return SOUND_BACKWARD(dy, saved) * dy.dtype.type(1.001)


def off_by_the_eleventh_digit(dy, saved):
    return SOUND_BACKWARD(dy, saved) * dy.dtype.type(1 + 1e-11)


def off_by_eight_roundings(dy, saved):
    return SOUND_BACKWARD(dy, saved) * dy.dtype.type(1 + 8 * np.finfo(dy.dtype).eps)


def other_each_time(dy, saved):
    return SOUND_BACKWARD(dy, saved) * dy.dtype.type(next(NUMBERS))


def changes_its_input(dy, saved):
    dx = SOUND_BACKWARD(dy, saved)
    dy *= 2
    return dx


def returns_its_input(dy, saved):
    dy[...] = SOUND_BACKWARD(dy, saved)
    return dy


def always_float64(dy, saved):
    return SOUND_BACKWARD(dy, saved).astype(np.float64)


def without_its_last_row(dy, saved):
    return SOUND_BACKWARD(dy, saved)[:-1]


@pytest.mark.parametrize(
    "gate, backward, tensor",
    [
        ("differences", off_by_a_thousandth, "dx"),
        ("laws", off_by_a_thousandth, "<dy, J v>"),
        ("autograd", off_by_the_eleventh_digit, "dx"),
        ("rounding", off_by_eight_roundings, "dx"),
        ("conduct", other_each_time, "dx repeated"),
        ("conduct", changes_its_input, "dy changed"),
        ("conduct", returns_its_input, "dx in the memory of dy"),
        ("conduct", always_float64, "dtype of dx"),
        ("conduct", without_its_last_row, "shape of dx"),
    ],
)
def test_each_gate_notices_what_it_is_for(monkeypatch, gate, backward, tensor):
    if check.missing(GATES[gate].needs):
        pytest.skip(f"{GATES[gate].needs} is not installed")
    assert not failures(gate)
    monkeypatch.setattr(gelu, "backward", backward)
    found = failures(gate)
    assert tensor in {result.tensor for result in found}
    assert {(result.operator, result.gate) for result in found} == {("gelu", gate)}


def test_an_operator_that_raises_has_failed_and_says_why(monkeypatch):
    def fail(dy, saved):
        raise IndexError("out of bounds")

    monkeypatch.setattr(gelu, "backward", fail)
    found = failures("differences")
    assert len(found) == len(ROWS["gelu"].cases)
    assert "IndexError: out of bounds" in str(found[0])


def test_a_gradient_that_is_nan_has_failed(monkeypatch):
    sound = gelu.backward
    monkeypatch.setattr(gelu, "backward", lambda dy, saved: sound(dy, saved) * np.nan)
    for gate in ("differences", "laws", "conduct"):
        assert failures(gate), gate


# ---------------------------------------------------------------- the command


def test_a_table_shows_each_operator_with_each_gate_s_error_and_bound(capsys):
    assert cli.main(["check", "gelu"]) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert lines[0].split() == ["operator", *(gate for gate in REFERENCE.gates if not check.missing(GATES[gate].needs))]
    assert "1e-7" in lines[1]
    assert [line.split()[0] for line in lines[2:4]] == ["gelu", "gelu-tanh"]
    assert shown.rstrip().endswith("all within their bounds")
    assert "\033" not in shown


def test_a_failure_is_exit_status_1_and_names_operator_gate_case_and_tensor(monkeypatch, capsys):
    sound = gelu.backward
    monkeypatch.setattr(gelu, "backward", lambda dy, saved: 1.001 * sound(dy, saved))
    assert cli.main(["check", "gelu-tanh", "dropout"]) == 1
    shown = capsys.readouterr().out
    assert "FAILED  gelu-tanh [37] differences: dx is off by 0.001, bound 1e-07, and " in shown
    assert "beyond their bounds" in shown
    assert "FAILED  dropout" not in shown


def test_json_holds_every_measurement(monkeypatch, capsys):
    assert cli.main(["check", "dropout", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is True
    assert {result["operator"] for result in report["results"]} == {"dropout"}
    assert set(report["results"][0]) == {"operator", "gate", "case", "tensor", "error", "bound", "note", "passed"}
    sound = gelu.backward
    monkeypatch.setattr(gelu, "backward", lambda dy, saved: sound(dy, saved) * np.nan)
    assert cli.main(["check", "gelu", "--json"]) == 1
    report = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert report["passed"] is False
    assert None in [result["error"] for result in report["results"] if not result["passed"]]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["atention"], "atention: no such operator; did you mean attention?"),
        (["modle"], "modle: no such operator; did you mean model?"),
        (["--steps", "-1"], "argument --steps: expected a whole number of at least 0, got '-1'"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--dtype", "float16"], "dtype: models train in float64 and float32, not in float16"),
        (["--kernel", "nowhere.py:norm"], "--kernel FILE.py:FUNCTION wants --op OP, and no other operators"),
        (["--op", "layer_norm"], "--op layer_norm says what --kernel computes; expected --kernel FILE.py:FUNCTION too"),
        (["--kernel", "nowhere.py:norm", "--op", "layer_norm"], "kernel: there is no file nowhere.py"),
        (["--kernel", "nowhere", "--op", "layer_norm"], "kernel: expected FILE.py:FUNCTION, got 'nowhere'"),
        (["--kernel", f"{__file__}:nothing", "--op", "layer_norm"], f"kernel: {__file__} has no function nothing"),
        (
            ["--kernel", f"{__file__}:failures", "--op", "layernorm"],
            "layernorm: no such operator; did you mean layer_norm?",
        ),
        (["layer_norm", "--steps", "3"], "--steps: of models in lockstep, and none are asked for: expected"),
        (["layer_norm", "--dtype", "float32"], "--dtype: of models in lockstep"),
        (["model", "kernels", "--steps", "3"], "--steps: of models in lockstep"),
        (["--kernel", "mine.py:norm", "--op", "layer_norm", "--steps", "3"], "--steps: of models in lockstep"),
        (["--defects", "--steps", "3"], "--steps: of models in lockstep"),
        (["--defects", "--dtype", "float32"], "--dtype: of models in lockstep"),
        (["--defect"], "twingrad check has no option --defect; did you mean --defects?"),
        (["--defects", "atention"], "atention: no defects are known of it; did you mean attention?"),
    ],
)
def test_a_mistake_in_the_command_is_one_line_and_status_2(arguments, message, capsys):
    assert cli.main(["check", *arguments]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {message}")
    assert shown.count("\n") == 1


def test_model_alone_checks_no_operator(capsys):
    assert cli.main(["check", "model", "--steps", "2", "--dtype", "float64", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    models = {f"model {name}" for name in model.CONFIGS}
    assert {result["operator"] for result in report["results"]} == models
    gates = {result["gate"] for result in report["results"]}
    assert "differences" in gates
    assert "lockstep float32" not in gates


def test_without_pytorch_the_rest_is_checked_and_what_is_left_out_is_named():
    code = "import sys; sys.modules['torch'] = None; from gpt.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "check", "gelu", "model"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for what in ("gate autograd", "gate rounding", "model trace", "model gradients", "model optimizer"):
        assert f"left out  {what}: torch is not installed: pip install 'twingrad[torch]'" in done.stdout
    assert "differences" in done.stdout.splitlines()[0]
    assert "autograd" not in done.stdout.splitlines()[0]


def test_pytorch_has_its_threads_back_after_a_check():
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    with check.one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
