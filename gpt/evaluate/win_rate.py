"""Which of two models answers better: a judge reads two responses to the same task and chooses.

Judges like the first response, or the last, more than they should (Zheng et al. 2023, "Judging LLM-as-a-Judge with
MT-Bench and Chatbot Arena", section 3.3). So each pair is shown in both orders, as is proposed there:

    chosen in the order (a, b)     chosen in the order (b, a)     outcome for a
    a                              a                              win
    b                              b                              loss
    anything else                                                 tie
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
from gpt.evaluate.judge import default_out, shorten, strip_thoughts
from gpt.evaluate.progress import Progress, create_progress
from gpt.evaluate.servers import Ask, ServerConfig, connect

__all__ = ["Comparison", "WinRateConfig", "choice_prompt", "compare", "parse_choice", "run", "wilson", "win_rate"]

Choice = Literal["A", "B", "tie"]
Outcome = Literal["win", "tie", "loss"]
Z95 = 1.959963984540054  # the normal distribution has 95% of its mass within so many standard deviations
EXAMPLES = 3

# "a" within a sentence is an article: there only the capital counts.
_WORD = r"(?i:response|answer|option|model)"
_CHOICE = rf"(?:{_WORD} ?)?[\[(]*(?:[Aa] (?=[Tt]))?(A|B|(?i:tie))\b[\])]*"
_CLEAR = (
    re.compile(rf"^ ?{_CHOICE} ?[.!:]? ?$", re.MULTILINE | re.IGNORECASE),
    re.compile(rf"\b(?i:verdict|winner|choice|preference|(?:final|better|best) {_WORD})(?: is)? ?:? ?{_CHOICE}"),
    re.compile(rf"\b(?i:answer)(?: is ?:?| ?:) ?{_CHOICE}"),
    re.compile(rf"\b{_WORD} (A|B) (?:is|was) (?:\w+ly |much )?(?:better|best|superior)\b"),
    re.compile(rf"\b{_WORD} (A|B) wins\b"),
    re.compile(r"\[\[(A|B|(?i:tie))\]\]"),
)
_NEGATION = re.compile(r"\b(?:not|neither|nor|cannot)\b|n['’]t\b", re.IGNORECASE)


def choice_prompt(entry: Mapping[str, Any], first: str, second: str) -> str:
    """The question which of two responses to an entry is better, `first` shown as A and `second` as B."""
    task = prompts.alpaca(entry).removesuffix("\n\n### Response:\n")
    return (
        f"Given the input `{task}` and correct output `{entry['output']}`, which of two model responses is better?"
        f"\n\nResponse A: `{first}`\n\nResponse B: `{second}`"
        "\n\nRespond with the letter A or B only, or with the word tie if they are equally good."
    )


def parse_choice(reply: str) -> Choice | None:
    """What a reply chooses; None if that is not clear.

    Clear is a choice that stands on a line by itself or is called one ("Verdict: B", "Response A is better"); else the
    only response that is mentioned, in a reply that denies nothing. What a model thinks aloud does not count.
    """
    text = re.sub(r"[*`#_\"]", " ", strip_thoughts(reply))
    text = re.sub(r"[^\S\n]+", " ", text)
    found = {match[1].lower() for pattern in _CLEAR for match in pattern.finditer(text)}
    if not found and not _NEGATION.search(text):
        found = {match[1].lower() for match in re.finditer(rf"\b{_WORD} (A|B)\b", text)}
        if re.search(r"\ba tie\b|\bequally good\b", text, re.IGNORECASE):
            found = {"tie"}  # of both, then, whatever else is said of them
    if len(found) != 1:
        return None
    choices: dict[str, Choice] = {"a": "A", "b": "B", "tie": "tie"}
    return choices[found.pop()]


def wilson(successes: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval for the probability of which `successes` of `n` trials are a sample; 0 to 1 without any.

    With p = successes / n (E. B. Wilson 1927, "Probable inference, the law of succession, and statistical inference",
    Journal of the American Statistical Association 22, pages 209 to 212):

        (p + z^2 / 2n  -+  z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)
    """
    if not 0 <= successes <= n:
        raise UserError(f"successes: expected from 0 to the {n} trials, got {successes}")
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre, scale = p + z * z / (2 * n), 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # The ends are exactly 0 and 1 where p is, and rounding may not push p out of its own interval.
    low = 0.0 if successes == 0 else max(0.0, min(p, (centre - half) / scale))
    high = 1.0 if successes == n else min(1.0, max(p, (centre + half) / scale))
    return low, high


@dataclass(frozen=True)
class Comparison:
    """How model a did against model b, entry by entry."""

    outcomes: list[Outcome | None]
    """For a; None where nothing can be said: a score is missing, a reply was unparsable or did not come."""
    unparsable: dict[int, str] = field(default_factory=dict)
    """Replies without a clear choice, by the entry's number, counted from 1; one of the two where both are."""
    failed: dict[int, str] = field(default_factory=dict)
    """Why there was no reply, by the entry's number."""
    by_position: int = 0
    """How many of the ties are such because the judge chose the same position in both orders."""

    @property
    def wins(self) -> int:
        """Entries that a answers better."""
        return self.outcomes.count("win")

    @property
    def ties(self) -> int:
        """Entries that neither does, as far as can be told."""
        return self.outcomes.count("tie")

    @property
    def losses(self) -> int:
        """Entries that b answers better."""
        return self.outcomes.count("loss")

    @property
    def n(self) -> int:
        """How many entries were compared: wins, ties and losses."""
        return len(self.outcomes) - self.outcomes.count(None)

    @property
    def share(self) -> float:
        """Wins among all that were compared, ties being none; not a number if nothing was."""
        return self.wins / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of the share."""
        return wilson(self.wins, self.n)


def win_rate(scores_a: Sequence[float | None], scores_b: Sequence[float | None]) -> Comparison:
    """The comparison of two models by their scores on the same entries; where either has none, nothing is compared."""
    if len(scores_a) != len(scores_b):
        raise UserError(f"expected scores of the same entries, got {len(scores_a)} and {len(scores_b)}")
    return Comparison([_by_score(a, b) for a, b in zip(scores_a, scores_b, strict=True)])


def _by_score(a: float | None, b: float | None) -> Outcome | None:
    if a is None or b is None or a != a or b != b:
        return None
    return "win" if a > b else "loss" if a < b else "tie"


def _agreed(forward: Choice, backward: Choice) -> Outcome:
    """`forward`: chosen where a is shown as A; `backward`: where a is shown as B."""
    outcomes: dict[tuple[Choice, Choice], Outcome] = {("A", "B"): "win", ("B", "A"): "loss"}
    return outcomes.get((forward, backward), "tie")


def compare(
    entries_a: Sequence[Mapping[str, Any]],
    entries_b: Sequence[Mapping[str, Any]],
    ask: Ask,
    key_a: str = "model_response",
    key_b: str = "model_response",
    out: Path | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Have `ask` choose between what entries_a hold under key_a and entries_b under key_b, in both orders.

    Equal responses are a tie, and not asked about. `out`, `progress` and errors are as for `gpt.evaluate.judge.judge`;
    entries that are not of the same tasks, one by one, are a UserError.
    """
    check_entries(entries_a, key_a)
    check_entries(entries_b, key_b)
    if len(entries_a) != len(entries_b):
        raise UserError(f"expected responses to the same entries, got {len(entries_a)} and {len(entries_b)} of them")
    questions, asked = [], []
    outcomes: list[Outcome | None] = []
    for number, (a, b) in enumerate(zip(entries_a, entries_b, strict=True), 1):
        for part in ("instruction", "input", "output"):
            if (a.get(part) or "") != (b.get(part) or ""):
                raise UserError(f"entry {number}: expected responses to the same task, got two with another {part}")
        same = a[key_a].strip() == b[key_b].strip()
        outcomes.append("tie" if same else None)
        if not same:
            questions.append(Question(choice_prompt(a, a[key_a], b[key_b]), {"entry": number, "first": "a"}))
            questions.append(Question(choice_prompt(a, b[key_b], a[key_a]), {"entry": number, "first": "b"}))
            asked += [number, number]
    choices: list[Choice | None] = []
    unparsable: dict[int, str] = {}
    failed: dict[int, str] = {}

    def take(i: int, answer: Answer) -> str:
        choice = None if answer.reply is None else parse_choice(answer.reply)
        choices.append(choice)
        if answer.reply is None:
            failed[asked[i]] = answer.error or ""
        elif choice is None:
            unparsable[asked[i]] = answer.reply
        if i % 2:
            forward, backward = choices[-2:]
            if forward is not None and backward is not None:
                outcomes[asked[i] - 1] = _agreed(forward, backward)
        return f"{outcomes.count('win')} wins, {outcomes.count('tie')} ties, {outcomes.count('loss')} losses"

    def read(reply: str) -> dict[str, Any]:
        return {"choice": parse_choice(reply)}

    task = {"task": "compare", "key": key_a, "other_key": key_b}
    ask_all(questions, ask, read, task, out, progress or Progress(), take)
    pairs = zip(choices[::2], choices[1::2], strict=True)
    by_position = sum(forward == backward and forward in ("A", "B") for forward, backward in pairs)
    # An entry has one reason: where one order failed and the other was unparsable, running again may still decide.
    unparsable = {number: reply for number, reply in unparsable.items() if number not in failed}
    return Comparison(outcomes, unparsable, failed, by_position)


@dataclass(frozen=True)
class WinRateConfig:
    """Have a language model choose, in both orders, between the responses of two models."""

    responses: str = ""
    """A JSON file: a list of entries with instruction, input, output, and the first model's response under the key."""
    key: str = "model_response"
    """Where an entry holds the first model's response."""
    other: str | None = None
    """The file with the second model's responses to the same entries; none: the same file."""
    other_key: str | None = None
    """Where an entry holds the second model's response; none: under the same key."""
    out: str | None = "auto"
    """JSON lines of the replies, where an interrupted run goes on; auto: beside the responses; none: not kept."""
    limit: int | None = None
    """Compare so many entries, the first ones; none: all."""
    judge: ServerConfig = field(default_factory=ServerConfig)

    def __post_init__(self) -> None:
        if not self.responses:
            raise UserError("responses: expected a JSON file with responses, got none; name it with --responses FILE")
        if self.other is None and self.other_key in (None, self.key):
            raise UserError("other: expected a second file, or another key with --other_key, got neither")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit: expected at least 1, got {self.limit}")


def run(config: WinRateConfig) -> None:
    """The command: compare, then print wins, ties and losses, the share with its interval, and a few examples."""
    files = Path(config.responses), Path(config.other or config.responses)
    keys = config.key, config.other_key or config.key
    both = [read_entries(path, config.limit) for path in files]
    for path, entries, key in zip(files, both, keys, strict=True):
        try:
            check_entries(entries, key)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    out = None if config.out is None else Path(config.out)
    if config.out == "auto":
        against = (files[1].stem,) if config.other else ()
        out = default_out(config.responses, config.judge, "against", *against, keys[1])
    result = compare(both[0], both[1], connect(config.judge), *keys, out, create_progress())
    for number in [i for i, outcome in enumerate(result.outcomes, 1) if outcome in ("win", "loss")][:EXAMPLES]:
        a, b = both[0][number - 1], both[1][number - 1]
        print(f"\nentry {number}: {shorten(a['instruction'])}")
        print(f"  first   {shorten(a[keys[0]])}")
        print(f"  second  {shorten(b[keys[1]])}")
        print(f"  better  {'first' if result.outcomes[number - 1] == 'win' else 'second'}")
    if result.unparsable:
        print("\nreplies without a clear choice:")
        for number, reply in list(result.unparsable.items())[:EXAMPLES]:
            print(f"  entry {number}: {shorten(reply)!r}")
    left_out = f"; {len(both[0]) - result.n} could not be compared" if result.n < len(both[0]) else ""
    print(f"\nCompared: {result.n} of {len(both[0])}{left_out}")
    by_position = f" ({result.by_position} chosen by position)" if result.by_position else ""
    print(f"Wins {result.wins}, ties {result.ties}{by_position}, losses {result.losses}")
    if result.n:
        low, high = result.interval
        print(f"Share of wins: {result.share:.1%} (95% interval {low:.1%} to {high:.1%})")
    if out is not None:
        print(f"Replies: {out}")
