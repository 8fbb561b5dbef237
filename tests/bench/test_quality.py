"""The benchmark of training quality: real trainings of a tiny model, and what it says of trainings that part."""

import dataclasses

import numpy as np
import pytest

from bench import __main__ as bench
from bench import quality, results

pytest.importorskip("torch")


def log(losses, every=2):
    """A run's log whose loss is known at every other step."""
    steps = np.arange(len(losses) * every - 1)
    values = np.full(len(steps), np.nan)
    values[::every] = losses
    return {"step": steps, "val_loss": values, "seconds": steps * 0.5}


def test_the_target_is_reached_at_the_first_evaluation_that_is_as_low():
    found = quality.reached(log([3.0, 2.0, 2.5, 1.0]), target=2.0)
    assert (found["steps"], found["val_loss"], found["seconds"]) == (3, 2.0, 1.0)
    assert found["evaluated_steps"] == [1, 3, 5, 7]
    assert found["evaluated_losses"] == [3.0, 2.0, 2.5, 1.0]
    never = quality.reached(log([3.0, 2.0]), target=1.0)
    assert (never["steps"], never["val_loss"], never["seconds"]) == (None, 2.0, None)


@pytest.mark.parametrize(
    "others, good",
    [
        ([3.0, 2.0, 1.0], True),
        ([3.0, 2.0 * (1 + 5e-5), 1.0], True),
        ([3.0, 2.0 * (1 + 2e-4), 1.0], False),
        ([3.0, 2.2, 2.0], False),
        ([3.0, 2.9, 2.8], False),
    ],
)
def test_engines_coincide_in_steps_and_loss_or_not(others, good):
    engines = {
        name: quality.reached(log(losses), 2.1) for name, losses in (("numpy", [3.0, 2.0, 1.0]), ("torch", others))
    }
    assert quality.coincide(engines, 1e-4)["coincides"] is good


def test_real_trainings_coincide_and_the_status_says_so(tmp_path, monkeypatch, capsys):
    tiny = dataclasses.replace(quality.CASES["tiny"], engines=("numpy", "torch"), steps=12, target=4.5)
    monkeypatch.setattr(quality, "CASES", {"tiny": tiny})
    assert bench.main(["quality", "--out", str(tmp_path / "quality.json")]) == 0
    case = results.read(tmp_path / "quality.json")["cases"]["tiny"]
    assert case["coincides"]
    assert case["difference_anywhere"] < 1e-5
    assert case["engines"]["numpy"]["steps"] == case["engines"]["torch"]["steps"]
    assert case["engines"]["numpy"]["evaluated_losses"][0] > case["engines"]["numpy"]["val_loss"]
    monkeypatch.setattr(quality, "CASES", {"tiny": dataclasses.replace(tiny, engines=("numpy",), steps=1, target=0.1)})
    assert bench.main(["quality"]) == 1, "never reached"
    said = capsys.readouterr().out
    assert "not reached" in said
    assert "DO NOT COINCIDE" in said


def test_a_training_that_fails_is_one_line(monkeypatch, capsys):
    broken = dataclasses.replace(quality.CASES["tiny"], data="no such text")
    monkeypatch.setattr(quality, "CASES", {"tiny": broken})
    assert bench.main(["quality"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: tiny, numpy: error: ")
    assert "no such text" in error
    assert error.count("\n") == 1
