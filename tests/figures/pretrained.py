"""Figures that need OpenAI's weights: what is in them, what they write, and how well they know a text."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import numpy as np

from gpt import LLM, tokenizers
from gpt.data import catalogue
from gpt.engine import create_engine
from gpt.generate import Sampling, generate
from gpt.prompts import alpaca
from gpt.train.trainer import evaluate
from gpt.weights.load import load
from gpt.weights.names import FORMATS, from_ours
from gpt.weights.native import SavedModel
from reference.torch_rng import Generator
from tests.figures.chapter5 import loaders
from tests.figures.engines import Layers
from tests.figures.registry import figure

SMALL, MEDIUM = "gpt2-small", "gpt2-medium"
PROMPT = "Every effort moves you"
SPAM = (
    "Is the following text 'spam'? Answer with 'yes' or 'no': 'You are a winner you have been specially selected to "
    "receive $1000 cash or a $2000 award.'"
)


@lru_cache(maxsize=1)  # of the large ones one at a time
def engine(name: str, weights: str) -> Any:
    saved = load(weights)
    return create_engine(name, saved.config, saved.params)


def variables() -> tuple[SavedModel, dict[str, np.ndarray]]:
    """The small model, and its tensors under OpenAI's names."""
    saved = load(SMALL)
    return saved, from_ours(FORMATS["openai-gpt2"], saved.config, saved.params)


def written(layers: Layers, weights: str, prompt: str, sampling: Sampling) -> str:
    """The prompt and its continuation."""
    tokenizer = tokenizers.load("gpt2")
    out = generate(engine(layers.name, weights), np.array([tokenizer.encode(prompt)]), sampling)[0]
    return tokenizer.decode(out)


def ends(array: np.ndarray) -> list[Any]:
    """The first and the last three entries of the last axis."""
    return np.concatenate([array[..., :3], array[..., -3:]], axis=-1).astype(float).tolist()


@figure("ch05.pretrained.settings")
def settings() -> dict[str, Any]:
    saved, theirs = variables()
    config = saved.config
    sizes = {
        "n_vocab": config.vocab_size,
        "n_ctx": config.context_length,
        "n_embd": config.emb_dim,
        "n_head": config.n_heads,
        "n_layer": config.n_layers,
    }
    tops = {"blocks" if name.startswith("model/h") else name.rpartition("/")[2] for name in theirs}
    return {"settings": sizes, "keys": ["blocks", *sorted(tops - {"blocks"})]}


@figure("ch05.pretrained.wte")
def token_embedding() -> list[Any]:
    return ends(np.asarray(variables()[1]["model/wte"])[[0, 1, 2, -3, -2, -1]])


@figure("ws.pretrained.c_fc")
def first_mlp() -> dict[str, Any]:
    theirs = variables()[1]
    w = np.asarray(theirs["model/h0/mlp/c_fc/w"])[0]
    b = np.asarray(theirs["model/h0/mlp/c_fc/b"])
    return {"b": ends(b), "w_row0": ends(w[0]), "w_rowm1": ends(w[-1]), "shape": list(w.shape)}


@figure("ch05.pretrained.generate")
def sampled_text(layers: Layers) -> str:
    return written(layers, SMALL, PROMPT, Sampling(25, temperature=1.5, top_k=50, seed=123))


@figure("ws.pretrained.generate")
def ten_tokens(layers: Layers) -> str:
    return written(layers, SMALL, PROMPT, Sampling(10))


@figure("ch05.pretrained.ex5.5")
def losses(layers: Layers) -> dict[str, float]:
    model = engine(layers.name, SMALL)
    train, validation = loaders(Generator(123))
    return {"train": evaluate(model, train), "val": evaluate(model, validation)}


@figure("ch06.pretrained.greedy15")
def fifteen_tokens(layers: Layers) -> str:
    return written(layers, SMALL, PROMPT, Sampling(15))


@figure("ch06.pretrained.spam_prompt")
def spam_question(layers: Layers) -> str:
    return written(layers, SMALL, SPAM, Sampling(23))


@figure("ch07.pretrained.val0_response")
def first_response(layers: Layers) -> str:
    entries = json.loads(catalogue.get("instruction-data").read_text(encoding="utf-8"))
    prompt = alpaca(entries[935 + 110]).removesuffix("\n\n### Response:\n")  # of the split 935, 110, 55
    llm = LLM(engine(layers.name, MEDIUM), tokenizers.load("gpt2"))
    return llm.generate(prompt, 35).strip()
