"""Multiple choice: questions with some answers of which one is right, in MMLU's format and its prompts.

A folder of tasks holds files of questions in dev (examples to show), test and val:

    dev/philosophy_dev.csv, test/philosophy_test.csv, ...   MMLU's own files: question,A,B,C,D,answer, without a header;
                                                            the task mmlu_philosophy
    test/riddles.jsonl, dev/riddles.jsonl                   the task riddles: on each line an object of "question",
                                                            "choices": [...], "answer": a number from 0 or a letter,
                                                            and, if wanted, "subject"
    riddles.jsonl                                           the same, with questions to test alone

Two modes, by what is scored after the prompt (Hendrycks et al. 2021; Brown et al. 2020, section 2.4):

    letters   the choices are listed with letters, and the answer is the most probable of " A", " B", ...
    texts     nothing is listed, and the answer is the most probable of the choices' texts: by its log-probability
              (acc), and by that divided by its bytes in UTF-8, because longer texts are less probable (acc_norm)

Of choices that are equally probable the first is taken, so that a model without any opinion always says A, and is right
as often as the right answer is A.
"""

from __future__ import annotations

import csv
import io
import json
import math
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gpt.data.files import atomic_write
from gpt.data.text import read_text
from gpt.errors import UserError
from gpt.evaluate.likelihood import continuation_logps
from gpt.evaluate.progress import Progress
from gpt.llm import LLM
from gpt.options import did_you_mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Accuracy",
    "Answered",
    "Question",
    "Results",
    "Task",
    "choose_tasks",
    "evaluate_choices",
    "list_tasks",
    "plot_accuracy",
    "prompt",
    "read_questions",
    "write_results",
]

LETTERS = string.ascii_uppercase
SPLITS = ("dev", "test", "val")
Mode = Literal["letters", "texts"]


@dataclass(frozen=True)
class Question:
    """A question, its possible answers, and the number of the right one."""

    question: str
    choices: tuple[str, ...]
    answer: int
    subject: str
    where: str  # file and line


@dataclass(frozen=True)
class Task:
    """Files of questions by split: dev, test, val."""

    name: str
    files: Mapping[str, Path]

    def questions(self, split: str) -> list[Question]:
        """The questions of a split. UserError where there is no file of it, or a wrong line in it."""
        if split not in self.files:
            raise UserError(f"{self.name} has no questions of the split {split}, only of {', '.join(self.files)}")
        return read_questions(self.files[split])


@dataclass(frozen=True)
class Answered:
    """What a model made of a question."""

    question: Question
    logps: tuple[float, ...]  # of each choice
    prediction: int
    prediction_norm: int | None  # by bytes, where texts are scored
    shots: int  # examples that were shown

    @property
    def correct(self) -> bool:
        return self.prediction == self.question.answer

    @property
    def correct_norm(self) -> bool:
        return self.prediction_norm == self.question.answer


@dataclass(frozen=True)
class Accuracy:
    """How many answers were right, with the standard error of a mean; none for a single question."""

    questions: int
    acc: float
    acc_stderr: float | None
    acc_norm: float | None  # where texts are scored
    acc_norm_stderr: float | None
    chance: float  # the accuracy of guessing


@dataclass(frozen=True)
class Results:
    """An evaluation: accuracies overall, over all questions alike, and by subject; and each answer."""

    overall: Accuracy
    subjects: dict[str, Accuracy]
    answers: list[Answered]


# ---------------------------------------------------------------- files


def read_questions(path: Path) -> list[Question]:
    """The questions in a file .csv or .jsonl; see the module's docstring. UserError names the file and the line."""
    if path.suffix not in (".csv", ".jsonl"):
        raise UserError(f"{path}: expected a file of questions, .csv or .jsonl")
    questions = list(_read_csv(path) if path.suffix == ".csv" else _read_json(path))
    if not questions:
        raise UserError(f"{path}: expected a question on each line, got an empty file")
    return questions


def _read_csv(path: Path) -> Iterator[Question]:
    reader = csv.reader(io.StringIO(_text(path), newline=""))
    line = 1
    try:
        for row in reader:  # a quoted field may go on over several lines
            where, line = f"{path}, line {line}", reader.line_num + 1
            if row:
                yield _question(row[0], row[1:-1], row[-1], _stem(path), where)
    except csv.Error as error:
        raise UserError(f"{path}, line {line}: not CSV: {error}") from None


def _read_json(path: Path) -> Iterator[Question]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON: {error}") from None
        if not isinstance(entry, dict):
            raise UserError(f"{where}: expected an object, got {_short(entry)}")
        for key in ("question", "choices", "answer"):
            if key not in entry:
                raise UserError(f"{where}: expected the keys question, choices and answer, {key} is missing")
        question, choices, subject = entry["question"], entry["choices"], entry.get("subject", _stem(path))
        for key, value in (("question", question), ("subject", subject)):
            if not isinstance(value, str):
                raise UserError(f"{where}: expected a text as {key}, got {_short(value)}")
        if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
            raise UserError(f"{where}: expected a list of texts as choices, got {_short(choices)}")
        yield _question(question, choices, entry["answer"], subject, where)


def _question(question: str, choices: Sequence[str], answer: Any, subject: str, where: str) -> Question:
    count = len(choices)
    if not 2 <= count <= len(LETTERS):
        raise UserError(f"{where}: expected 2 to {len(LETTERS)} choices, got {count}")
    if isinstance(answer, str):
        text = answer.strip().upper()
        number = LETTERS.index(text) if len(text) == 1 and text in LETTERS else None
    else:
        number = answer if type(answer) is int else None
    if number is None or not 0 <= number < count:
        expected = f"a letter from A to {LETTERS[count - 1]} or a number from 0 to {count - 1}"
        raise UserError(f"{where}: expected as answer {expected}, got {_short(answer)}")
    return Question(question, tuple(choices), number, subject, where)


def _text(path: Path) -> str:
    return read_text(path).removeprefix("\ufeff")  # which spreadsheets write first


def _stem(path: Path) -> str:
    """philosophy, of philosophy_test.csv in a folder test."""
    return path.stem.removesuffix(f"_{path.parent.name}") if path.parent.name in SPLITS else path.stem


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ---------------------------------------------------------------- tasks


def list_tasks(folder: Path) -> dict[str, Task]:
    """The tasks in a folder by name, sorted; see the module's docstring. UserError where there is no such folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: expected a folder of tasks, with files of questions in dev, test and val")
    found: dict[str, dict[str, Path]] = {}
    places = {"test": [folder / "test", folder], "dev": [folder / "dev"], "val": [folder / "val"]}
    for split, directories in places.items():
        for directory in directories:
            patterns = ("*.jsonl",) if directory == folder else ("*.csv", "*.jsonl")
            for path in sorted(path for pattern in patterns for path in directory.glob(pattern)):
                name = _stem(path)
                if path.suffix == ".csv" and not name.startswith("mmlu_"):
                    name = f"mmlu_{name}"
                found.setdefault(name, {}).setdefault(split, path)
    return {name: Task(name, files) for name, files in sorted(found.items())}


def choose_tasks(folder: Path, names: str) -> list[Task]:
    """The tasks of `names`, separated by commas; mmlu stands for all mmlu_*. UserError for one that is not there."""
    there = list_tasks(folder)
    if not there:
        raise UserError(f"{folder}: expected files of questions, .csv or .jsonl, in dev, test and val, found none")
    chosen: dict[str, Task] = {}
    for name in filter(None, map(str.strip, names.split(","))):
        group = [task for other, task in there.items() if other.startswith("mmlu_")] if name == "mmlu" else []
        if name in there:
            group = [there[name]]
        if not group:
            raise UserError(
                f"tasks: {folder} has no task {name!r}{did_you_mean(name, there)} (evaluate list shows all)"
            )
        chosen |= {task.name: task for task in group}
    if not chosen:
        raise UserError("tasks: expected the name of a task, got none; give one with --tasks NAME")
    return list(chosen.values())


# ---------------------------------------------------------------- prompts


def prompt(question: Question, shots: Sequence[Question] = (), mode: Mode = "letters") -> str:
    """What stands before the answer, in the words of MMLU's own evaluation; two spaces before the subject are its."""
    head = (
        f"The following are multiple choice questions (with answers) about  {question.subject.replace('_', ' ')}.\n\n"
    )
    examples = (f"{_ask(shot, mode)}{_answers(shot, mode)[shot.answer]}\n\n" for shot in shots)
    return head + "".join(examples) + _ask(question, mode)


def _ask(question: Question, mode: Mode) -> str:
    pairs = zip(LETTERS, question.choices, strict=False) if mode == "letters" else ()
    listed = "".join(f"\n{letter}. {choice}" for letter, choice in pairs)
    return f"{question.question}{listed}\nAnswer:"


def _answers(question: Question, mode: Mode) -> list[str]:
    """What is scored after the prompt, for each choice."""
    if mode == "letters":
        return [f" {letter}" for letter in LETTERS[: len(question.choices)]]
    return [f" {choice}" for choice in question.choices]


def _fitting(llm: LLM, question: Question, shots: Sequence[Question], mode: Mode) -> tuple[str, int]:
    """The prompt with as many examples as leave room for the answer, as MMLU's own evaluation has it, and how many."""
    longest = max(_answers(question, mode), key=len)
    for count in range(len(shots), 0, -1):
        text = prompt(question, shots[:count], mode)
        if len(llm.encode(text + longest)) <= llm.engine.config.context_length + 1:
            return text, count
    return prompt(question, (), mode), 0


# ---------------------------------------------------------------- evaluation


def evaluate_choices(
    llm: LLM,
    tasks: Sequence[Task],
    mode: Mode = "letters",
    num_fewshot: int = 0,
    split: str = "test",
    limit: int | None = None,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> Results:
    """Let a model answer the questions of a split, the first `limit` of each task, after `num_fewshot` of dev.

    A question whose prompt is too long for the model is shown fewer examples, and, without any, its beginning is cut.
    Raises UserError for a task without these splits, or without that many examples, and a wrong line in a file.
    """
    if num_fewshot < 0:
        raise UserError(f"num_fewshot: expected at least 0, got {num_fewshot}")
    if limit is not None and limit < 1:
        raise UserError(f"limit: expected at least 1, got {limit}")
    asked: list[Question] = []
    pairs: list[tuple[str, str]] = []
    shown: list[int] = []
    for task in tasks:
        shots = task.questions("dev")[:num_fewshot] if num_fewshot else []
        if len(shots) < num_fewshot:
            raise UserError(f"num_fewshot: {task.name} has {len(shots)} examples in dev, got {num_fewshot}")
        for question in task.questions(split)[:limit]:
            if mode == "texts" and not all(question.choices):
                raise UserError(f"{question.where}: an empty choice cannot be scored as a text; use the mode letters")
            text, count = _fitting(llm, question, shots, mode)
            asked.append(question)
            shown.append(count)
            pairs += ((text, answer) for answer in _answers(question, mode))
    found = iter(continuation_logps(llm, pairs, batch_size, progress))
    answers = []
    for question, count in zip(asked, shown, strict=True):
        logps = tuple(next(found).logp for _ in question.choices)
        norm = None
        if mode == "texts":
            norm = _best([p / len(text.encode()) for p, text in zip(logps, question.choices, strict=True)])
        answers.append(Answered(question, logps, _best(logps), norm, count))
    subjects: dict[str, list[Answered]] = {}
    for answer in answers:
        subjects.setdefault(answer.question.subject, []).append(answer)
    return Results(_accuracy(answers), {name: _accuracy(part) for name, part in subjects.items()}, answers)


def _best(scores: Sequence[float]) -> int:
    """The number of the largest, the first of equal ones."""
    return max(range(len(scores)), key=scores.__getitem__)


def _accuracy(answers: Sequence[Answered]) -> Accuracy:
    acc, error = _mean([answer.correct for answer in answers])
    norm, norm_error = None, None
    if all(answer.prediction_norm is not None for answer in answers):
        norm, norm_error = _mean([answer.correct_norm for answer in answers])
    chance = math.fsum(1 / len(answer.question.choices) for answer in answers) / len(answers)
    return Accuracy(len(answers), acc, error, norm, norm_error, chance)


def _mean(hits: Sequence[bool]) -> tuple[float, float | None]:
    """The share of hits, and its standard error, the sample's deviation over the root of its size."""
    count, share = len(hits), sum(hits) / len(hits)
    return share, math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None


# ---------------------------------------------------------------- results


def write_results(path: Path, results: Results, config: Mapping[str, Any]) -> None:
    """Write accuracies, the settings that they are of, and each prediction as JSON. UserError if that is impossible."""
    predictions = [
        {
            **asdict(answer.question),
            "logps": [p if math.isfinite(p) else None for p in answer.logps],  # JSON has no infinity
            "prediction": answer.prediction,
            "prediction_norm": answer.prediction_norm,
            "correct": answer.correct,
            "shots": answer.shots,
        }
        for answer in results.answers
    ]
    written = {
        "config": dict(config),
        "overall": asdict(results.overall),
        "subjects": {name: asdict(accuracy) for name, accuracy in results.subjects.items()},
        "predictions": predictions,
    }
    with atomic_write(path) as file:
        file.write(json.dumps(written, ensure_ascii=False, indent=1, allow_nan=False).encode("utf-8", "replace"))


def plot_accuracy(results: Results, title: str = "") -> Figure:
    """A bar for each subject's accuracy with its standard error, the overall one on top, and the line of chance."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from gpt.train.plot import BLUE, GREY, ORANGE, STYLE

    rows = {**dict(sorted(results.subjects.items(), reverse=True)), "overall": results.overall}
    values = [_shown(accuracy) for accuracy in rows.values()]
    with rc_context(STYLE):
        figure = Figure(figsize=(7, 1.5 + 0.27 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        axes.barh(
            range(len(rows)),
            [100 * value for value, _ in values],
            xerr=[100 * (error or 0.0) for _, error in values],
            color=[BLUE] * len(results.subjects) + [ORANGE],
            error_kw={"ecolor": GREY, "elinewidth": 1},
        )
        chance = 100 * results.overall.chance
        axes.axvline(chance, color=GREY, linestyle="--", linewidth=1, label=f"chance, {chance:.0f}%")
        labels = [f"{name.replace('_', ' ')} ({accuracy.questions:,})" for name, accuracy in rows.items()]
        axes.set_yticks(range(len(rows)), labels)
        measure = "Accuracy" if results.overall.acc_norm is None else "Accuracy, by bytes"
        axes.set(xlabel=f"{measure} (%), with its standard error", xlim=(0, 100), ylim=(-0.7, len(rows) - 0.3))
        axes.set_title(title, loc="left", fontweight="bold")
        axes.grid(axis="x", color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("right", "top"):
            axes.spines[side].set_visible(False)
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1))  # above, where no bar is
    return figure


def _shown(accuracy: Accuracy) -> tuple[float, float | None]:
    """The accuracy that a plot shows: of texts the one by bytes."""
    if accuracy.acc_norm is not None:
        return accuracy.acc_norm, accuracy.acc_norm_stderr
    return accuracy.acc, accuracy.acc_stderr
