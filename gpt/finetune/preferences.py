"""Pairs of answers, one chosen and one rejected, to learn a preference from: reading, tokens and batches.

An entry is either of

    {"instruction", "input", "output", "chosen", "rejected"}    texts; input and output may be absent
    {"source", "prompt", "chosen": [...], "rejected": [...]}    messages of a "role" and a "content"; only the two lists
                                                                must be there

Of messages, the prompt is all but the last, which is the assistant's answer; both conversations have the same prompt.

A batch of P pairs has 2 P rows, the chosen answers and then, in the same order, the rejected ones:

    row       a b c d e #          a prompt a b c, its answer d e, the end token
    inputs    a b c d e ...        then padding
    targets   . . d e # ...        IGNORE but where a token of the answer is to be predicted, the end token included
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from gpt import chat, prompts
from gpt.data.examples import Entries, Examples, Subset, number, where
from gpt.data.files import atomic_write
from gpt.engine import IGNORE, Preferences
from gpt.errors import UserError
from gpt.finetune.answers import (
    Answered,
    EncodedEntries,
    Rows,
    check_positive_or_none,
    check_texts,
    encode_answered,
    too_long,
)
from gpt.options import did_you_mean
from gpt.tokenizers import Tokenizer, encode_special
from gpt.weights.tensors import read_safetensors, write_safetensors
from reference.torch_rng import Generator

__all__ = [
    "Pair",
    "PreferenceDataset",
    "StoredPairs",
    "Texts",
    "collate",
    "filter_sources",
    "load_pairs",
    "pair_texts",
    "save_pairs",
    "split",
]

FORMAT = 1


class Pair(NamedTuple):
    """Token ids (T,) int32 of a prompt with the chosen and with the rejected answer, and the prompt's length in each.

    `reference`: the log-probabilities of the two answers before training, where they are known.
    """

    chosen: np.ndarray
    rejected: np.ndarray
    chosen_prompt: int
    rejected_prompt: int
    reference: tuple[float, float] | None = None


class Texts(NamedTuple):
    """An entry put into a style."""

    prompt: str
    chosen: str
    rejected: str


def pair_texts(entry: Mapping[str, Any], where: str, style: str = "alpaca", end: str = "") -> Texts:
    """Prompt and answers of an entry, in a prompt style (gpt/prompts.py) or a chat template (gpt/chat.py).

    An instruction in a chat template is the user's message. Answers in a template are as it writes them, with its
    marks but without white space at the end; `end` is the text of the end token, for templates that write it.
    UserError, beginning with `where`, for an unsound entry, and for messages in a prompt style.
    """
    try:
        if isinstance(entry.get("chosen"), list):
            conversations = [_messages(entry, key) for key in ("chosen", "rejected")]
            if conversations[0][:-1] != conversations[1][:-1]:
                raise UserError("the chosen and the rejected conversation differ before their last message")
            if style in prompts.STYLES:
                raise UserError(
                    f"style {style} puts single instructions, and these are messages: "
                    f"expected one of {', '.join(chat.TEMPLATES)}, or a template"
                )
            return _rendered(conversations, style, end)
        check_texts(entry, where, ("instruction", "chosen", "rejected"), ("input", "output"))
        if style in chat.TEMPLATES or "{" in style:
            question = {"role": "user", "content": prompts.plain(entry)}
            answers = [{"role": "assistant", "content": entry[key]} for key in ("chosen", "rejected")]
            return _rendered([[question, answer] for answer in answers], style, end)
        return Texts(prompts.format_prompt(entry, style), entry["chosen"], entry["rejected"])
    except UserError as error:
        raise error if str(error).startswith(where) else UserError(f"{where}: {error}") from None


def filter_sources(entries: Entries, sources: Collection[str]) -> Subset:
    """The entries whose "source" is none of these. UserError for one that no entry has. Reads all of them."""
    found: set[str] = set()
    rows = []
    for i in range(len(entries)):
        source = str(entries[i].get("source"))
        found.add(source)
        if source not in sources:
            rows.append(i)
    for source in sources:
        if source not in found:
            raise UserError(f"source: {source!r} is not one of {', '.join(sorted(found))}{did_you_mean(source, found)}")
    return Subset(entries, np.array(rows, np.int64))


def split(entries: Entries, validation: float = 0.05, seed: int | None = 42) -> tuple[Subset, Subset]:
    """Training and validation entries: of the N shuffled, the last ceil(N validation) are for validation.

    They are shuffled by torch.randperm of the seed; with None they are not. UserError where a part is left empty.
    """
    n = len(entries)
    held_out = math.ceil(n * validation) if 0 < validation < 1 else 0
    if not 0 < held_out < n:
        raise UserError(f"split: expected a fraction between 0 and 1 that leaves some of {n} entries, got {validation}")
    order = np.arange(n) if seed is None else Generator(seed).randperm(n)
    return Subset(entries, order[: n - held_out]), Subset(entries, order[n - held_out :])


class PreferenceDataset(Examples[Pair]):
    """Entries as token ids of prompt and answer, an end token behind each answer, where the tokenizer has one.

    `max_length` is the model's context: rows have at most one token more, the last being a target only. An entry is
    dropped, and stands in `dropped` by its number in the file, with the reason, if its prompt has `max_prompt_tokens`
    or more, or an answer has no token within max_length. `identical` are the numbers of entries with twice the same
    answer, which teach nothing; they are kept unless `drop_identical`. `cache` keeps all ids, 4 bytes a token.
    `reference` (N, 2), if set, goes with the pairs: log-probabilities of the chosen and the rejected answer.
    """

    def __init__(
        self,
        entries: Entries,
        tokenizer: Tokenizer,
        style: str = "alpaca",
        max_length: int | None = None,
        max_prompt_tokens: int | None = None,
        drop_identical: bool = False,
        cache: bool = True,
    ) -> None:
        check_positive_or_none(max_length=max_length, max_prompt_tokens=max_prompt_tokens)
        end = tokenizer.decode([tokenizer.eot]) if tokenizer.eot is not None else ""
        same: set[int] = set()

        def encode_entry(i: int) -> list[Answered] | str:
            texts = pair_texts(entries[i], where(entries, i), style, end)
            if texts.chosen == texts.rejected:
                same.add(number(entries, i))
                if drop_identical:
                    return "the chosen and the rejected answer are the same"
            if max_prompt_tokens is not None:
                count = len(encode_special(tokenizer, texts.prompt))
                if count >= max_prompt_tokens:
                    return f"the prompt has {count} tokens, expected fewer than {max_prompt_tokens}"
            rows = [_ended(tokenizer, texts.prompt, answer) for answer in texts[1:]]
            for row in rows:
                if row.prompt_length == len(row.ids):
                    return "an answer is empty"
                if reason := too_long(row, max_length):
                    return reason
            return [row._replace(ids=row.ids[: None if max_length is None else max_length + 1]) for row in rows]

        self._encoded = EncodedEntries(entries, encode_entry, 2, cache)
        self.dropped = self._encoded.dropped
        self.longest, self.longest_answer = self._encoded.longest, self._encoded.longest_answer  # tokens of a row
        self.identical = sorted(same)
        self.reference: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self._encoded)

    def example(self, index: int) -> Pair:
        chosen, rejected = self._encoded[index]
        return _pair(chosen, rejected, self.reference, index)


class StoredPairs(Examples[Pair]):
    """Pairs that `save_pairs` wrote. Ids are read from the file when they are asked for."""

    def __init__(self, rows: Rows, reference: np.ndarray | None = None) -> None:
        self._rows = rows
        self.reference = reference

    def __len__(self) -> int:
        return len(self._rows) // 2

    def example(self, index: int) -> Pair:
        return _pair(self._rows[2 * index], self._rows[2 * index + 1], self.reference, index)


def save_pairs(path: str | Path, pairs: Sequence[Pair], made_from: Mapping[str, Any]) -> None:
    """Write pairs as one safetensors file, all of it or nothing: tokens, ends of rows, prompt lengths, reference.

    `made_from`, JSON-able, is what they depend on: the file's SHA-256, the tokenizer's spec(), the style, ...
    """
    path, rows, reference = Path(path), Rows(), []
    for pair in pairs:
        rows.append(Answered(pair.chosen, pair.chosen_prompt))
        rows.append(Answered(pair.rejected, pair.rejected_prompt))
        reference.append(pair.reference)
    arrays = {
        "tokens": np.asarray(rows.tokens, np.int32),
        "ends": np.asarray(rows.ends, np.int64),
        "prompt_lengths": np.asarray(rows.prompt_lengths, np.int32),
    }
    if (known := _references(reference)) is not None:
        arrays["reference"] = known
    metadata = {"pairs": str(FORMAT), "made_from": json.dumps(made_from, sort_keys=True)}
    with atomic_write(path) as file:
        write_safetensors(Path(file.name), arrays, metadata)


def load_pairs(path: str | Path, made_from: Mapping[str, Any]) -> StoredPairs:
    """Pairs that `save_pairs` wrote. UserError for any other file, and where they were made from something else."""
    path = Path(path)
    stored, metadata = read_safetensors(path)
    if metadata.get("pairs") != str(FORMAT) or not {"tokens", "ends", "prompt_lengths"} <= set(stored):
        raise UserError(f"{path}: holds no pairs of answers in format {FORMAT}")
    if metadata.get("made_from") != json.dumps(made_from, sort_keys=True):
        raise UserError(f"{path}: was made from other data, or with other settings: make it again")
    tokens, ends, lengths = (np.asarray(stored[name]) for name in ("tokens", "ends", "prompt_lengths"))
    reference = np.asarray(stored["reference"]) if "reference" in stored else None
    sizes = np.diff(ends, prepend=0)
    sound = (
        tokens.ndim == ends.ndim == 1
        and ends.shape == lengths.shape
        and len(ends) % 2 == 0
        and (sizes >= 1).all()
        and (ends[-1] if len(ends) else 0) == len(tokens)
        and ((0 <= lengths) & (lengths < sizes)).all()
        and (reference is None or reference.shape == (len(ends) // 2, 2))
    )
    if not sound:
        raise UserError(f"{path}: is damaged: its rows do not fit together")
    return StoredPairs(Rows.of(tokens, ends, lengths), reference)


def collate(
    pairs: Sequence[Pair],
    pad_id: int,
    objective: Literal["dpo", "orpo"],
    beta: float,
    max_length: int | None = None,
) -> Preferences:
    """A batch of pairs, padded on the right to its longest row, of which at most `max_length` inputs are taken.

    Its reference is the pairs' own, or None if they have none. UserError for an answer that is all cut off, as
    PreferenceDataset leaves none for its own max_length.
    """
    answered = [(pair.chosen, pair.chosen_prompt) for pair in pairs]
    answered += [(pair.rejected, pair.rejected_prompt) for pair in pairs]
    rows = [(ids[: None if max_length is None else max_length + 1], prompt) for ids, prompt in answered]
    for row, (ids, prompt) in enumerate(rows):
        if max(prompt, 1) >= len(ids):
            raise UserError(f"row {row} of the batch: no token of the answer is among its {len(ids)} tokens")
    width = max(len(ids) for ids, _ in rows) - 1
    inputs = np.full((len(rows), width), pad_id, np.int64)
    targets = np.full((len(rows), width), IGNORE, np.int64)
    for row, (ids, prompt) in enumerate(rows):
        inputs[row, : len(ids) - 1] = ids[:-1]
        first = max(prompt - 1, 0)  # here the answer's first token is predicted; a text's first is nowhere
        targets[row, first : len(ids) - 1] = ids[first + 1 :]
    reference = _references([pair.reference for pair in pairs])
    return Preferences(inputs, targets, objective, beta, None if reference is None else reference.T.reshape(-1))


def _messages(entry: Mapping[str, Any], key: str) -> list[Any]:
    """A conversation that ends with the assistant's answer to something."""
    messages = entry.get(key)
    if not isinstance(messages, list):
        raise UserError(f"expected a list of messages as {key}, got {type(messages).__name__}")
    last = messages[-1] if messages else None
    if len(messages) < 2 or not isinstance(last, Mapping) or last.get("role") != "assistant":
        raise UserError(f"expected the messages of {key} to be a prompt and, last, the assistant's answer")
    return messages


def _rendered(conversations: Sequence[Sequence[Mapping[str, Any]]], template: str, end: str) -> Texts:
    prompt = chat.render(conversations[0][:-1], template, eos_token=end, add_generation_prompt=True)
    answers = []
    for messages in conversations:
        text = chat.render(messages, template, eos_token=end)
        if not text.startswith(prompt):
            raise UserError(
                "the chat template does not begin a conversation with the prompt that it makes of its start"
            )
        answers.append(text.removeprefix(prompt).rstrip())
    return Texts(prompt, *answers)


def _ended(tokenizer: Tokenizer, prompt: str, answer: str) -> Answered:
    """Prompt and answer, then one end token."""
    row = encode_answered(tokenizer, prompt, answer)
    has_end = row.prompt_length < len(row.ids) and row.ids[-1] == tokenizer.eot
    if tokenizer.eot is None or has_end:
        return row
    return row._replace(ids=np.append(row.ids, np.int32(tokenizer.eot)))


def _pair(chosen: Answered, rejected: Answered, reference: np.ndarray | None, index: int) -> Pair:
    known = None if reference is None else (float(reference[index, 0]), float(reference[index, 1]))
    return Pair(chosen.ids, rejected.ids, chosen.prompt_length, rejected.prompt_length, known)


def _references(known: Sequence[tuple[float, float] | None]) -> np.ndarray | None:
    """Log-probabilities (P, 2) float64 of P pairs; None where no pair has any. UserError where only some have."""
    given = [values for values in known if values is not None]
    if given and len(given) < len(known):
        raise UserError(f"reference: expected the log-probabilities of {len(known)} pairs, got those of {len(given)}")
    return np.array(given, np.float64) if given else None
