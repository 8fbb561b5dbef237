"""Recorded passes that the tests of this folder look at."""

from functools import cache

import numpy as np

from gpt.parity import model as parity
from gpt.parity.defects import DEFECTS
from gpt.study.record import record
from gpt.study.subject import tiny
from reference.config import GPTConfig
from reference.init import initialize
from reference.torch_rng import Generator

TEXT = "the cat sat on the mat"


@cache
def tiny_pass(dropout=0.0):
    """The report's own model: recording, noise."""
    subject = tiny(TEXT, steps=30, dropout=dropout)
    return record(subject.config, subject.params, subject.tokens, subject.targets, subject.noise), subject.noise


@cache
def checked_pass(name):
    """One of the checker's models, dropout on and with targets that do not count, on five examples."""
    config, batch, noise = parity.CONFIGS[name], parity.batch(parity.CONFIGS[name]), parity.noise()
    return record(config, parity.parameters(config), batch.inputs, batch.targets, noise), noise


def fresh_pass(config, seed=0, length=12, rows=1):
    """A model with GPT-2's first weights, in float64, on random tokens."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, config.vocab_size, (rows, length + 1))
    params = {name: value.astype(np.float64) for name, value in initialize(config, Generator(seed), "gpt2").items()}
    return record(config, params, tokens[:, :-1], tokens[:, 1:])


def small_config(**changes):
    return GPTConfig(**{"vocab_size": 11, "context_length": 32, "emb_dim": 12, "n_layers": 2, "n_heads": 2, **changes})


def defect_named(name):
    return next(defect for defect in DEFECTS if defect.name == name)
