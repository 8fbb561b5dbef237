"""A model's answers to a set of instructions, written beside the expected ones, to be read and judged.

A file of answers is a JSON array of the entries, each with its answer under one more key. It is written whole every few
entries, so that a run that is stopped loses little: started again it answers what is not answered yet. Beside it,
FILE.settings says what the answers were made with, so that another model does not go on with them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gpt.data.examples import Entries, JsonEntries, where
from gpt.data.files import check_can_write
from gpt.errors import UserError
from gpt.evaluate import progress as shown
from gpt.finetune.adapters import model_fingerprint
from gpt.finetune.answers import check_positive_or_none
from gpt.finetune.run import data_file, write_json
from gpt.llm import LLM
from gpt.options import read_json_object

__all__ = ["KEY", "RespondConfig", "respond", "run"]

KEY = "model_response"
BATCH = 8


def respond(
    llm: LLM,
    entries: Entries,
    out: Path,
    key: str = KEY,
    max_new_tokens: int = 256,
    progress: shown.Progress | None = None,
    save_every: int = 5,
) -> list[dict[str, Any]]:
    """Answer the entries, each by the most probable tokens, and write them with their answers to `out`.

    Entries that `out` has an answer to already keep it. UserError with the entry's number for one that cannot be
    answered, such as a prompt longer than the model's context, and for an `out` that holds other entries, or answers
    of another model or of other settings.
    """
    config = llm.engine.config
    weights = model_fingerprint(llm.engine.parameters(), config)
    made_with = {"weights": weights, "style": llm.style, "max_new_tokens": max_new_tokens}
    answered = _answered(out, entries, key, made_with)

    def save() -> None:
        write_json(_settings(out), made_with)
        write_json(out, answered)

    progress = progress or shown.create_progress()
    progress.start(len(answered), len(entries))
    context = config.context_length
    try:
        for number, start in enumerate(range(len(answered), len(entries), BATCH), 1):
            batch = [dict(entries[i]) for i in range(start, min(start + BATCH, len(entries)))]
            for i, entry in enumerate(batch, start):
                try:
                    length = len(llm.encode(entry))
                except UserError as error:
                    raise UserError(f"{where(entries, i)}: {error}") from None
                if length > context:
                    raise UserError(
                        f"{where(entries, i)}: the prompt has {length} tokens, the model's context {context}"
                    )
            for entry, text in zip(batch, llm.generate(batch, max_new_tokens), strict=True):
                answered.append({**entry, key: text.strip()})
                progress.step("")
            if number % save_every == 0:
                save()
    finally:
        progress.close()
        if answered:
            save()
    return answered


def _settings(out: Path) -> Path:
    return out.with_name(f"{out.name}.settings")


def _answered(out: Path, entries: Entries, key: str, made_with: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The answers that are in `out` already. UserError where they were not made with the same."""
    if not out.exists():
        return []
    try:
        found = json.loads(out.read_text(encoding="utf-8"))
        fits = len(found) <= len(entries) and all(
            isinstance(entry.pop(key), str) and entry == entries[i] for i, entry in enumerate(map(dict, found))
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        fits = False
    if not fits:
        raise UserError(
            f"{out}: holds something else than answers to these entries; remove it, or choose another --out"
        )
    before = read_json_object(_settings(out)) if _settings(out).exists() else {}
    for name, value in made_with.items():
        if before.get(name) != value:
            was = before.get(name, "unknown")
            raise UserError(f"{out}: holds answers of {name} {was}, not {value}; remove it, or choose another --out")
    return found


@dataclass(frozen=True)
class RespondConfig:
    """Answer a file of instructions with a model."""

    data: str = "instruction-data"
    """A name of the data catalogue, or a file of entries with "instruction" and perhaps "input"."""
    model: str = "runs/latest"
    """A run's folder (its finished model, its best, else its last checkpoint), a folder or file of weights, or a
    name (weights list)."""
    adapter: str | None = None
    """A file of low-rank adapters that were trained beside these weights."""
    engine: Literal["auto", "numpy", "torch", "triton"] = "auto"
    """auto: PyTorch where it is installed, else NumPy. triton: PyTorch on the kernels."""
    style: Literal["auto", "alpaca", "phi3", "plain"] = "auto"
    """How an instruction is put to the model; auto: as it was finetuned, else alpaca."""
    key: str = KEY
    """Under which an answer is written."""
    limit: int | None = None
    """Only so many entries, from the beginning; none: all."""
    max_new_tokens: int = 256
    """Tokens of an answer, at most."""
    out: str = "responses.json"
    """The file of entries with their answers."""

    def __post_init__(self) -> None:
        if self.key in ("instruction", "input", "output"):
            raise UserError(f"key: an answer under {self.key!r} would take the place of what the entry says there")
        check_positive_or_none(limit=self.limit, max_new_tokens=self.max_new_tokens)


def run(config: RespondConfig) -> None:
    """Answer, and print the first answers."""
    entries: Entries = JsonEntries(data_file(config.data))[: config.limit]
    check_can_write(Path(config.out))  # before the model is loaded, not after
    llm = LLM.load(config.model, config.engine, adapter=config.adapter)
    if config.style != "auto":
        llm.style = config.style
    answered = respond(llm, entries, Path(config.out), config.key, config.max_new_tokens)
    show(answered[:3], config.key, print)
    print(f"{len(answered)} answers: {config.out}")


def show(entries: list[dict[str, Any]], key: str, line: Callable[[str], object]) -> None:
    """Some entries with the expected answer and the model's."""
    for entry in entries:
        line(f"\n  Instruction: {_joined(entry)}")
        if entry.get("output"):
            line(f"  Expected:    {entry['output']}")
        line(f"  Answer:      {entry[key] or '(nothing)'}")


def _joined(entry: Mapping[str, Any]) -> str:
    return " | ".join(part for part in (entry["instruction"], entry.get("input")) if part)
