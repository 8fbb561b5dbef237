"""Two results against each other, by the command: what is called, what is not, and what cannot be compared."""

import copy
import json

import numpy as np
import pytest

from bench import __main__ as bench
from bench import compare, results
from bench.contest import summary
from bench.process import Taken


def taken(rng, seconds, mood, noise=0.02):
    """Five sessions of six rounds in the machine's mood (5, 6), and a little luck of one's own."""
    luck = rng.normal(0, noise, (5, 1)) + rng.exponential(noise, (5, 6))
    rounds = seconds * mood * np.exp(luck)
    return Taken([[{"seconds": float(x)} for x in session] for session in rounds], [{}] * 5, [{"peak_bytes": 100}] * 5)


def document(seed, numpy=1.0, plain=1.2, wild=0.0, cases=("a", "b", "c"), **more):
    """A result in which the machine's mood changes by `wild` from session to session and from run to run."""
    rng = np.random.default_rng(seed)
    hour = np.exp(rng.normal(0, wild))
    found = {}
    for name in cases:
        mood = hour * np.exp(rng.normal(0, wild, (5, 6)))
        who = {"numpy": numpy, "torch": 1.5, "plain": plain}
        entries = {each: taken(rng, seconds, mood) for each, seconds in who.items()}
        found[name] = summary({"work": "train", "batch": 2}, entries, {"torch": 1.0})
    surroundings = {
        "date": "2026-01-01",
        "machine": {"processor": "some", "cores": 2, "memory_bytes": 2**34},
        "python": "3.11",
        "versions": {"numpy": "2.0", "torch": "2.12"},
        "environment": {},
        "commit": "abc",
        "dirty": False,
    }
    return {"format": results.FORMAT, "kind": "cpu", **surroundings, **more, "cases": found}


@pytest.fixture
def run(tmp_path, capsys):
    """Writes the results and compares them: exit status, what was printed, and on stderr."""

    def run(before, after, *arguments):
        for name, content in (("A.json", before), ("B.json", after)):
            if content is not None:
                text = content if isinstance(content, str) else results.as_json(content)
                (tmp_path / name).write_text(text)
        status = bench.main(["compare", str(tmp_path / "A.json"), str(tmp_path / "B.json"), *arguments])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def verdicts(a, b, **options):
    return {(r.case, r.contestant): r.verdict for r in compare.compare(a, b, compare.Options(**options))}


def test_a_result_against_itself_has_no_difference(run):
    a = document(0)
    status, out, _ = run(a, a, "--check")
    assert status == 0
    assert "9 no difference" in out


def test_runs_of_the_same_code_are_hardly_ever_told_apart():
    """Even on a machine whose mood halves and doubles times: the plain loop's change with it."""
    calls = 0
    for seed in range(40):
        a, b = (document(2 * seed + i, wild=0.5) for i in (1, 2))
        calls += any(v in ("slower", "faster") for (_, who), v in verdicts(a, b).items() if who != "plain")
    assert calls <= 5, "5 percent of 40, and chance"


def test_a_planted_slowdown_is_found_named_and_makes_the_status_1(run):
    a, b = document(1, wild=0.1), document(2, numpy=1.2, wild=0.1)
    status, out, _ = run(a, b, "--check")
    assert status == 1
    lines = [line for line in out.splitlines() if "slower by" in line]
    assert [line.split()[:3] for line in lines] == [[case, "numpy", "plain"] for case in "abc"]
    assert run(a, b)[0] == 0, "the status speaks where it is asked to"
    status, out, _ = run(b, a, "--check")
    assert status == 0
    assert out.count("faster by") == 3


def test_a_slow_hour_is_not_blamed_on_the_code():
    """All of the second run takes twice as long: the peer in the same run shows it, times alone do not."""
    a, b = document(3), document(4)
    for case in b["cases"].values():
        for contestant in case["contestants"].values():
            seconds = contestant["seconds"]
            seconds["sessions"] = [[2 * x for x in session] for session in seconds["sessions"]]
    by_ratio, by_time = verdicts(a, b), verdicts(a, b, times=True)
    assert {v for (_, who), v in by_ratio.items() if who != "plain"} == {"no difference"}
    assert set(by_time.values()) == {"slower"}
    slower_control = [r for r in compare.compare(a, b, compare.Options()) if r.contestant == "plain"]
    assert all(row.verdict == "slower" and not row.ours for row in slower_control)


def test_a_small_difference_is_not_called_however_sure(run):
    a = document(5)
    b = copy.deepcopy(a)
    for case in b["cases"].values():
        seconds = case["contestants"]["numpy"]["seconds"]
        seconds["sessions"] = [[1.5 * x for x in session] for session in seconds["sessions"]]
    assert "slower by 50%" in run(a, b, "--least", "3")[1]
    assert "slower" not in run(a, b, "--least", "60")[1]


def other(a, **changes):
    return {**copy.deepcopy(a), **changes}


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"machine": {"processor": "other", "cores": 2}}, "other machine (some, 2 cores, 16 GiB; other, 2 cores)"),
        ({"versions": {"numpy": "2.0", "torch": "2.13"}}, "other versions (torch 2.12, 2.13)"),
        ({"python": "3.12"}, "other versions (python 3.11, 3.12)"),
        ({"environment": {"OMP_NUM_THREADS": "1"}}, "other environment (nothing set; OMP_NUM_THREADS=1)"),
    ],
)
def test_what_is_not_comparable_says_why_and_is_compared_on_request(run, changes, why):
    a = document(6)
    b = other(a, **changes)
    status, out, _ = run(a, b, "--json")
    rows = json.loads(out)["rows"]
    assert status == 0
    assert {row["verdict"] for row in rows} == {"not comparable"}
    assert all(row["why"].startswith(why) for row in rows)
    status, _, error = run(a, b, "--check")
    assert status == 2
    assert error.startswith(f"error: nothing could be judged: {why}")
    assert "9 no difference" in run(a, b, "--anyway")[1]


def test_other_settings_and_missing_cases_are_said_and_the_rest_is_compared(run):
    a, b = document(7), document(8, cases=("a", "b", "d"))
    b["cases"]["b"]["settings"]["batch"] = 4
    rows = {(row["case"], row["contestant"]): row for row in json.loads(run(a, b, "--json")[1])["rows"]}
    assert rows["a", "numpy"]["verdict"] == "no difference"
    assert rows["b", "numpy"]["why"] == "other batch (2, 4)"
    assert rows["c", "numpy"]["why"] == "only in A"
    assert rows["d", "numpy"]["why"] == "only in B"


def test_results_without_rounds_or_of_one_session_are_not_judged(run):
    a, b = document(9, cases=("a",)), document(10, cases=("a",))
    b["cases"]["a"]["contestants"]["numpy"]["seconds"]["sessions"] = None
    b["cases"]["a"]["contestants"]["torch"]["seconds"]["sessions"] = [[1.0, 2.0]]
    out = run(a, b)[1]
    assert "not judged: B kept no rounds" in out
    assert "not judged: B kept one session, two are needed" in out


def test_a_gpu_s_measurements_are_compared_in_units_of_a_peer():
    def measured(ours):
        rng = np.random.default_rng(0)
        place = {
            "operator": "gelu",
            "direction": "forward",
            "dtype": "bfloat16",
            "setting": "",
            "x": 1024,
            "unit": "GB/s",
        }
        found = []
        for peer, seconds in (("twingrad", ours), ("torch", 1.0)):
            sessions = (seconds * np.exp(rng.normal(0, 0.01, (5, 10)))).tolist()
            found.append({**place, "peer": peer, "seconds": seconds, "sessions": sessions})
        return other(document(0), kind="gpu", cases={"measurements": found})

    found = verdicts(measured(1.0), measured(1.2))
    assert found == {
        ("gelu forward bfloat16 1024", "twingrad"): "slower",
        ("gelu forward bfloat16 1024", "torch"): "no difference",
    }


@pytest.mark.parametrize(
    "before, after, message",
    [
        (None, None, "A.json: no such file; expected a result"),
        ("{", None, "A.json: not a result: expected JSON (Expecting property name"),
        ("[1]", None, "A.json: not a result: expected an object with format, kind and cases"),
        ('{"format": 1, "kind": "cpu", "cases": {}}', None, "A.json: has format 1, and only format 2 is read"),
        ('{"format": 2, "kind": "cpu", "cases": []}', None, "A.json: not a result: expected cases to be"),
    ],
)
def test_a_mistake_is_one_line(run, before, after, message):
    status, out, error = run(before, after)
    assert (status, out) == (2, "")
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_kinds_and_what_has_no_times(run):
    a = document(11)
    assert "one kind, got 'cpu' and 'layers'" in run(a, other(a, kind="layers"))[2]
    static = other(a, kind="static", cases={"x": {"registers": 3}})
    assert "kind 'static' has no times" in run(static, static)[2]
    for wrong in ("fast", -1.0, float("nan")):
        damaged = copy.deepcopy(a)
        damaged["cases"]["b"]["contestants"]["torch"]["seconds"]["sessions"][1][2] = wrong
        assert "kind 'cpu' has no times that could be compared" in run(a, damaged)[2]
    for changes in ({"settings": None}, {"contestants": {"torch": {"seconds": {"median": 1.0, "sessions": [[], []]}}}}):
        damaged = copy.deepcopy(a)
        damaged["cases"]["b"] |= changes
        assert "kind 'cpu' has no times that could be compared" in run(a, damaged)[2]
    for changes in ({"versions": []}, {"environment": []}, {"machine": {"memory_bytes": "much"}}):
        assert "not a result: expected" in run(a, other(a, **changes))[2]
    assert "least: expected at least 0" in run(a, a, "--least", "-1")[2]


def test_a_control_of_fewer_sessions_is_none():
    """Its rounds would be in none of the others' sessions."""
    a = document(13)
    b = copy.deepcopy(a)
    plain = b["cases"]["a"]["contestants"]["plain"]["seconds"]
    plain["sessions"] = plain["sessions"][:1]
    rows = {(row.case, row.contestant): row for row in compare.compare(a, b, compare.Options())}
    assert rows["a", "numpy"].control is None
    assert rows["a", "numpy"].verdict == "no difference"
    assert rows["b", "numpy"].control == "plain"
