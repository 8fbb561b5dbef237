"""Multiple choice: files and their mistakes, MMLU's prompt to the letter, models that know all, or nothing."""

import csv
import json
import math
import os
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt import tokenizers
from gpt.errors import UserError
from gpt.evaluate.choices import (
    LETTERS,
    Question,
    choose_tasks,
    evaluate_choices,
    list_tasks,
    plot_accuracy,
    prompt,
    read_questions,
    write_results,
)
from gpt.evaluate.likelihood import continuation_logps
from gpt.llm import LLM
from tests.gpt.evaluate.fakes import Thinks, thinks

CHOICES = ["red", "a much longer answer", "blue", "as green as grass is"]


def entry(number, answer, choices=CHOICES, **others):
    return {"question": f"Question {number}?", "choices": list(choices), "answer": answer, **others}


def write_jsonl(path, entries):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(e) + "\n" for e in entries), encoding="utf-8")
    return path


def write_csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.fixture
def folder(tmp_path):
    """MMLU's files of two subjects, and a task of JSON lines."""
    generator = random.Random(1)
    for subject, count in (("philosophy", 6), ("high_school_biology", 3)):
        for split in ("dev", "test", "val"):
            rows = [
                [f"{subject} {split} {i}?", *CHOICES, generator.choice("ABCD")]
                for i in range(5 if split == "dev" else count)
            ]
            write_csv(tmp_path / split / f"{subject}_{split}.csv", rows)
    write_jsonl(tmp_path / "riddles.jsonl", [entry(i, i % 4) for i in range(4)])
    return tmp_path


def oracle(tasks, mode="letters"):
    """A model of bytes that knows the answer to the last question of any prompt."""
    known = {q.question: q for task in tasks for split in task.files for q in task.questions(split)}

    def thought(ids):
        head, _, said = bytes(ids).decode().rpartition("\nAnswer:")
        last = head.rpartition("\n\n")[2].partition("\n")[0]
        question = known[last]
        right = LETTERS[question.answer] if mode == "letters" else question.choices[question.answer]
        whole = f" {right}".encode()
        logits = np.zeros(257)
        if whole.startswith(said.encode()) and len(said) < len(whole):
            logits[whole[len(said)]] = 20.0
        return logits

    return thinks(thought)


# ---------------------------------------------------------------- files


def test_both_formats_are_read(tmp_path):
    rows = [["Why\nover two lines?", "a", 'b, "quoted"', "B"], ["Next?", "x", "y", "z", "C"]]
    first, second = read_questions(write_csv(tmp_path / "test" / "world_history_test.csv", rows))
    assert first == Question("Why\nover two lines?", ("a", 'b, "quoted"'), 1, "world_history", first.where)
    assert first.where.endswith("world_history_test.csv, line 1")
    assert (second.answer, second.where[-6:]) == (2, "line 3")
    path = write_jsonl(tmp_path / "r.jsonl", [entry(1, 3), entry(2, "c", subject="colours"), entry(3, "A")])
    assert [(q.answer, q.subject) for q in read_questions(path)] == [(3, "r"), (2, "colours"), (0, "r")]
    for marked in (path, tmp_path / "test" / "world_history_test.csv"):  # as spreadsheets write a file
        before = read_questions(marked)
        marked.write_bytes(b"\xef\xbb\xbf" + marked.read_bytes())
        assert read_questions(marked) == before


@given(
    st.lists(
        st.tuples(st.text(max_size=20), st.lists(st.text(max_size=9), min_size=2, max_size=26), st.integers(0, 99)),
        min_size=1,
        max_size=5,
    )
)
def test_every_text_comes_back_from_both_formats(tmp_path_factory, given_questions):
    clean = lambda text: text.encode("utf-8", "replace").decode().replace("\0", "").replace("\r", "")  # noqa: E731
    asked = [(clean(q), [clean(c) for c in choices], n % len(choices)) for q, choices, n in given_questions]
    folder = tmp_path_factory.mktemp("formats")
    rows = [[q, *choices, LETTERS[n]] for q, choices, n in asked]
    lines = [{"question": q, "choices": choices, "answer": n} for q, choices, n in asked]
    for path in (write_csv(folder / "q.csv", rows), write_jsonl(folder / "q.jsonl", lines)):
        assert [(q.question, list(q.choices), q.answer) for q in read_questions(path)] == asked


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "not JSON"),
        ("[1]", r"expected an object, got \[1\]"),
        ('{"question": "q", "choices": ["a", "b"]}', "answer is missing"),
        ('{"choices": ["a", "b"], "answer": 0}', "question is missing"),
        ('{"question": "q", "answer": 0}', "choices is missing"),
        (json.dumps(entry(1, 4)), "expected as answer a letter from A to D or a number from 0 to 3, got 4"),
        (json.dumps(entry(1, -1)), "got -1"),
        (json.dumps(entry(1, "E")), 'got "E"'),
        (json.dumps(entry(1, "")), 'got ""'),
        (json.dumps(entry(1, True)), "got true"),
        (json.dumps(entry(1, 1.0)), r"got 1\.0"),
        (json.dumps(entry(1, None)), "got null"),
        (json.dumps(entry(1, 0, ["one"])), "expected 2 to 26 choices, got 1"),
        (json.dumps(entry(1, 0, ["c"] * 27)), "expected 2 to 26 choices, got 27"),
        (json.dumps({**entry(1, 0), "choices": "ab"}), 'a list of texts as choices, got "ab"'),
        (json.dumps({**entry(1, 0), "choices": ["a", 2]}), "a list of texts as choices"),
        (json.dumps({**entry(1, 0), "question": 5}), "expected a text as question, got 5"),
        (json.dumps({**entry(1, 0), "subject": 5}), "expected a text as subject, got 5"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    path = tmp_path / "riddles.jsonl"
    path.write_text(json.dumps(entry(0, 0)) + "\n\n" + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf"riddles\.jsonl, line 3: .*{message}") as caught:
        read_questions(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "row, message",
    [
        (["q", "a", "b", "c", "d", "E"], 'from A to D or a number from 0 to 3, got "E"'),
        (["q", "a", "B"], "expected 2 to 26 choices, got 1"),
        (["q"], "expected 2 to 26 choices, got 0"),
        (["question", "A", "B", "answer"], 'got "answer"'),
    ],
)
def test_a_wrong_row_is_named(tmp_path, row, message):
    path = write_csv(tmp_path / "q.csv", [["two\nlines", "a", "b", "A"], row])
    with pytest.raises(UserError, match=rf"q\.csv, line 3: .*{message}"):
        read_questions(path)


def test_a_wrong_file_is_named(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match=r"empty\.jsonl: .*got an empty file"):
        read_questions(tmp_path / "empty.jsonl")
    (tmp_path / "latin.csv").write_bytes(b"caf\xe9,a,b,A\n")
    with pytest.raises(UserError, match=r"latin\.csv is not UTF-8: byte 3"):
        read_questions(tmp_path / "latin.csv")
    (tmp_path / "huge.csv").write_text("q,a\nx," + "y" * 200_000, encoding="utf-8")
    with pytest.raises(UserError, match=r"huge\.csv, line"):
        read_questions(tmp_path / "huge.csv")
    with pytest.raises(UserError, match=r"q\.txt: expected a file of questions, \.csv or \.jsonl"):
        read_questions(tmp_path / "q.txt")


# ---------------------------------------------------------------- tasks


def test_tasks_are_found_by_their_files(folder):
    tasks = list_tasks(folder)
    assert list(tasks) == ["mmlu_high_school_biology", "mmlu_philosophy", "riddles"]
    assert set(tasks["mmlu_philosophy"].files) == {"dev", "test", "val"}
    assert tasks["riddles"].files == {"test": folder / "riddles.jsonl"}
    names = [task.name for task in choose_tasks(folder, "riddles, mmlu")]
    assert names == ["riddles", "mmlu_high_school_biology", "mmlu_philosophy"]


def test_an_unknown_task_is_named_with_the_nearest(folder, tmp_path):
    with pytest.raises(UserError, match="no task 'mmlu_philosofy'; did you mean mmlu_philosophy"):
        choose_tasks(folder, "riddles,mmlu_philosofy")
    with pytest.raises(UserError, match="none: expected a folder of tasks"):
        list_tasks(tmp_path / "none")
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="found none"):
        choose_tasks(tmp_path / "bare", "mmlu")
    with pytest.raises(UserError, match="expected the name of a task, got none"):
        choose_tasks(folder, " , ")


# ---------------------------------------------------------------- prompts


def test_the_prompt_is_mmlus_to_the_letter():
    shot = Question("1 + 1?", ("1", "2", "3", "4"), 1, "abstract_algebra", "")
    asked = Question("2 + 2?", ("4", "5"), 0, "abstract_algebra", "")
    assert prompt(asked, [shot]) == (
        "The following are multiple choice questions (with answers) about  abstract algebra.\n\n"
        "1 + 1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: B\n\n"
        "2 + 2?\nA. 4\nB. 5\nAnswer:"
    )
    assert prompt(asked, [shot], "texts").endswith("algebra.\n\n1 + 1?\nAnswer: 2\n\n2 + 2?\nAnswer:")


def test_examples_are_shown_as_long_as_they_fit(folder):
    (task,) = choose_tasks(folder, "mmlu_philosophy")
    seen = []

    def thought(ids):
        seen.append(bytes(ids).decode(errors="replace"))
        return np.zeros(257)

    asked, shots = task.questions("test"), task.questions("dev")
    enough = len(prompt(asked[0], shots[:2])) + 2
    for context, expected in ((4096, 5), (enough, 2), (enough - 2, 1)):
        seen.clear()
        results = evaluate_choices(thinks(thought, context=context), [task], num_fewshot=5)
        assert {answer.shots for answer in results.answers} == {expected}
        assert prompt(asked[0], shots[:expected]) in seen
        assert max(map(len, seen)) <= context
    # A prompt that fits with no example loses its beginning.
    results = evaluate_choices(thinks(thought, context=40), [task], num_fewshot=5)
    assert {answer.shots for answer in results.answers} == {0}
    with pytest.raises(UserError, match="mmlu_philosophy has 5 examples in dev, got 6"):
        evaluate_choices(thinks(thought), [task], num_fewshot=6)


# ---------------------------------------------------------------- accuracy


@pytest.mark.parametrize("mode", ["letters", "texts"])
@pytest.mark.parametrize("shots", [0, 2])
def test_a_model_that_knows_all_is_always_right(folder, mode, shots):
    tasks = choose_tasks(folder, "mmlu")
    found = evaluate_choices(oracle(tasks, mode), tasks, mode, shots)
    assert (found.overall.acc, found.overall.acc_stderr, found.overall.questions) == (1.0, 0.0, 9)
    assert {name: part.questions for name, part in found.subjects.items()} == {
        "high_school_biology": 3,
        "philosophy": 6,
    }
    assert found.overall.acc_norm == (1.0 if mode == "texts" else None)


@pytest.mark.parametrize("n", [2, 4, 26])
def test_a_model_without_opinion_takes_the_first_and_is_right_by_chance(tmp_path, n):
    generator = np.random.default_rng(5)
    answers = generator.integers(0, n, 400).tolist()
    names = [f"choice {i}" for i in range(n)]
    write_jsonl(tmp_path / "q.jsonl", [entry(i, answer, names) for i, answer in enumerate(answers)])
    tasks = choose_tasks(tmp_path, "q")
    found = evaluate_choices(thinks(lambda ids: np.zeros(257)), tasks, batch_size=64)
    assert {answer.prediction for answer in found.answers} == {0}
    assert found.overall.acc == answers.count(0) / 400
    assert found.overall.chance == pytest.approx(1 / n)
    assert abs(found.overall.acc - 1 / n) < 3 * math.sqrt((1 - 1 / n) / n / 400)
    assert found.overall.acc_stderr == pytest.approx(np.std(np.equal(answers, 0), ddof=1) / 20)


def test_texts_are_compared_by_their_bytes_too(tmp_path):
    """Uniform bytes: the shortest text is the most probable, and by bytes the one of most bytes, not characters."""
    write_jsonl(tmp_path / "q.jsonl", [entry(0, 0, ["abcdefg", "éééé", "ab"])])
    llm = thinks(lambda ids: np.zeros(257))
    (answer,) = evaluate_choices(llm, choose_tasks(tmp_path, "q"), "texts").answers
    assert answer.logps == pytest.approx([-8 * math.log(257), -9 * math.log(257), -3 * math.log(257)])
    assert (answer.prediction, answer.prediction_norm) == (2, 1)


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="TIKTOKEN_CACHE_DIR names no folder with GPT-2's")
def test_letters_that_are_one_token_cost_one_reading_a_question(folder):
    tokenizer = tokenizers.load("gpt2")
    opinion = np.zeros(tokenizer.n_vocab)
    opinion[tokenizer.encode(" C")] = 1.0
    engine = Thinks(lambda ids: opinion, vocab_size=tokenizer.n_vocab)
    (task,) = choose_tasks(folder, "mmlu_philosophy")
    found = evaluate_choices(LLM(engine, tokenizer), [task])
    assert engine.rows == 6
    assert {answer.prediction for answer in found.answers} == {2}


def test_a_real_model_answers_alike_in_any_batch(llm, folder):
    tasks = choose_tasks(folder, "mmlu,riddles")
    one, many = (evaluate_choices(llm, tasks, "texts", 0, batch_size=size) for size in (1, 7))
    assert [a.prediction for a in one.answers] == [a.prediction for a in many.answers]
    first = one.answers[0]
    pairs = [(prompt(first.question, (), "texts"), f" {choice}") for choice in first.question.choices]
    assert first.logps == pytest.approx([score.logp for score in continuation_logps(llm, pairs)])


def test_impossible_settings_are_refused(folder):
    llm, tasks = thinks(lambda ids: np.zeros(257)), choose_tasks(folder, "riddles")
    with pytest.raises(UserError, match="riddles has no questions of the split dev, only of test"):
        evaluate_choices(llm, tasks, num_fewshot=1)
    with pytest.raises(UserError, match="num_fewshot: expected at least 0, got -1"):
        evaluate_choices(llm, tasks, num_fewshot=-1)
    with pytest.raises(UserError, match="limit: expected at least 1, got 0"):
        evaluate_choices(llm, tasks, limit=0)
    write_jsonl(folder / "hollow.jsonl", [entry(0, 0, ["", "a"])])
    hollow = choose_tasks(folder, "hollow")
    assert evaluate_choices(llm, hollow).overall.questions == 1
    with pytest.raises(UserError, match=r"hollow\.jsonl, line 1: an empty choice"):
        evaluate_choices(llm, hollow, "texts")


# ---------------------------------------------------------------- results


def test_results_are_kept_with_each_prediction(folder, tmp_path):
    tasks = choose_tasks(folder, "mmlu,riddles")
    found = evaluate_choices(oracle(tasks), tasks, limit=2)
    path = tmp_path / "out" / "results.json"
    write_results(path, found, {"tasks": "mmlu,riddles"})
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert kept["config"] == {"tasks": "mmlu,riddles"}
    assert kept["overall"]["acc"] == 1.0
    assert list(kept["subjects"]) == ["high_school_biology", "philosophy", "riddles"]
    assert len(kept["predictions"]) == found.overall.questions == 6
    for line, answer in zip(kept["predictions"], found.answers, strict=True):
        assert line["prediction"] == line["answer"] == answer.prediction
        assert line["logps"] == pytest.approx(answer.logps)
        assert os.fspath(folder) in line["where"]
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_the_plot_has_a_bar_for_each_subject_and_the_line_of_chance(folder):
    tasks = choose_tasks(folder, "mmlu")
    results = evaluate_choices(thinks(lambda ids: np.zeros(257)), tasks)
    (axes,) = plot_accuracy(results, "a title").axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["philosophy (6)", "high school biology (3)", "overall (9)"]
    widths = [bar.get_width() for bar in axes.patches]
    expected = [results.subjects["philosophy"], results.subjects["high_school_biology"], results.overall]
    assert widths == pytest.approx([100 * accuracy.acc for accuracy in expected])
    lines = [line for line in axes.lines if line.get_label() == "chance, 25%"]
    assert lines[0].get_xdata()[0] == pytest.approx(25)
