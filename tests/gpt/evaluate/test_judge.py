"""Scores: the prompt, what replies mean, and a judge that can be interrupted, killed and asked to go on."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt.errors import UserError
from gpt.evaluate.asking import FAILURES
from gpt.evaluate.judge import JudgeConfig, judge, parse_score, run, score_prompt
from gpt.evaluate.progress import Bar, Lines, Progress, create_progress
from gpt.evaluate.servers import ServerError, UnavailableError
from gpt.options import parse_config
from gpt.tokenizers import ByteTokenizer
from gpt.weights.native import save_model
from reference.config import PRESETS
from reference.init import initialize
from reference.torch_rng import Generator
from tests.gpt.evaluate import fake_server as fake

ROOT = Path(__file__).parents[3]


class Judge:
    """Replies by what a prompt contains, or by `default`; what it raises instead, it raises."""

    settings = {"model": "a judge"}  # noqa: RUF012

    def __init__(self, default="85", **replies):
        self.default, self.replies, self.prompts = default, replies, []

    def __call__(self, prompt):
        self.prompts.append(prompt)
        reply = next((reply for n, reply in self.replies.items() if f"number {n[1:]}." in prompt), self.default)
        if isinstance(reply, BaseException):
            raise reply
        return reply


class Told(Progress):
    def __init__(self):
        self.lines, self.states = [], []

    def step(self, text):
        self.states.append(text)

    def line(self, text):
        self.lines.append(text)


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()][1:]


def command(responses, *arguments):
    run(parse_config(JudgeConfig, ["--responses", str(responses), *arguments], prog="twingrad evaluate judge"))


@pytest.fixture
def responses(tmp_path, entries):
    path = tmp_path / "responses.json"
    path.write_text(json.dumps(entries))
    return path


def test_the_prompt_is_the_books():
    entry = {"instruction": "Spell it right.", "input": "recieve", "output": "receive"}
    task = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nSpell it right."
    )
    for given_input, text in (("recieve", "\n\n### Input:\nrecieve"), ("", ""), (None, "")):
        asked = (
            f"Given the input `{task}{text}` and correct output `receive`, score the model response `recive` "
            "on a scale from 0 to 100, where 100 is the best score."
        )
        entry["input"] = given_input
        assert score_prompt(entry, "recive") == asked + " Respond with the integer number only."
        assert score_prompt(entry, "recive", "verbose") == asked


@pytest.mark.parametrize(
    "reply, score",
    [
        ("85", 85),
        (" 85\n", 85),
        ("0", 0),
        ("100", 100),
        ("Score: 85", 85),
        ("**Score:** 85/100", 85),
        ("**Score**: 85", 85),
        ("The score is 85.", 85),
        ("85/100", 85),
        ("**85**", 85),
        ("_85_", 85),
        ("`85`", 85),
        ("85%", 85),
        ("85.", 85),
        ("85.5", 86),
        ("84.4", 84),
        ("I'd say 85 out of 100.", 85),
        ("85 points out of a possible 100, as 2 of 3 words are right", 85),
        ("85 (out of 100)", 85),
        ("On a scale from 0 to 100, I would give it 85", 85),
        ("Score (0-100): 85", 85),
        ("There are 2 mistakes in 3 lines.\n\nScore: 85", 85),
        ("85\n\nThere are 3 mistakes.", 85),
        ("85. Yes, 85.", 85),
        ('{"score": 85, "mistakes": 2}', 85),
        ("3/5 words are right, 85/100", 85),
        ("0/100", 0),
        ("<think>90? No, 80.</think>85", 85),
        ("<THINK>\n90\n</THINK>\n\n85", 85),
        ("90? No.</think>\n85", 85),
        ("<think>90</think><think>80</think>85", 85),
        ("<think>85", None),
        ("<think>85</think>", None),
        ("abc", None),
        ("", None),
        ("150", None),
        ("100.4", None),
        ("Score: 150", None),
        ("150/100", None),
        ("-5", None),
        ("−5", None),
        ("Score: -5", None),
        ("8/10", None),
        ("Score: 8/10", None),
        ("8 out of 10", None),
        ("Score: 85/1000", None),
        ("80 or 90", None),
        ("80-90", None),
        ("Score: 80-90", None),
        ("between 80 and 90", None),
        ("Accuracy: 80/100, style: 90/100", None),
        ("Score: 80. No, score: 90.", None),
        ("0 to 100", None),
        ("1,000", None),
        ("85th", None),
        ("x85", None),
        ("1e1", None),
        ("85.1.2", None),
        ("٨٥", None),
        ("9" * 5000, None),
    ],
)
def test_scores_of_replies(reply, score):
    assert parse_score(reply) == score


@given(st.integers(0, 100), st.sampled_from(["{}", " {}\n", "Score: {}", "{}/100", "**{}**", "I'd say {} out of 100."]))
def test_every_score_in_range_is_read(score, form):
    assert parse_score(form.format(score)) == score
    assert parse_score(f"<think>{100 - score}</think>{form.format(score)}") == score


@given(st.integers().filter(lambda n: not 0 <= n <= 100), st.sampled_from(["{}", "Score: {}", "{}/100", "**{}**"]))
def test_no_score_out_of_range_is_read(score, form):
    assert parse_score(form.format(score)) is None


PIECES = [
    "85",
    "9",
    "-",
    "–",
    "/",
    "100",
    " out of ",
    "Score",
    ":",
    ".",
    ",",
    "<think>",
    "</think>",
    " ",
    "\n",
    "*",
    "_",
    "to",
]


@given(st.text() | st.lists(st.sampled_from(PIECES)).map("".join))
def test_no_reply_is_too_strange(reply):
    score = parse_score(reply)
    assert score is None or (type(score) is int and 0 <= score <= 100)


@pytest.mark.parametrize("piece", PIECES)
def test_long_replies_are_read_at_once(piece):
    parse_score(piece * 100_000)  # hours, if a pattern were quadratic


def test_the_average_is_of_what_has_a_score(entries):
    ask = Judge("80", n2="I cannot say", n3="101", n5="85")
    report = judge(entries, ask)
    assert report.scores == [80, None, None, 80, 85, 80]
    assert report.average == 81.25
    assert (report.n_scored, report.n_unparsable, report.n_failed) == (4, 2, 0)
    assert report.unparsable == {2: "I cannot say", 3: "101"}
    assert ask.prompts == [score_prompt(entry, entry["model_response"]) for entry in entries]
    assert math.isnan(judge(entries, Judge("?")).average)


def test_an_empty_response_scores_0_and_is_not_shown(entries):
    entries[1]["model_response"] = " \n"
    ask = Judge("90")
    assert judge(entries, ask).scores == [90, 0, 90, 90, 90, 90]
    assert len(ask.prompts) == 5


def test_another_key_and_the_verbose_prompt(entries):
    ask = Judge("It is right. Score: 90/100")
    assert judge(entries, ask, "other_response", variant="verbose").average == 90
    assert ask.prompts == [score_prompt(entry, entry["other_response"], "verbose") for entry in entries]


def test_what_is_answered_is_not_asked_again(entries, tmp_path):
    out = tmp_path / "new" / "scores.jsonl"
    first = judge(entries[:4], Judge("80", n2="?"), out=out)
    ask = Judge("90")
    report = judge(entries, ask, out=out)
    assert first.scores == [80, None, 80, 80]
    assert report.scores == [80, None, 80, 80, 90, 90]
    assert report.unparsable == {2: "?"}
    assert len(ask.prompts) == 2
    assert [(record["entry"], record["score"]) for record in records(out)] == list(enumerate(report.scores, 1))
    before = out.read_bytes()
    assert judge(entries, Judge(RuntimeError()), out=out) == report
    assert judge(entries[::-1], Judge(RuntimeError()), out=out).scores == report.scores[::-1]
    assert out.read_bytes().startswith(before)


def test_a_changed_response_is_asked_again(entries, tmp_path):
    judge(entries, Judge("80"), out=tmp_path / "out")
    entries[2]["model_response"] = "Three."
    ask = Judge("90")
    assert judge(entries, ask, out=tmp_path / "out").scores == [80, 80, 90, 80, 80, 80]
    assert len(ask.prompts) == 1


def test_equal_prompts_are_asked_once(entries, tmp_path):
    ask, told = Judge(), Told()
    assert judge([entries[0]] * 3, ask, out=tmp_path / "out", progress=told).scores == [85] * 3
    assert len(ask.prompts) == 1
    assert len(told.states) == 3
    assert [record["entry"] for record in records(tmp_path / "out")] == [1, 2, 3]


@pytest.mark.parametrize("cut", [1, 20, -1])
def test_a_line_that_was_cut_is_asked_again(entries, tmp_path, cut):
    out = tmp_path / "out"
    judge(entries, Judge("80"), out=out)
    data = out.read_bytes()
    last = data.rindex(b"\n", 0, -1) + 1
    out.write_bytes(data[: last + cut] if cut > 0 else data[:cut])
    ask = Judge("80")
    judge(entries, ask, out=out)
    assert len(ask.prompts) == 1
    assert out.read_bytes() == data


def test_replies_of_another_judge_are_refused(entries, tmp_path):
    out = tmp_path / "out"
    judge(entries, Judge(), out=out)
    before = out.read_bytes()
    other = Judge()
    other.settings = {"model": "another"}
    with pytest.raises(UserError, match="holds replies with model 'a judge', not 'another'; choose another --out"):
        judge(entries, other, out=out)
    with pytest.raises(UserError, match="holds replies with prompt 'integer', not 'verbose'"):
        judge(entries, Judge(), out=out, variant="verbose")
    with pytest.raises(UserError, match="holds replies with key 'model_response', not 'other_response'"):
        judge(entries, Judge(), "other_response", out)
    assert out.read_bytes() == before
    assert other.prompts == []


@pytest.mark.parametrize(
    "content", ["[]", "[]\n", "{}\n", "5\n", "\n\n", '{"judge": 5, "task": {}}\n', "text\n", "\xff\n"]
)
def test_another_file_is_never_written_over(entries, tmp_path, content):
    out = tmp_path / "precious"
    out.write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match="precious"):
        judge(entries, Judge(), out=out)
    assert out.read_text(encoding="latin-1") == content


def test_a_damaged_line_is_named(entries, tmp_path):
    out = tmp_path / "out"
    judge(entries, Judge(), out=out)
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join([*lines[:3], "{}\n", *lines[3:]]))
    with pytest.raises(UserError, match="line 4 is no reply of a judge"):
        judge(entries, Judge(), out=out)


@pytest.mark.parametrize(
    "entry, problem",
    [
        (5, "expected an object with an instruction, got a int"),
        ({}, 'expected a text as "instruction", got an entry with nothing'),
        ({"instruction": "x"}, 'expected a text as "output", got an entry with instruction'),
        ({"instruction": "x", "output": "y"}, 'expected a text as "model_response", got an entry with instr'),
        ({"instruction": "x", "output": 5, "model_response": "z"}, 'expected a text as "output", got a int'),
        ({"instruction": "x", "output": "y", "model_response": "z", "input": []}, 'expected a text as "input"'),
    ],
)
def test_an_entry_that_is_none_is_named_before_anything_is_asked(entries, entry, problem):
    ask = Judge()
    with pytest.raises(UserError, match=f"^entry 3: {problem}"):
        judge([*entries[:2], entry], ask)
    assert ask.prompts == []
    with pytest.raises(UserError, match="got none"):
        judge([], ask)


def test_a_question_that_fails_is_counted_and_asked_again_later(entries, tmp_path):
    out, told = tmp_path / "out", Told()
    report = judge(entries, Judge("80", n2=ServerError("too long"), n3=ServerError("odd")), out=out, progress=told)
    assert report.scores == [80, None, None, 80, 80, 80]
    assert report.failed == {2: "too long", 3: "odd"}
    assert (report.n_scored, report.n_failed, report.n_unparsable) == (4, 2, 0)
    assert told.lines == ["entry 2: too long", "entry 3: odd"]
    assert told.states[-1] == "average 80.00"
    assert judge(entries, Judge("90"), out=out).scores == [80, 90, 90, 80, 80, 80]


def test_a_server_that_goes_down_is_told_with_what_is_kept(entries, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"gone; 3 of 6 questions are answered and kept in .*out; run again to go on"):
        judge(entries, Judge("80", n4=UnavailableError("gone")), out=out)
    ask = Judge("90")
    assert judge(entries, ask, out=out).scores == [80, 80, 80, 90, 90, 90]
    with pytest.raises(UserError, match="gone; 3 of 6 questions are answered and lost"):
        judge(entries, Judge("80", n4=UnavailableError("gone")))


def test_a_server_that_fails_again_and_again_is_down(entries):
    ask = Judge(ServerError("odd"))
    with pytest.raises(UserError, match="odd; 0 of 6"):
        judge(entries, ask)
    assert len(ask.prompts) == FAILURES
    now_and_then = {f"n{number}": ServerError("odd") for number in (1, 2, 4, 5)}
    assert judge(entries, Judge("80", **now_and_then)).n_failed == 4


def test_texts_that_utf8_does_not_know_are_kept(entries, tmp_path):
    entries[0]["model_response"] = "half a pair \ud800"
    judge(entries, Judge("80 \udfff"), out=tmp_path / "out")
    assert judge(entries, Judge(RuntimeError()), out=tmp_path / "out").scores == [80] * 6


def test_the_command_prints_average_counts_and_examples(server, responses, capsys):
    server.plan = [fake.streams("Score: 90"), fake.streams("no idea"), fake.streams("95")]
    command(responses, "--url", server.url)
    shown = capsys.readouterr().out
    assert "entry 1: Name the number 1.\n  correct   It is 1.\n  response  Number 1!\n  score     90\n" in shown
    assert "entry 2: 'no idea'" in shown
    assert "Number of scores: 5 of 6\nNot scored: 1 replies without a clear score, 0 without a reply\n" in shown
    assert "Average score: 94.00\n" in shown
    assert "6 of 6 answers  average 94.00  (" in shown
    out = responses.with_name("responses.scores.model_response.llama3.jsonl")
    assert f"Replies: {out}" in shown
    assert len(records(out)) == len(server.requests) == 6
    command(responses, "--url", server.url)
    assert "6 of 6 answers were there before" in capsys.readouterr().out
    assert len(server.requests) == 6
    with pytest.raises(UserError, match="holds replies with seed 123, not 5; choose another --out"):
        command(responses, "--url", server.url, "--seed", "5")


def test_the_command_takes_a_limit_another_server_and_no_file(server, responses, capsys, tmp_path):
    server.plan = [fake.completes("70")]
    arguments = ["--server", "openai", "--model", "org/m", "--url", f"{server.url}/v1", "--key", "other_response"]
    command(responses, *arguments, "--limit", "2", "--out", "none", "--prompt", "verbose")
    assert "Average score: 70.00" in capsys.readouterr().out
    assert len(server.requests) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["responses.json"]


def test_the_command_judges_with_a_model_of_ones_own(responses, capsys, tmp_path):
    config = PRESETS["bytes-tiny"]
    path = tmp_path / "model.safetensors"
    save_model(path, initialize(config, Generator(1), "gpt2"), config, ByteTokenizer().spec())
    arguments = ["--server", "model", "--model", str(path), "--engine", "numpy", "--max_new_tokens", "3", "--out"]
    command(responses, *arguments, str(tmp_path / "out"), "--limit", "2")
    assert "of 2" in capsys.readouterr().out
    assert len(records(tmp_path / "out")) == 2
    save_model(path, initialize(config, Generator(2), "gpt2"), config, ByteTokenizer().spec())
    with pytest.raises(UserError, match="holds replies with weights '[0-9a-f]+', not '[0-9a-f]+'; choose another"):
        command(responses, *arguments, str(tmp_path / "out"), "--limit", "2")


@pytest.mark.parametrize(
    "content, problem",
    [
        ("{", "not JSON"),
        ("{}", "expected a list of entries, got a dict"),
        ("[]", "expected a list of entries, got an empty list"),
        ('[{"instruction": "x", "output": "y"}]', 'entry 1: expected a text as "model_response"'),
    ],
)
def test_the_command_names_the_file_that_is_wrong(tmp_path, content, problem):
    path = tmp_path / "responses.json"
    path.write_text(content)
    with pytest.raises(UserError, match=f"responses.json:? {problem}"):
        command(path)
    with pytest.raises(UserError, match=r"nowhere\.json"):
        command(tmp_path / "nowhere.json")


def test_the_command_names_options_that_are_wrong(responses):
    with pytest.raises(UserError, match="responses: expected a JSON file"):
        parse_config(JudgeConfig, [], prog="twingrad evaluate judge")
    for name, value in (("limit", "0"), ("temperature", "-1"), ("max_new_tokens", "0"), ("prompt", "short")):
        with pytest.raises(UserError, match=f"{name}: expected"):
            command(responses, f"--{name}", value)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_stopped_goes_on_where_it_was(server, responses, how):
    server.plan = [fake.streams("80"), fake.streams("81"), fake.hangs]
    code = (
        "import sys\nfrom gpt.evaluate.judge import *\nfrom gpt.options import parse_config\n"
        "try: run(parse_config(JudgeConfig, sys.argv[1:], prog='judge'))\nexcept KeyboardInterrupt: sys.exit(130)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "--responses", str(responses), "--url", server.url],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    while len(server.requests) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(how)
    shown, _ = process.communicate(timeout=30)
    out = responses.with_name("responses.scores.model_response.llama3.jsonl")
    assert [record["score"] for record in records(out)] == [80, 81]
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert f"interrupted: 2 of 6 questions are answered and kept in {out}; run again to go on" in shown
    server.plan = [fake.streams("90")]
    command(responses, "--url", server.url)
    assert [record["score"] for record in records(out)] == [80, 81, 90, 90, 90, 90]
    assert len(server.requests) == 7


def test_real_entries_are_scored(tmp_path, capsys, server):
    if "TWINGRAD_DATA" not in os.environ:
        pytest.skip("TWINGRAD_DATA is not set")
    source = Path(os.environ["TWINGRAD_DATA"]) / "instruction-data-with-preference.json"
    if not source.exists():
        pytest.skip(f"{source} is not there")
    server.plan = [fake.streams(lambda prompt: str(len(prompt) % 101))]
    out = tmp_path / "out"
    command(source, "--key", "rejected", "--limit", "30", "--url", server.url, "--out", str(out))
    assert "Number of scores: 30 of 30" in capsys.readouterr().out
    assert [record["score"] for record in records(out)] == [len(prompt) % 101 for prompt in server.prompts]


def test_lines_come_at_each_tenth_with_rate_and_time_left():
    out = io.StringIO()
    lines = Lines(out)
    lines.start(5, 40)
    for _ in range(35):
        lines.step("average 80.00")
    shown = out.getvalue().splitlines()
    assert shown[0] == "5 of 40 answers were there before"
    assert [line.split("  ")[0] for line in shown[1:]] == [f"{done} of 40 answers" for done in range(8, 41, 4)]
    assert "average 80.00  (" in shown[1]
    assert " answers/s, " in shown[1]
    assert shown[-1].endswith("0:00 left)")
    assert isinstance(create_progress(out=out), Lines)


def test_a_bar_shows_how_many_the_state_rate_and_time_left():
    from rich.console import Console

    out = io.StringIO()
    bar = Bar(Console(file=out, force_terminal=True, width=120, _environ={}))
    bar.start(1, 3)
    bar.step("average 80.00")
    bar.step("average [81]")
    bar.line("[not] markup")
    bar.close()
    for text in ("3/3", "average [81]", "answers/s", "0:00 left", "[not] markup"):
        assert text in out.getvalue()
