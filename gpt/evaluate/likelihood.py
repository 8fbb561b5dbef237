"""How probable a model finds texts: continuations of contexts, whole texts, and the perplexity of a long one.

    continuation  log p(continuation | context), a sum over its tokens
    rolling       log p(text), every token predicted once
    perplexity    exp(-log p(text) / tokens); bits per byte -log2 p(text) / bytes, which compares tokenizers too

The conventions are those of EleutherAI's lm-evaluation-harness, so that figures compare. A context and its continuation
are encoded together, and the continuation has the tokens behind as many as the context has alone; spaces that end the
context are moved to the continuation first, where vocabularies have them. An empty context is the token that begins or,
where there is none, ends a text.

What is longer than the model's context length T is read in windows. With a token 0 before them, tokens 1..n are
predicted so (T = 4, n = 10); the last window reaches back as far as it can:

    inputs     0 1 2 3 | 4 5 6 7 |     6 7 8 9
    predicted  1 2 3 4 | 5 6 7 8 |         9 10

With a stride S below T each window but the first predicts S tokens only, and each of these sees T - S tokens at least.
Perplexities are lower then, and cost T / S times as much.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from gpt.data.text import read_text
from gpt.engine import IGNORE, Batch, Engine
from gpt.errors import UserError
from gpt.evaluate.progress import Progress
from gpt.llm import LLM

__all__ = ["Likelihood", "Perplexity", "continuation_logps", "perplexity", "rolling_logps", "windows"]

Item = TypeVar("Item")


class Likelihood(NamedTuple):
    """What a model thinks of a text."""

    logp: float  # natural logarithm of its probability
    n_tokens: int  # that were predicted
    n_bytes: int  # of these, as UTF-8
    greedy: bool  # no token was more probable at any position


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text."""

    perplexity: float  # infinite where exp overflows
    bits_per_byte: float
    nats_per_token: float  # the mean cross entropy
    tokens: int  # that were predicted
    bytes: int  # of these, as UTF-8


class _Row(NamedTuple):
    """Tokens (T,) of which the last `scored` are predicted, each from all before it."""

    tokens: np.ndarray
    scored: int


def windows(length: int, first: int, width: int, stride: int | None = None) -> Iterator[tuple[int, int, int]]:
    """(begin, predicted, end) over `length` tokens: of tokens begin..end-1, at most width + 1, the last are predicted,
    those from `predicted` on. Each token from `first` (at least 1) on is predicted once; see the module's docstring."""
    predicted = first
    while predicted < length:
        end = min(length, predicted + (width if predicted == first or stride is None else stride))
        yield max(0, end - width - 1), predicted, end
        predicted = end


def continuation_logps(
    llm: LLM, pairs: Sequence[tuple[str, str]], batch_size: int = 4, progress: Progress | None = None
) -> list[Likelihood]:
    """The likelihood of each continuation given its context, for pairs (context, continuation), in their order.

    A context that is too long loses its beginning; a continuation longer than the context length is read in windows. An
    empty continuation is certain. Raises UserError for an empty context where the tokenizer has no token that begins or
    ends a text, and for a model whose probabilities are not numbers.
    """
    width = llm.engine.config.context_length
    encoded: dict[str, list[int]] = {}
    rows, owners = [], []
    for i, (context, continuation) in enumerate(pairs):
        ids, first = _encode_pair(llm, context, continuation, encoded)
        tokens = np.array(ids, np.int64)
        for begin, predicted, end in windows(len(tokens), first, width):
            rows.append(_Row(tokens[begin:end], end - predicted))
            owners.append(i)
    sizes = [len(_utf8(continuation)) for _, continuation in pairs]
    return _add_up(_score(llm.engine, rows, batch_size, progress, share=True), rows, owners, sizes)


def rolling_logps(
    llm: LLM, texts: Sequence[str], batch_size: int = 4, progress: Progress | None = None
) -> list[Likelihood]:
    """The likelihood of each text, by itself, in their order. An empty one is certain.

    The first token is predicted from the token that begins or ends a text; where the tokenizer has none, it is not
    predicted, nor counted.
    """
    rows, owners, sizes = [], [], []
    for i, text in enumerate(texts):
        tokens, first, size = _encode_text(llm, text)
        sizes.append(size)
        for begin, predicted, end in windows(len(tokens), first, llm.engine.config.context_length):
            rows.append(_Row(tokens[begin:end], end - predicted))
            owners.append(i)
    return _add_up(_score(llm.engine, rows, batch_size, progress), rows, owners, sizes)


def perplexity(
    llm: LLM, text: str | Path, stride: int | None = None, batch_size: int = 4, progress: Progress | None = None
) -> Perplexity:
    """The perplexity of a text, or of the UTF-8 file at a path, of any length.

    Windows are disjoint, or overlap for a `stride` below the context length, see the module's docstring. The first
    token is as in `rolling_logps`. Raises UserError for a text without a token to predict, a stride that is not from 1
    to the context length, and a model whose probabilities are not numbers.
    """
    width = llm.engine.config.context_length
    if stride is not None and not 1 <= stride <= width:
        raise UserError(f"stride: expected from 1 to the model's context length {width}, got {stride}")
    tokens, first, size = _encode_text(llm, read_text(text) if isinstance(text, Path) else text)
    if first >= len(tokens):
        where = f"{text}: " if isinstance(text, Path) else "text: "
        raise UserError(f"{where}expected at least one token to predict, got none")
    rows = [_Row(tokens[a:c], c - b) for a, b, c in windows(len(tokens), first, width, stride)]
    count = len(tokens) - first
    nats = -math.fsum(logp for logp, _ in _score(llm.engine, rows, batch_size, progress)) / count
    try:
        value = math.exp(nats)
    except OverflowError:
        value = math.inf
    return Perplexity(value, nats * count / math.log(2) / size if size else math.inf, nats, count, size)


def _encode_pair(llm: LLM, context: str, continuation: str, encoded: dict[str, list[int]]) -> tuple[list[int], int]:
    """The ids of both, and the number of those before the continuation. `encoded` remembers contexts."""
    bare = context.rstrip()
    continuation, context = context[len(bare) :] + continuation if continuation else "", bare
    if not continuation:
        return [], 0
    if not context:
        return _begun(llm, llm.encode(continuation))
    if context not in encoded:
        encoded[context] = llm.encode(context)
    before, whole = encoded[context], llm.encode(context + continuation)
    if len(before) < len(whole):
        return whole, len(before)
    # The continuation's beginning and the context's end are one token: it is predicted, from what is the same in both.
    same = next((i for i, (a, b) in enumerate(zip(whole, before, strict=False)) if a != b), len(whole) - 1)
    return (whole, same) if same else _begun(llm, whole)


def _begun(llm: LLM, ids: list[int]) -> tuple[list[int], int]:
    """ids that have a token before them that begins or ends a text, and the number of tokens before the text."""
    begin = list(llm.tokenizer.begin)
    if begin:  # which LLM.encode has put there
        return ids, len(begin)
    eot = llm.tokenizer.eot
    if eot is None:
        raise UserError(
            f"context: expected a text, got an empty one; the tokenizer {llm.tokenizer.name} has no token for the "
            "beginning or the end of a text that could stand for it"
        )
    return (ids, 1) if ids[0] == eot and len(ids) > 1 else ([eot, *ids], 1)


def _encode_text(llm: LLM, text: str) -> tuple[np.ndarray, int, int]:
    """The tokens of a text with what comes before them, the number of the first that is predicted, and the bytes of
    those that are."""
    if not text:
        return np.zeros(0, np.int64), 0, 0
    ids, size = llm.encode(text), len(_utf8(text))
    begin, eot = list(llm.tokenizer.begin), llm.tokenizer.eot
    if begin:
        return np.array(ids, np.int64), len(begin), size
    if eot is not None:
        return np.array([eot, *ids], np.int64), 1, size
    return np.array(ids, np.int64), 1, size - len(llm.tokenizer.decode_bytes(ids[:1]))


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _score(
    engine: Engine, rows: Sequence[_Row], batch_size: int, progress: Progress | None, share: bool = False
) -> list[tuple[float, bool]]:
    """The log-probability of what each row predicts, and whether all of it is what the model would write.

    Rows of similar length go together, the longest first, so that little is padded and memory that does not suffice
    shows at once. With `share`, rows that differ in their last token alone, as the letters behind a question, are read
    once.
    """
    if batch_size < 1:
        raise UserError(f"batch_size: expected at least 1, got {batch_size}")
    same: dict[bytes, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        if share and row.scored == 1:
            same[row.tokens[:-1].tobytes()].append(i)
    shared = [group for group in same.values() if len(group) > 1]
    together = {i for group in shared for i in group}
    alone = [i for i in range(len(rows)) if i not in together]
    progress = progress or Progress()
    progress.start(0, sum(len(rows[i].tokens) - 1 for i in [*alone, *(group[0] for group in shared)]))
    scores: dict[int, tuple[float, bool]] = {}
    try:
        for group in _chunks(sorted(alone, key=lambda i: -len(rows[i].tokens)), batch_size):
            batch = [rows[i] for i in group]
            for i, score in zip(group, _targets(engine, batch), strict=True):
                scores[i] = _checked(*score)
            progress.step("", sum(len(row.tokens) - 1 for row in batch))
        for groups in _chunks(sorted(shared, key=lambda group: -len(rows[group[0]].tokens)), batch_size):
            contexts = [rows[group[0]].tokens[:-1] for group in groups]
            for group, logps in zip(groups, _next_logps(engine, contexts), strict=True):
                best = logps.max()
                for i in group:
                    logp = logps[rows[i].tokens[-1]]
                    scores[i] = _checked(float(logp), bool(logp >= best))
            progress.step("", sum(map(len, contexts)))
    finally:
        progress.close()
    return [scores[i] for i in range(len(rows))]


def _checked(logp: float, greedy: bool) -> tuple[float, bool]:
    if math.isnan(logp):
        raise UserError("a log-probability is not a number; the model's parameters are broken")
    return logp, greedy


def _targets(engine: Engine, batch: Sequence[_Row]) -> list[tuple[float, bool]]:
    """The scores of a batch of rows, padded on the right, where padding changes nothing before it."""
    inputs = np.zeros((len(batch), max(len(row.tokens) for row in batch) - 1), np.int64)
    targets = np.full_like(inputs, IGNORE)
    for i, (tokens, scored) in enumerate(batch):
        end = len(tokens) - 1
        inputs[i, :end] = tokens[:-1]
        targets[i, end - scored : end] = tokens[-scored:]
    logps, best = engine.token_logps(Batch(inputs, targets))
    hits = (best | (targets == IGNORE)).all(axis=1)
    return [(float(logp), bool(hit)) for logp, hit in zip(logps.sum(axis=1), hits, strict=True)]


def _next_logps(engine: Engine, contexts: Sequence[np.ndarray]) -> np.ndarray:
    """Log-probabilities (R, V) of the token behind each context, float64."""
    counts = np.array(list(map(len, contexts)))
    tokens = np.zeros((len(contexts), counts.max()), np.int64)
    for padded, context in zip(tokens, contexts, strict=True):
        padded[: len(context)] = context
    logits = engine.logits(tokens, None, counts if counts.min() < counts.max() else None)
    shifted = np.asarray(logits, np.float64)
    with np.errstate(invalid="ignore"):  # what is not a number is refused with the scores
        shifted = shifted - shifted.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _add_up(
    scores: Iterable[tuple[float, bool]], rows: Sequence[_Row], owners: Sequence[int], sizes: Sequence[int]
) -> list[Likelihood]:
    """One likelihood for all rows of a text; `owners`: the text of each row; `sizes`: each text's bytes."""
    logps: list[list[float]] = [[] for _ in sizes]
    counts, greedy = [0] * len(sizes), [True] * len(sizes)
    for (logp, best), row, owner in zip(scores, rows, owners, strict=True):
        logps[owner].append(logp)
        counts[owner] += row.scored
        greedy[owner] &= best
    found = zip(logps, counts, sizes, greedy, strict=True)
    return [Likelihood(math.fsum(parts), count, size, best) for parts, count, size, best in found]


def _chunks(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
