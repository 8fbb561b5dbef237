"""What a report is about: a model, a text, and how the model came to be what it is.

Without a model of the user's a tiny one is made on the spot. Its vocabulary is the text's own characters and it learns
the text by heart, so that every table of it fits a page and its gradients have something to say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpt.engine import Arrays, Batch, Noise, OptimizerConfig, create_engine
from gpt.errors import UserError
from gpt.options import read_json_object
from reference.config import GPTConfig
from reference.init import initialize
from reference.philox import PhiloxNoise
from reference.torch_rng import Generator

__all__ = ["Subject", "loaded", "tiny"]

MOST_TOKENS = 48  # that fit on the axes of a page
MOST_WORDS = 300  # of a vocabulary that is spelled out on an axis
MOST_LOGGED = 500
MOST_PARAMETERS = 400_000_000  # in float64, with their gradients, 6.4 GB
SNAPSHOTS = 10
TINY = GPTConfig(2, MOST_TOKENS, 24, 2, 3, qkv_bias=True, tie_embeddings=True)
LR = 1e-3


@dataclass(frozen=True)
class Subject:
    """A model at some training steps, float64, and a text's tokens (1, T) with the tokens that follow, (1, T)."""

    name: str
    config: GPTConfig
    snapshots: dict[int, Arrays]  # the parameters after so many steps; the report is about the last
    tokens: np.ndarray
    targets: np.ndarray
    labels: list[str]  # of each token of the text, one more than T
    vocabulary: list[str]  # what each id stands for; empty where it is too long to be shown
    spell: Callable[[int], str]  # what an id stands for
    noise: Noise | None = None
    curve: Sequence[tuple[int, float]] = ()  # a run's steps and the losses that it logged, where it did

    @property
    def params(self) -> Arrays:
        """The parameters that the report is about."""
        return self.snapshots[max(self.snapshots)]


def tiny(text: str, steps: int = 30, seed: int = 1, dropout: float = 0.0) -> Subject:
    """A GPT of two layers that is trained on this text alone for so many steps."""
    if not 2 <= len(text) <= MOST_TOKENS + 1:
        raise UserError(f"text: expected 2 to {MOST_TOKENS + 1} characters for a page, got {len(text)}")
    if steps < 0:
        raise UserError(f"steps: expected at least 0, got {steps}")
    vocabulary = sorted(set(text))
    ids = np.array([[vocabulary.index(character) for character in text]])
    config = _with_dropout(TINY, dropout, vocab_size=len(vocabulary), n_outputs=len(vocabulary))
    params = initialize(config, Generator(seed))
    engine = create_engine("numpy", config, params, OptimizerConfig(lr=LR), "float64")
    batch, kept = Batch(ids[:, :-1], ids[:, 1:]), set(np.linspace(0, steps, SNAPSHOTS + 1).round().astype(int).tolist())
    snapshots = {}
    for step in range(steps + 1):
        if step in kept:
            snapshots[step] = {name: array.copy() for name, array in engine.parameters().items()}
        if step < steps:
            engine.accumulate(batch, noise=PhiloxNoise(seed, step) if dropout else None)
            engine.step(LR, 1.0)
    noise = PhiloxNoise(seed, steps) if dropout else None
    labels = [vocabulary[token] for token in ids[0]]
    return Subject(
        "a tiny GPT", config, snapshots, batch.inputs, batch.targets, labels, vocabulary, vocabulary.__getitem__, noise
    )


def loaded(source: str, text: str, seed: int = 1, dropout: float = 0.0) -> Subject:
    """A model from anywhere that weights are loaded from; of a run with snapshots these, and its last step."""
    from gpt import tokenizers
    from gpt.study.attention import snapshots
    from gpt.train.checkpoint import TRAINER, find_checkpoint
    from gpt.weights.load import load

    saved = load(source)
    size = saved.config.n_parameters
    if size > MOST_PARAMETERS:
        raise UserError(
            f"model: {source} has {size:,} parameters, a report shows models of at most {MOST_PARAMETERS:,}; "
            "it needs each in float64, and its gradient"
        )
    if saved.tokenizer is None:
        raise UserError(f"model: {source} holds no tokenizer, so text means nothing to it")
    tokenizer = tokenizers.from_spec(saved.tokenizer)
    ids = tokenizers.begun(tokenizer, tokenizers.encode_special(tokenizer, text))
    if len(ids) - 1 > saved.config.context_length:
        raise UserError(f"text: {len(ids)} tokens, more than the model's context of {saved.config.context_length}")
    if not 2 <= len(ids) <= MOST_TOKENS + 1:
        raise UserError(f"text: expected 2 to {MOST_TOKENS + 1} tokens for a page, got {len(ids)}")
    if saved.config.n_outputs != saved.config.vocab_size:
        raise UserError(f"model: {source} tells classes; a report needs a model that predicts the next token")
    config = _with_dropout(saved.config, dropout)
    paths = snapshots(Path(source)) if Path(source).is_dir() else {}
    last = find_checkpoint(source, "last") if paths else None
    if last and (step := int(read_json_object(last / TRAINER).get("step", 0))) > max(paths):
        paths[step] = last
    found = {step: load(path).params for step, path in paths.items()}
    places = np.linspace(0, len(found) - 1, min(len(found), SNAPSHOTS + 1)).round().astype(int)  # the last among them
    chosen = [list(found)[place] for place in places] if size * len(found) < MOST_PARAMETERS else []
    models = {step: _arrays(source, found[step]) for step in chosen} or {0: _arrays(source, saved.params)}

    def spell(token: int) -> str:
        return tokenizer.decode([token]) if token < tokenizer.n_vocab else f"[{token}]"  # a model may have more

    labels = [spell(token) for token in ids]
    vocabulary = [spell(token) for token in range(config.vocab_size)] if config.vocab_size <= MOST_WORDS else []
    noise = PhiloxNoise(seed, 0) if dropout else None
    row = np.array([ids])
    return Subject(
        str(source), config, models, row[:, :-1], row[:, 1:], labels, vocabulary, spell, noise, _logged(Path(source))
    )


def _logged(run: Path) -> list[tuple[int, float]]:
    """The losses of a run's training steps, of as many as a plot can show."""
    from gpt.train.log import read_log

    if not (run / "log.csv").is_file():
        return []
    log = read_log(run)
    every = max(1, len(log["step"]) // MOST_LOGGED)
    return [(int(step), float(loss)) for step, loss in zip(log["step"][::every], log["loss"][::every], strict=True)]


def _with_dropout(config: GPTConfig, rate: float, **changes: Any) -> GPTConfig:
    if not 0 <= rate < 1:
        raise UserError(f"dropout: expected a rate, 0 <= rate < 1, got {rate}")
    return dataclasses.replace(config, emb_dropout=rate, shortcut_dropout=rate, attn_dropout=rate, **changes)


def _arrays(source: str, params: Mapping[str, Any]) -> Arrays:
    """All parameters in float64; UserError where a run that failed left one that is no number."""
    arrays = {name: np.asarray(array).astype(np.float64) for name, array in params.items()}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise UserError(f"model: {source}: {name} holds {array[~np.isfinite(array)][0]}, as of a run that diverged")
    return arrays
