"""Pairs: both orders, what replies choose, and the share of wins with its interval."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt.errors import UserError
from gpt.evaluate.servers import ServerError, UnavailableError
from gpt.evaluate.win_rate import WinRateConfig, choice_prompt, compare, parse_choice, run, wilson, win_rate
from gpt.options import parse_config
from tests.gpt.evaluate import fake_server as fake

KEYS = "model_response", "other_response"


def prefers(text):
    """A judge that chooses the response that contains the text, wherever it stands."""

    def ask(prompt):
        first, second = prompt.split("Response A: ")[1].split("Response B: ")
        return "tie" if (text in first) == (text in second) else "A" if text in first else "B"

    return ask


def command(*arguments):
    run(parse_config(WinRateConfig, list(map(str, arguments)), prog="twingrad evaluate compare"))


def test_the_prompt():
    entry = {"instruction": "Spell it right.", "input": "recieve", "output": "receive"}
    assert choice_prompt(entry, "recive", "receeve") == (
        "Given the input `Below is an instruction that describes a task. Write a response that appropriately completes "
        "the request.\n\n### Instruction:\nSpell it right.\n\n### Input:\nrecieve` and correct output `receive`, which "
        "of two model responses is better?\n\nResponse A: `recive`\n\nResponse B: `receeve`\n\n"
        "Respond with the letter A or B only, or with the word tie if they are equally good."
    )


@pytest.mark.parametrize(
    "reply, choice",
    [
        ("A", "A"),
        ("b", "B"),
        (" B.\n", "B"),
        ("**A**", "A"),
        ("(B)", "B"),
        ("[[A]]", "A"),
        ("tie", "tie"),
        ("Tie.", "tie"),
        ("Response B", "B"),
        ("Answer: A", "A"),
        ("The answer is: B", "B"),
        ("Verdict: Response A", "A"),
        ("The verdict is a tie", "tie"),
        ("The better response is Response B.", "B"),
        ("Response A is better than Response B, which is wrong.", "A"),
        ("Response B is clearly better.", "B"),
        ("I prefer Response B.", "B"),
        ("It's a tie.", "tie"),
        ("Response A and Response B are equally good.", "tie"),
        ("Response A is short.\n\nB", "B"),
        ("<think>A\nA is better</think>B", "B"),
        ("<think>A", None),
        ("", None),
        ("C", None),
        ("A or B", None),
        ("A\nB", None),
        ("Response A is not better", None),
        ("Response A is short, Response B is long.", None),
        ("A better response would be hard to find", None),
        ("There is no better answer: a lot is right", None),
        ("Both are bad", None),
    ],
)
def test_choices_of_replies(reply, choice):
    assert parse_choice(reply) == choice


PIECES = [
    "A",
    "B",
    "tie",
    "Response ",
    " is better",
    "Verdict: ",
    "[[",
    "]]",
    "<think>",
    "</think>",
    " ",
    "\n",
    "a ",
    "not",
]


@given(st.text() | st.lists(st.sampled_from(PIECES)).map("".join))
def test_no_reply_is_too_strange(reply):
    assert parse_choice(reply) in ("A", "B", "tie", None)


@pytest.mark.parametrize("piece", PIECES)
def test_long_replies_are_read_at_once(piece):
    parse_choice(piece * 100_000)  # hours, if a pattern were quadratic


def test_one_that_is_better_in_both_orders_wins(entries):
    entries[0]["model_response"] = entries[3]["other_response"] = "the best"
    entries[4]["model_response"] = entries[4]["other_response"] = "the best"
    result = compare(entries, entries, prefers("best"), *KEYS)
    assert result.outcomes == ["win", "tie", "tie", "loss", "tie", "tie"]
    assert (result.wins, result.ties, result.losses, result.n, result.by_position) == (1, 4, 1, 6, 0)
    swapped = compare(entries, entries, prefers("best"), *KEYS[::-1])
    assert (swapped.wins, swapped.losses) == (1, 1)


@pytest.mark.parametrize("always", ["A", "B"])
def test_a_judge_that_goes_by_position_decides_nothing(entries, always):
    result = compare(entries, entries, lambda prompt: always, *KEYS)
    assert (result.ties, result.by_position, result.share) == (6, 6, 0)


def test_equal_responses_tie_and_are_not_asked_about(entries):
    def never(prompt):
        raise AssertionError("asked")

    assert compare(entries, entries, never, "output", "output").ties == 6


def test_replies_that_choose_nothing_are_no_ties(entries):
    def ask(prompt):
        if "number 2." in prompt:
            return "who knows"
        if "number 3." in prompt and "Response A: `Number" in prompt:
            raise ServerError("too long")
        return prefers("Number")(prompt)

    result = compare(entries, entries, ask, *KEYS)
    assert result.outcomes == ["win", None, None, "win", "win", "win"]
    assert (result.n, result.unparsable, result.failed) == (4, {2: "who knows"}, {3: "too long"})


def test_goes_on_where_it_was(entries, tmp_path):
    asked = []

    def ask(prompt):
        asked.append(prompt)
        if len(asked) == 4:
            raise UnavailableError("gone")
        return prefers("Number")(prompt)

    with pytest.raises(UserError, match="gone; 3 of 12 questions are answered and kept"):
        compare(entries, entries, ask, *KEYS, out=tmp_path / "out")
    assert compare(entries, entries, ask, *KEYS, out=tmp_path / "out").wins == 6
    assert len(asked) == 4 + 9
    lines = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()][1:]
    assert [(line["entry"], line["first"]) for line in lines] == [(i, order) for i in range(1, 7) for order in "ab"]
    assert [line["choice"] for line in lines] == ["A", "B"] * 6
    with pytest.raises(UserError, match="holds replies with key"):
        compare(entries, entries, ask, *KEYS[::-1], out=tmp_path / "out")


def test_responses_to_other_tasks_are_refused(entries):
    other = [dict(entry) for entry in entries]
    other[2]["output"] = "Three."
    with pytest.raises(UserError, match="entry 3: expected responses to the same task, got two with another output"):
        compare(entries, other, prefers("x"))
    with pytest.raises(UserError, match="same entries, got 6 and 5"):
        compare(entries, entries[:5], prefers("x"))
    with pytest.raises(UserError, match='entry 1: expected a text as "third"'):
        compare(entries, entries, prefers("x"), "model_response", "third")


SCORES = st.none() | st.integers(0, 100)


@given(st.lists(st.tuples(SCORES, SCORES), max_size=50))
def test_wins_ties_and_losses_are_all_that_was_compared(pairs):
    a, b = [a for a, _ in pairs], [b for _, b in pairs]
    result, swapped = win_rate(a, b), win_rate(b, a)
    assert result.wins + result.ties + result.losses == result.n == sum(None not in pair for pair in pairs)
    assert (result.wins, result.ties, result.losses) == (swapped.losses, swapped.ties, swapped.wins)
    low, high = result.interval
    assert 0 <= low <= high <= 1
    assert low <= result.share <= high if result.n else math.isnan(result.share)


@given(
    st.lists(st.tuples(st.sampled_from(["A", "B", "tie", "?"]), st.sampled_from(["A", "B", "tie", "?"])), min_size=1)
)
def test_so_they_are_of_choices(replies):
    entries = [
        {"instruction": f"{i}", "output": "", "model_response": f"a{i}", "other_response": f"b{i}"}
        for i in range(len(replies))
    ]
    given_replies = iter([reply for pair in replies for reply in pair])
    result = compare(entries, entries, lambda prompt: next(given_replies), *KEYS)
    assert result.wins + result.ties + result.losses == result.n
    assert result.n + len(result.unparsable) == len(entries)
    assert result.wins == replies.count(("A", "B"))
    assert result.losses == replies.count(("B", "A"))


def test_scores_that_are_not_of_the_same_entries_are_refused():
    assert win_rate([1, 2.5, math.nan], [1, 2, 3]).outcomes == ["tie", "win", None]
    with pytest.raises(UserError, match="got 2 and 1"):
        win_rate([1, 2], [1])


@pytest.mark.parametrize(
    "successes, n, low, high",
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3, to 4 decimals.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_as_published(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilsons_ends_are_where_the_score_test_rejects(trial):
    """The ends are the probabilities q that are 1.96 of their own standard deviations away from p."""
    successes, n = trial
    p = successes / n
    low, high = wilson(successes, n)
    assert 0 <= low <= p <= high <= 1
    for q in {low, high} - {0.0, 1.0}:
        assert abs(p - q) == pytest.approx(1.959963984540054 * np.sqrt(q * (1 - q) / n), rel=1e-6)
    assert wilson(n - successes, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_wilson_without_trials_knows_nothing():
    assert wilson(0, 0) == (0, 1)
    with pytest.raises(UserError, match="from 0 to the 3 trials, got 4"):
        wilson(4, 3)


def test_the_command_with_two_keys_of_one_file(server, entries, tmp_path, capsys):
    path = tmp_path / "responses.json"
    path.write_text(json.dumps(entries))
    server.plan = [fake.streams(prefers("Number"))]
    command("--responses", path, "--other_key", "other_response", "--url", server.url)
    shown = capsys.readouterr().out
    assert "Compared: 6 of 6\nWins 6, ties 0, losses 0\nShare of wins: 100.0% (95% interval 61.0% to 100.0%)" in shown
    assert "entry 1: Name the number 1.\n  first   Number 1!\n  second  The number is 1.\n  better  first\n" in shown
    assert len(server.requests) == 12
    assert (tmp_path / "responses.against.other_response.llama3.jsonl").exists()


def test_the_command_with_two_files(server, entries, tmp_path, capsys):
    paths = tmp_path / "one.json", tmp_path / "two.json"
    for path, key in zip(paths, KEYS, strict=True):
        path.write_text(json.dumps([{**entry, "model_response": entry[key]} for entry in entries]))
    server.plan = [fake.streams("A"), fake.streams("no idea"), fake.streams("A")]
    command("--responses", paths[0], "--other", paths[1], "--limit", "3", "--url", server.url)
    shown = capsys.readouterr().out
    assert "Compared: 2 of 3; 1 could not be compared\nWins 0, ties 2 (2 chosen by position), losses 0" in shown
    assert "entry 1: 'no idea'" in shown
    assert (tmp_path / "one.against.two.model_response.llama3.jsonl").exists()
    paths[1].write_text("[{}]")
    with pytest.raises(UserError, match=r"two\.json: entry 1: expected a text"):
        command("--responses", paths[0], "--other", paths[1])


def test_the_command_wants_two_sets_of_responses(tmp_path):
    for arguments in ([], ["--responses", "x"], ["--responses", "x", "--other_key", "model_response"]):
        with pytest.raises(UserError, match="expected a"):
            command(*arguments)
