"""Generation: from logits to probabilities to the next token, again and again, on either engine.

    temperature   p = softmax(logits / T); the limit T = 0 is greedy: the largest logit, without a draw
    top-k         the k largest logits only (Fan et al. 2018), exactly k: of equal ones the lower id is kept
    top-p         of what top-k leaves, the fewest tokens whose probabilities reach p (Holtzman et al. 2020)

Probabilities are float64 and draws come from `reference.torch_rng`, so that the same seed gives the same text on either
engine: their logits differ in the last digits of a float32, too little to change which token is drawn, but for a tie.
The draws are those of torch.multinomial, as in the book: one for each entry of the vocabulary, kept or not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from gpt.engine import Engine, check_tokens
from gpt.errors import UserError
from reference.torch_rng import Generator

__all__ = [
    "GenerateConfig",
    "Sampling",
    "generate",
    "generate_text",
    "next_tokens",
    "sample_probabilities",
    "stream",
    "until",
]


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
    seed: int = 123
    """Of the draws."""
    stop: int | None = None
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


def sample_probabilities(
    logits: np.ndarray, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> np.ndarray:
    """logits (..., V) -> probabilities of the next token (..., V), float64, 0 for what top-k and top-p leave out.

    Raises UserError for logits that are infinite or not a number, except -inf, which gives 0.
    """
    logits = np.asarray(logits, np.float64)
    if not np.all(np.isfinite(logits.max(axis=-1))):
        raise UserError("logits: not finite, so there is no next token; the model's parameters are broken")
    order = np.argsort(-logits, axis=-1, kind="stable")  # largest first, of equal ones the lower id
    x = np.take_along_axis(logits, order, axis=-1)
    if temperature == 0:
        temperature, top_k = 1.0, 1
    with np.errstate(over="ignore"):  # a tiny temperature makes the others -inf, as it should
        p = np.exp((x - x[..., :1]) / temperature)
    if top_k is not None:
        p[..., top_k:] = 0
    p /= p.sum(axis=-1, keepdims=True)
    if top_p is not None and top_p < 1:
        p[np.cumsum(p, axis=-1) - p >= top_p] = 0  # those before it already reach top_p
        p /= p.sum(axis=-1, keepdims=True)
    probabilities = np.zeros_like(p)
    np.put_along_axis(probabilities, order, p, axis=-1)
    return probabilities


def next_tokens(logits: np.ndarray, sampling: Sampling, generator: Generator) -> np.ndarray:
    """logits (B, V) -> ids (B,) int64, drawn from `sample_probabilities`; greedy draws nothing."""
    p = sample_probabilities(logits, sampling.temperature, sampling.top_k, sampling.top_p)
    return p.argmax(axis=-1) if sampling.temperature == 0 else generator.multinomial(p)[:, 0]


def stream(
    engine: Engine, tokens: np.ndarray, sampling: Sampling, generator: Generator | None = None
) -> Iterator[np.ndarray]:
    """Continue tokens (B, T); yield the next ids (B,) int64 as they come.

    T may exceed the context length: the model sees the last `context_length` tokens. A row that has reached the stop
    token goes on with it; nothing more is yielded when all rows have. `generator` is Generator(sampling.seed) unless
    given. Raises UserError for an empty prompt, and an id or a stop token that is not in the vocabulary.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or tokens.size == 0:
        raise UserError(f"tokens: expected a prompt of at least one token in each row, got shape {tokens.shape}")
    context = engine.config.context_length
    for start in range(0, tokens.shape[1], context):
        check_tokens(tokens[:, start : start + context], engine.config)
    if sampling.stop is not None and not 0 <= sampling.stop < engine.config.vocab_size:
        raise UserError(f"stop: id {sampling.stop} is not in the vocabulary of {engine.config.vocab_size}")
    return _stream(engine, tokens[:, -context:], sampling, generator or Generator(sampling.seed))


def _stream(engine: Engine, tokens: np.ndarray, sampling: Sampling, generator: Generator) -> Iterator[np.ndarray]:
    running = np.ones(len(tokens), bool)
    for _ in range(sampling.max_new_tokens):
        new = next_tokens(engine.logits(tokens), sampling, generator)
        if sampling.stop is not None:
            new[~running] = sampling.stop
            running = new != sampling.stop
            if not running.any():
                return
        yield new
        tokens = np.column_stack([tokens, new])[:, -engine.config.context_length :]


def generate(engine: Engine, tokens: np.ndarray, sampling: Sampling, generator: Generator | None = None) -> np.ndarray:
    """tokens (B, T) -> the whole sequences (B, T + new) int64, without the stop token.

    `new` is the length of the longest continuation; the others are filled up with the stop token. See `stream`.
    """
    new = list(stream(engine, tokens, sampling, generator))
    return np.column_stack([np.asarray(tokens, np.int64), *new])


@dataclass(frozen=True)
class GenerateConfig:
    """Continue a text with a trained model."""

    checkpoint: str = "runs/latest"
    """A run's folder (its best, else its last checkpoint), a checkpoint's folder, or a model's file."""
    prompt: str = ""
    """The text to continue."""
    engine: Literal["auto", "numpy", "torch", "triton"] = "auto"
    """auto: PyTorch where it is installed, else NumPy. triton: PyTorch on the kernels."""
    samples: int = 1
    """How many texts; they differ where the temperature is above 0."""
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if not self.prompt:
            raise UserError('prompt: expected a text to continue, got none; give one with --prompt "..."')
        if self.samples < 1:
            raise UserError(f"samples: expected at least 1, got {self.samples}")


def generate_text(config: GenerateConfig) -> list[str]:
    """The prompt and its continuation, once for each of the samples."""
    from gpt import tokenizers
    from gpt.engine import create_engine
    from gpt.train.checkpoint import load_parameters

    saved = load_parameters(config.checkpoint)
    if saved.tokenizer is None:
        raise UserError(f"{config.checkpoint}: holds no tokenizer, so text means nothing to this model")
    tokenizer = tokenizers.from_spec(saved.tokenizer)
    dtype = str(next(iter(saved.params.values())).dtype)
    engine = create_engine(config.engine, saved.config, saved.params, dtype=dtype)
    sampling = config.sampling
    if sampling.stop is None:
        sampling = replace(sampling, stop=tokenizer.eot)
    ids = tokenizer.encode(config.prompt, allowed_special=[tokenizers.END_OF_TEXT])
    rows = generate(engine, np.tile(np.array(ids, np.int64), (config.samples, 1)), sampling)
    return [tokenizer.decode(np.concatenate([ids, until(row[len(ids) :], sampling.stop)])) for row in rows]


def until(ids: np.ndarray, stop: int | None) -> np.ndarray:
    """ids (T,) up to the first stop token."""
    found = np.flatnonzero(ids == stop)
    return ids[: found[0]] if found.size else ids
