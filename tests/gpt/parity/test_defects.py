"""The checks, checked: every seeded defect is caught, and at the right tensor."""

import json

import pytest

from gpt import cli
from gpt.parity import check, defects
from gpt.parity.defects import DEFECTS, Defect
from reference import gelu, linear

pytest.importorskip("torch")

HARMLESS = Defect("an innocent change", "linear", "y += bias", "y += 1 * bias", "linear", "dbias")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    with check.one_thread():
        yield


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_every_defect_is_caught_at_the_right_tensor(defect):
    result = defects.seed(defect).result
    assert result is not None, "no check noticed"
    assert result.operator == defect.check
    assert result.tensor == defect.tensor


def test_a_loose_test_misses_some_of_them():
    """Which is why the bounds are what they are."""
    assert not defects.seed(next(d for d in DEFECTS if "digits of GELU" in d.name)).loose
    assert defects.seed(next(d for d in DEFECTS if d.name == "scores not scaled")).loose


def fail_within(defect: Defect) -> None:
    with defect.seeded():
        raise KeyError


def test_a_seeded_module_is_sound_again_afterwards():
    before, defect = dict(vars(gelu)), next(d for d in DEFECTS if "digits of GELU" in d.name)
    with defect.seeded():
        assert before["A"] != gelu.A
        assert before["forward"] is not gelu.forward
    assert dict(vars(gelu)) == before
    with pytest.raises(KeyError):
        fail_within(defect)
    assert dict(vars(gelu)) == before


@pytest.mark.parametrize("old, count", [("there is no such text", 0), ("dy", None)])
def test_a_defect_whose_text_is_not_there_once_is_an_error(old, count):
    stale = Defect("stale", "linear", old, "", "linear", "dx")
    times = linear.__loader__.get_source("reference.linear").count(old) if count is None else count
    with pytest.raises(ValueError, match=f"defect 'stale': its text occurs {times} times in reference/linear.py"):
        stale.altered_source()


def test_a_change_that_is_no_defect_is_reported_as_missed(monkeypatch, capsys):
    monkeypatch.setattr(defects, "DEFECTS", (HARMLESS,))
    assert cli.main(["check", "--defects"]) == 1
    shown = capsys.readouterr().out
    assert "MISSED: linear must name dbias, it found nothing" in shown
    assert "0 of 1 defects caught" in shown


def test_a_check_that_fails_at_another_tensor_has_not_caught_it(monkeypatch, capsys):
    elsewhere = Defect("named wrongly", "linear", "y += bias", "y += 2 * bias", "linear", "dweight")
    monkeypatch.setattr(defects, "DEFECTS", (elsewhere,))
    assert cli.main(["check", "--defects", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is False
    assert report["defects"][0]["caught"] is False
    assert report["defects"][0]["caught_by"]["tensor"] == "dbias"


def test_the_command_shows_what_was_altered_and_what_caught_it(capsys):
    assert cli.main(["check", "--defects", "embedding"]) == 0
    shown = capsys.readouterr().out
    assert "tied head counted once  (reference/embedding.py)" in shown
    assert "    - dweight[found] += one" in shown
    assert "    + dweight[found] = one" in shown
    assert "    caught: model tied [float64] gradients: tok_emb.weight is off by " in shown
    assert "2 of 2 defects caught" in shown
