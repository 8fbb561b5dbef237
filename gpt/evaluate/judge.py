"""Scores from a judge: another language model reads a task, the right answer and a model's response, and grades it.

    score(entry) = parse_score(ask(score_prompt(entry, response)))        a whole number from 0 to 100, or none
    average = sum of the scores / how many there are

As in chapter 7 of Raschka's "Build a Large Language Model (From Scratch)", whose prompt this is, word by word, so that
averages can be compared. A reply without a clear score counts as unparsable and not in the average; an empty response
scores 0 and is not shown to the judge.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gpt import prompts
from gpt.errors import UserError
from gpt.evaluate.asking import Answer, Question, ask_all, check_entries, read_entries
from gpt.evaluate.progress import Progress, create_progress
from gpt.evaluate.servers import Ask, ServerConfig, connect

__all__ = [
    "JudgeConfig",
    "Report",
    "Variant",
    "default_out",
    "judge",
    "parse_score",
    "run",
    "score_prompt",
    "shorten",
    "strip_thoughts",
]

Variant = Literal["integer", "verbose"]
EXAMPLES = 3  # shown at the end

# A sign counts where it touches the number. What is part of a word, a version or a date is none.
NUMBER = r"(?<![\w.,])[-−–]?[0-9]+(?:[.,][0-9]+)*(?!\w|[.,][0-9])"
OUT_OF = r" ?(?:points?|marks?)? ?\(? ?(?:/|out of(?: a possible| a total of| a maximum of)?) ?"
TO = r" ?(?:-|–|—|to) ?"
SCALE = re.compile(rf"(?<![\w.,])0{TO}100(?![\w%])")
OTHER_SCALE = re.compile(rf"{NUMBER}{OUT_OF}(?!100(?![0-9.,]*[0-9]))[0-9]+(?:[.,][0-9]+)*")
RANGE = re.compile(rf"{NUMBER}{TO}[0-9]+(?:[.,][0-9]+)*(?!\w)")
CLEAR = (
    re.compile(rf"({NUMBER}){OUT_OF}100(?!\w)"),
    re.compile(rf"\b(?:score|rating|grade)(?: (?:is|of|would be)\b)? ?[:=]? ?({NUMBER})", re.IGNORECASE),
    re.compile(rf"^ ?({NUMBER}) ?[.%]? ?$", re.MULTILINE),
)


def score_prompt(entry: Mapping[str, Any], response: str, variant: Variant = "integer") -> str:
    """The question for one response. "verbose" leaves the judge free to explain; "integer" wants the number only."""
    task = prompts.alpaca(entry).removesuffix("\n\n### Response:\n")
    text = (
        f"Given the input `{task}` and correct output `{entry['output']}`, score the model response `{response}`"
        " on a scale from 0 to 100, where 100 is the best score."
    )
    return text + " Respond with the integer number only." if variant == "integer" else text


def parse_score(reply: str) -> int | None:
    """The score that a reply gives, 0 to 100; None if there is none, more than one, or one out of range.

    A score is clear when it is out of 100 ("85/100"), follows the word ("Score: 85") or stands on a line by itself;
    without a clear one, the only number in the reply counts. Halves are rounded up. What a model thinks aloud between
    <think> and </think>, and numbers on other scales ("3/5"), do not count; a range ("80-90") is no score.
    """
    text = re.sub(r"[*`#\"]|(?<!\w)_{1,3}(?=[0-9])|(?<=[0-9])_{1,3}(?!\w)", " ", strip_thoughts(reply))
    text = re.sub(r"[^\S\n]+", " ", text)
    for pattern in (SCALE, OTHER_SCALE, RANGE):
        text = pattern.sub(" ? ", text)
    found = {_number(match[1]) for pattern in CLEAR for match in pattern.finditer(text)}
    if not found:
        found = {_number(match[0]) for match in re.finditer(NUMBER, text)}
    if len(found) != 1:
        return None
    value = found.pop()
    return math.floor(value + 0.5) if 0 <= value <= 100 else None


def strip_thoughts(reply: str) -> str:
    """The reply without <think>...</think>, of which either tag may be missing."""
    kept: list[str] = []
    thinking = False
    for i, part in enumerate(re.split(r"(</?think(?:ing)?>)", reply, flags=re.IGNORECASE)):
        if i % 2 == 0:
            if not thinking:
                kept.append(part)
            continue
        closes = part.startswith("</")
        if closes and not thinking:  # the server has taken out the first tag
            kept.clear()
        thinking = not closes
    return "".join(kept)


def _number(text: str) -> float:
    """A number that may have commas between thousands; one that cannot be read is beyond every range."""
    text = text.replace("−", "-").replace("–", "-")
    if "," in text and not re.fullmatch(r"-?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?", text):
        return math.inf
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return math.inf


@dataclass(frozen=True)
class Report:
    """What a judge said of all entries."""

    scores: list[int | None]
    """Of each entry; None where the reply was unparsable, or there was none."""
    unparsable: dict[int, str] = field(default_factory=dict)
    """Replies without a clear score, by the entry's number, counted from 1."""
    failed: dict[int, str] = field(default_factory=dict)
    """Why there was no reply, by the entry's number."""

    @property
    def n_scored(self) -> int:
        """How many entries have a score."""
        return sum(score is not None for score in self.scores)

    @property
    def n_unparsable(self) -> int:
        """How many replies had no clear score."""
        return len(self.unparsable)

    @property
    def n_failed(self) -> int:
        """How many entries got no reply."""
        return len(self.failed)

    @property
    def average(self) -> float:
        """Mean of the scores that there are; not a number if there are none."""
        return sum(score for score in self.scores if score is not None) / self.n_scored if self.n_scored else math.nan


def judge(
    entries: Sequence[Mapping[str, Any]],
    ask: Ask,
    key: str = "model_response",
    out: Path | None = None,
    progress: Progress | None = None,
    variant: Variant = "integer",
) -> Report:
    """Have `ask` score what each entry holds under `key`.

    With `out` each reply is kept as it comes (gpt/evaluate/asking.py), and what is there is not asked again; a file of
    another judge, another key or another variant is refused. `ask` is any function of a prompt; what its replies depend
    on is its attribute `settings`, if it has one. UserError for an entry without its texts, before anything is asked,
    and for a judge that is gone.
    """
    check_entries(entries, key)
    asked = [number for number, entry in enumerate(entries, 1) if entry[key].strip()]
    questions = [
        Question(score_prompt(entries[number - 1], entries[number - 1][key], variant), {"entry": number})
        for number in asked
    ]

    report = Report([None if entry[key].strip() else 0 for entry in entries])

    def take(i: int, answer: Answer) -> str:
        number = asked[i]
        if answer.reply is None:
            report.failed[number] = answer.error or ""
        elif (score := parse_score(answer.reply)) is None:
            report.unparsable[number] = answer.reply
        else:
            report.scores[number - 1] = score
        return f"average {report.average:.2f}"

    def read(reply: str) -> dict[str, Any]:
        return {"score": parse_score(reply)}

    task = {"task": "score", "key": key, "prompt": variant}
    ask_all(questions, ask, read, task, out, progress or Progress(), take)
    return report


@dataclass(frozen=True)
class JudgeConfig:
    """Have a language model score responses from 0 to 100."""

    responses: str = ""
    """A JSON file: a list of entries with instruction, input, output, and the response under the key."""
    key: str = "model_response"
    """Where an entry holds the response."""
    prompt: Literal["integer", "verbose"] = "integer"
    """integer: the judge is to answer with the number only, as in the book; verbose: as it likes."""
    out: str | None = "auto"
    """JSON lines of the replies, where an interrupted run goes on; auto: beside the responses; none: not kept."""
    limit: int | None = None
    """Score so many entries, the first ones; none: all."""
    judge: ServerConfig = field(default_factory=ServerConfig)

    def __post_init__(self) -> None:
        if not self.responses:
            raise UserError("responses: expected a JSON file with responses, got none; name it with --responses FILE")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit: expected at least 1, got {self.limit}")


def default_out(responses: str, config: ServerConfig, *what: str) -> Path:
    """Beside the responses, a file for each judge: test.json -> test.scores.model_response.llama3.jsonl, say."""
    name = config.model or {"ollama": "llama3", "openai": "", "model": "runs/latest"}[config.server]
    parts = (re.sub(r"[^\w.-]+", "-", part) for part in (*what, name))
    path = Path(responses)
    return path.with_name(".".join((path.stem, *parts, "jsonl")))


def run(config: JudgeConfig) -> None:
    """The command: score, then print the average, what has none, and a few examples."""
    path = Path(config.responses)
    entries = read_entries(path, config.limit)
    try:
        check_entries(entries, config.key)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    out = None if config.out is None else Path(config.out)
    if config.out == "auto":
        out = default_out(config.responses, config.judge, "scores", config.key)
    report = judge(entries, connect(config.judge), config.key, out, create_progress(), config.prompt)
    for number in [i for i, score in enumerate(report.scores, 1) if score is not None][:EXAMPLES]:
        entry = entries[number - 1]
        print(f"\nentry {number}: {shorten(entry['instruction'])}")
        print(f"  correct   {shorten(entry['output'])}")
        print(f"  response  {shorten(entry[config.key])}")
        print(f"  score     {report.scores[number - 1]}")
    if report.unparsable:
        print("\nreplies without a clear score:")
        for number, reply in list(report.unparsable.items())[:EXAMPLES]:
            print(f"  entry {number}: {shorten(reply)!r}")
    print(f"\nNumber of scores: {report.n_scored} of {len(entries)}")
    if report.n_unparsable or report.n_failed:
        print(f"Not scored: {report.n_unparsable} replies without a clear score, {report.n_failed} without a reply")
    print(f"Average score: {report.average:.2f}" if report.n_scored else "Average score: none")
    if out is not None:
        print(f"Replies: {out}")


def shorten(text: str) -> str:
    """The beginning of a text, on one line."""
    text = " ".join(text.split())
    return text if len(text) <= 100 else text[:100] + "..."
