"""Asking a judge many questions, and keeping each reply as it comes, so that nothing is asked twice.

The file of replies has a JSON object a line. The first says who was asked, the others what was said:

    {"judge": {"server": "ollama", "model": "llama3", "seed": 123, ...}, "task": {...}}
    {"entry": 1, "score": 85, "reply": "85", "prompt": "4f0c..."}       the prompt's SHA-256

A reply belongs to its prompt: entries may be added, taken out and moved, and what was said of the others still holds.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpt.data.files import atomic_write
from gpt.data.text import read_text
from gpt.errors import UserError
from gpt.evaluate.progress import Progress
from gpt.evaluate.servers import Ask, UnavailableError
from gpt.options import read_json

__all__ = ["Answer", "Question", "ask_all", "check_entries", "read_entries"]

FAILURES = 3  # in a row, after which a server counts as down


class Question(NamedTuple):
    """What is asked, and about what: the first fields of its line in the file of replies."""

    prompt: str
    about: Mapping[str, Any]  # {"entry": 3}, counted from 1


class Answer(NamedTuple):
    """What came back: a reply, or else why there is none."""

    reply: str | None
    error: str | None = None


def ask_all(
    questions: Sequence[Question],
    ask: Ask,
    read: Callable[[str], Mapping[str, Any]],
    task: Mapping[str, Any],
    out: Path | None,
    progress: Progress,
    take: Callable[[int, Answer], str],
) -> None:
    """Call `take(i, answer)` for each question in turn; those that `out` answers are not asked, others are added to it.

    `read` gives the fields that a reply adds to its line; `task` is what else replies must have in common to be in one
    file; what `take` returns is shown as the state so far. A question that fails is told and left unanswered; a server
    that is not there, or fails three times in a row, is a UserError that says how many replies are kept. Equal prompts
    are asked once. Ctrl-C passes through, with all replies kept.
    """
    header = json.loads(json.dumps({"judge": dict(getattr(ask, "settings", {})), "task": dict(task)}))
    digests = [hashlib.sha256(q.prompt.encode("utf-8", "surrogatepass")).hexdigest() for q in questions]
    known, lines = _replies(out, header)
    before = set(known)
    failed_in_a_row = 0
    progress.start(sum(digest in known for digest in digests), len(questions))
    try:
        for i, (question, digest) in enumerate(zip(questions, digests, strict=True)):
            if digest not in known:
                try:
                    known[digest] = _text(ask(question.prompt))
                    failed_in_a_row = 0
                except UserError as error:
                    failed_in_a_row += 1
                    if isinstance(error, UnavailableError) or failed_in_a_row >= FAILURES:
                        kept = sum(digest in known for digest in digests)
                        raise UserError(f"{error}; {_kept(kept, len(questions), out)}") from None
                    progress.line(f"{_name(question)}: {error}")
                    progress.step(take(i, Answer(None, str(error))))
                    continue
            line = {**question.about, **read(known[digest]), "reply": known[digest], "prompt": digest}
            if out is not None and (_identity(line) not in lines):
                _append(out, line)
                lines.add(_identity(line))
            state = take(i, Answer(known[digest]))
            if digest not in before:
                progress.step(state)
    except KeyboardInterrupt:
        kept = sum(digest in known for digest in digests)
        progress.line(f"interrupted: {_kept(kept, len(questions), out)}")
        raise
    finally:
        progress.close()


def _text(reply: object) -> str:
    if not isinstance(reply, str):
        raise UserError(f"expected a text from the judge, got a {type(reply).__name__}")
    return reply


def _name(question: Question) -> str:
    return ", ".join(f"{name} {value}" for name, value in question.about.items())


def _kept(done: int, total: int, out: Path | None) -> str:
    where = "and lost, because no file was given for them" if out is None else f"and kept in {out}; run again to go on"
    return f"{done} of {total} questions are answered {where}"


def _identity(line: Mapping[str, Any]) -> str:
    """What no two lines of a file have in common."""
    return json.dumps({name: line[name] for name in ("entry", "first", "prompt") if name in line})


def _replies(out: Path | None, header: Mapping[str, Any]) -> tuple[dict[str, str], set[str]]:
    """Of the file at `out` the replies by their prompts' digests, and the identities of its lines.

    Where there is none it begins, with the header. UserError if it was begun with another one.
    """
    replies: dict[str, str] = {}
    lines: set[str] = set()
    if out is None:
        return replies, lines
    whole = ""
    if out.exists():
        text = read_text(out)
        whole = text[: text.rfind("\n") + 1]  # a line without an end was cut by a kill, or a full disk
        if text and not whole:
            raise UserError(f"{out}: expected replies of a judge, which end in a line break; choose another --out")
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            record = json.loads(line)
            if number == 1:
                _check_header(out, record["judge"], header["judge"])
                _check_header(out, record["task"], header["task"])
            else:
                replies[record["prompt"]] = _text(record["reply"])
                lines.add(_identity(record))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, UserError) and number == 1:
                raise
            raise UserError(f"{out}: line {number} is no reply of a judge; choose another --out") from None
    if not whole or whole != text:
        with atomic_write(out) as file:
            file.write((whole or _line(header)).encode())
    return replies, lines


def _check_header(out: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name in [*wanted, *(name for name in found if name not in wanted)]:
        if found.get(name) != wanted.get(name):
            raise UserError(
                f"{out} holds replies with {name} {found.get(name)!r}, not {wanted.get(name)!r}; choose another --out"
            )


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record) + "\n"


def _append(out: Path, record: Mapping[str, Any]) -> None:
    """One more line, on disk: in one write, so that a kill leaves all of it or nothing, and the rest is not copied."""
    try:
        with open(out, "ab", buffering=0) as file:
            file.write(_line(record).encode())
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error


def read_entries(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """The first `limit` entries, or all, of a JSON file with a list of them. UserError names what is wrong with it."""
    entries = read_json(path)
    if not isinstance(entries, list) or not entries:
        found = "an empty list" if entries == [] else f"a {type(entries).__name__}"
        raise UserError(f"{path}: expected a list of entries, got {found}")
    return entries[:limit]


def check_entries(entries: Sequence[Any], *keys: str) -> None:
    """Refuse entries without an instruction, an output, or a text under `keys`; an input may be missing or none."""
    if not entries:
        raise UserError("expected entries with responses, got none")
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, Mapping):
            raise UserError(f"entry {number}: expected an object with an instruction, got a {type(entry).__name__}")
        for key in ("instruction", "output", *keys):
            if not isinstance(entry.get(key), str):
                names = ", ".join(sorted(map(str, entry))) or "nothing"
                found = f"a {type(entry[key]).__name__}" if key in entry else f"an entry with {names}"
                raise UserError(f'entry {number}: expected a text as "{key}", got {found}')
        if not isinstance(entry.get("input", ""), str | None):
            raise UserError(f'entry {number}: expected a text as "input", got a {type(entry["input"]).__name__}')
