"""Generation: from logits to probabilities to the next token, again and again, on either engine.

    repetition    a logit of a token that the text holds is divided by the penalty where positive, else multiplied by it
                  (Keskar et al. 2019, section 4.1)
    temperature   p = softmax(logits / T); the limit T = 0 is greedy: the largest logit, without a draw
    top-k         the k largest logits only (Fan et al. 2018), exactly k: of equal ones the lower id is kept
    top-p         of what top-k leaves, the fewest tokens whose probabilities reach p (Holtzman et al. 2020)
    min-p         of what those leave, the tokens at least p times as probable as the best (Nguyen et al. 2024)

Probabilities are float64 and draws come from `reference.torch_rng`, so that the same seed gives the same text on either
engine: their logits differ in the last digits of a float32, too little to change which token is drawn, but for a tie.
The draws are those of torch.multinomial, as in the book: one for each entry of the vocabulary, kept or not. Each row of
a batch has draws of its own, so that what is written for one prompt does not depend on the prompts beside it.

A model reads each token once, and keeps its keys and values (reference/cache.py). Beyond the context length it sees the
last `context_length` tokens, all of them at new positions, so that from there on it reads them all for each token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gpt.engine import Engine, KeyValueCache, check_tokens
from gpt.errors import UserError
from reference.torch_rng import Generator

__all__ = ["Sampling", "Writer", "generate", "next_token", "sample_probabilities", "stream", "until"]


@dataclass(frozen=True)
class Sampling:
    """How a text is continued."""

    max_new_tokens: int = 100
    """Tokens to generate, at most."""
    temperature: float = 0.0
    """0: always the most probable token. Below 1 the probable ones more often, above 1 less often."""
    top_k: int | None = None
    """Choose among this many tokens only; more than there are means all."""
    top_p: float | None = None
    """Choose among the fewest tokens whose probabilities sum to this."""
    min_p: float | None = None
    """Choose among the tokens that are at least this probable, relative to the most probable one."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that the text already holds become less probable."""
    seed: int = 123
    """Of the draws."""
    stop_token: int | None = None
    """The token id that ends a text; none: where there is a tokenizer, its end of text."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise UserError(f"max_new_tokens: expected at least 0, got {self.max_new_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature: expected a number of at least 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k: expected at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p: expected more than 0 and at most 1, got {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise UserError(f"min_p: expected from 0 to 1, got {self.min_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(f"repetition_penalty: expected a positive number, got {self.repetition_penalty}")


def sample_probabilities(
    logits: np.ndarray,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> np.ndarray:
    """logits (..., V) -> probabilities of the next token (..., V), float64, 0 for what is left out.

    Raises UserError for logits that are infinite or not a number, except -inf, which gives 0.
    """
    logits = np.asarray(logits, np.float64)
    rows = [_probabilities(x, temperature, top_k, top_p, min_p) for x in logits.reshape(-1, logits.shape[-1])]
    return np.stack(rows).reshape(logits.shape)


def _probabilities(
    x: np.ndarray, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> np.ndarray:
    """`sample_probabilities` of one row, logits (V,) float64. Sorts no more of a vocabulary than it must."""
    largest = x.max()
    if not np.isfinite(largest):
        raise UserError("logits: not finite, so there is no next token; the model's parameters are broken")
    if temperature == 0:
        temperature, top_k = 1.0, 1
    with np.errstate(over="ignore"):  # a tiny temperature makes the others -inf, as it should
        p = np.exp((x - largest) / temperature)
    if top_k is not None and top_k < len(x):
        least = np.partition(x, -top_k)[-top_k]  # the k-th largest
        equal = np.flatnonzero(x == least)
        p[x < least] = 0
        p[equal[top_k - np.count_nonzero(x > least) :]] = 0
    p /= p.sum()
    if top_p is not None and top_p < 1:
        kept = np.flatnonzero(p)
        kept = kept[np.argsort(-p[kept], kind="stable")]  # most probable first, of equal ones the lower id
        before = np.cumsum(p[kept]) - p[kept]
        p[kept[before >= top_p]] = 0  # those before it already reach top_p
        p /= p.sum()
    if min_p:
        p[p < min_p * p.max()] = 0
        p /= p.sum()
    return p


def next_token(logits: np.ndarray, sampling: Sampling, generator: Generator, text: Sequence[int] = ()) -> int:
    """logits (V,), and the ids of the text so far -> the id drawn from `sample_probabilities`; greedy draws nothing."""
    if sampling.repetition_penalty != 1:
        held, logits = np.unique(np.asarray(text, np.int64)), np.array(logits, np.float64)
        scores = logits[held]
        logits[held] = np.where(scores > 0, scores / sampling.repetition_penalty, scores * sampling.repetition_penalty)
    if sampling.temperature == 0:
        best = int(np.argmax(logits))
        if not np.isfinite(logits[best]):  # a NaN counts as the largest
            raise UserError("logits: not finite, so there is no next token; the model's parameters are broken")
        return best
    p = sample_probabilities(logits, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    return int(generator.multinomial(p)[0])


class Writer:
    """Continues a batch of texts, which may be of different lengths, each until it ends.

    Tokens are those below `vocab_size`, a tokenizer's, which may be smaller than the model's.
    Row i draws from a generator of its own, Generator(sampling.seed + i) unless `generators` are given. `cached` False:
    every token is computed from the whole text, as a check. Raises UserError for an empty prompt, and an id or a stop
    token that is not in the vocabulary.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[np.ndarray],
        sampling: Sampling,
        generators: Sequence[Generator] | None = None,
        cached: bool = True,
        vocab_size: int | None = None,
    ) -> None:
        context = engine.config.context_length
        for prompt in map(np.asarray, prompts):
            if prompt.ndim != 1 or prompt.size == 0:
                raise UserError(
                    f"tokens: expected a prompt of at least one token in each row, got shape {prompt.shape}"
                )
            for start in range(0, len(prompt), context):
                check_tokens(prompt[None, start : start + context], engine.config)
        if sampling.stop_token is not None and not 0 <= sampling.stop_token < engine.config.vocab_size:
            raise UserError(
                f"stop_token: id {sampling.stop_token} is not in the vocabulary of {engine.config.vocab_size}"
            )
        self.engine, self.sampling, self.cached, self.vocab_size = engine, sampling, cached, vocab_size
        self.texts = [[int(token) for token in prompt] for prompt in prompts]  # with what has been written
        self.running = list(range(len(prompts))) if sampling.max_new_tokens else []  # rows that have not ended
        self.generators = generators or [Generator(sampling.seed + i) for i in range(len(prompts))]
        self._left = sampling.max_new_tokens
        self._cache: KeyValueCache | None = None
        self._read: list[int] = []  # the rows that the cache holds

    def step(self) -> dict[int, int]:
        """The next token of each running row, by the row's index; without the rows that have now ended."""
        logits, tokens = self._logits(), {}
        for row, scores in zip(self.running, logits, strict=True):
            token = next_token(scores[: self.vocab_size], self.sampling, self.generators[row], self.texts[row])
            if token != self.sampling.stop_token:
                tokens[row] = token
                self.texts[row].append(token)
        self._left -= 1
        self.running = list(tokens) if self._left else []
        return tokens

    def end(self, row: int) -> None:
        """Write no more to this row."""
        self.running.remove(row)

    def _logits(self) -> np.ndarray:
        """(R, V) for the running rows: of their last tokens where the cache holds the rest, else of all they have."""
        context = self.engine.config.context_length
        if self._cache is not None and self._cache.lengths.max() < context:
            if self.running != self._read:
                self._cache.select(np.array([self._read.index(row) for row in self.running]))
                self._read = list(self.running)
            return self.engine.logits(np.array([self.texts[row][-1:] for row in self.running]), self._cache)
        windows = [self.texts[row][-context:] for row in self.running]
        counts = np.array(list(map(len, windows)))
        tokens = np.zeros((len(windows), counts.max()), np.int64)
        for padded, window in zip(tokens, windows, strict=True):
            padded[: len(window)] = window
        self._cache, self._read = None, list(self.running)
        if self.cached and counts.max() < context:
            self._cache = self.engine.new_cache(len(windows), min(context, int(counts.max()) + self._left))
        return self.engine.logits(tokens, self._cache, counts if counts.min() < counts.max() else None)


def stream(
    engine: Engine, tokens: np.ndarray, sampling: Sampling, generators: Sequence[Generator] | None = None
) -> Iterator[np.ndarray]:
    """Continue tokens (B, T); yield the next ids (B,) int64 as they come.

    A row that has ended goes on with the stop token; nothing more is yielded when all rows have. See `Writer`.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 2:
        raise UserError(f"tokens: expected a prompt of at least one token in each row, got shape {tokens.shape}")
    return _stream(Writer(engine, list(tokens), sampling, generators))


def _stream(writer: Writer) -> Iterator[np.ndarray]:
    while writer.running:
        new = writer.step()
        if new:
            yield np.array([new.get(row, writer.sampling.stop_token) for row in range(len(writer.texts))])


def generate(
    engine: Engine, tokens: np.ndarray, sampling: Sampling, generators: Sequence[Generator] | None = None
) -> np.ndarray:
    """tokens (B, T) -> the whole sequences (B, T + new) int64, without the stop token.

    `new` is the length of the longest continuation; the others are filled up with the stop token. See `stream`.
    """
    new = list(stream(engine, tokens, sampling, generators))
    return np.column_stack([np.asarray(tokens, np.int64), *new])


def until(ids: np.ndarray, stop: int | None) -> np.ndarray:
    """ids (T,) up to the first stop token."""
    found = np.flatnonzero(ids == stop)
    return ids[: found[0]] if found.size else ids
