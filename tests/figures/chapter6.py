"""Chapter 6: messages to tell apart, and the classifier's head."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial
from typing import Any

import numpy as np

from gpt import tokenizers
from gpt.data.catalogue import get
from gpt.data.examples import ExampleLoader
from gpt.engine import IGNORE, trained_names
from gpt.finetune.adapters import adapt
from gpt.finetune.classification import LABELS, Classification, Row, balance, collate, read_rows, split
from gpt.finetune.classify import trained_layers
from gpt.finetune.config import ClassifyConfig
from gpt.tokenizers import END_OF_TEXT, encode_special
from reference.config import PRESETS, GPTConfig
from reference.torch_rng import Generator
from tests.figures.registry import figure

CLASSIFY = ClassifyConfig()
SMALL = PRESETS["gpt2-small"]


def messages() -> list[Row]:
    return read_rows(get("sms-spam"))


def counts(rows: list[Row]) -> dict[str, int]:
    return dict(Counter(LABELS[label] for label, _ in rows))


def loaders() -> list[ExampleLoader]:
    """Of training, validation and test messages, as the book makes them."""
    gpt2 = tokenizers.load("gpt2")
    parts = split(balance(messages()))
    train = Classification(parts[0], gpt2)
    sets = [train, *(Classification(part, gpt2, train.max_length) for part in parts[1:])]
    make = partial(collate, pad_id=gpt2.eot, max_length=train.max_length)
    generator = Generator(123)
    return [ExampleLoader(part, make, 8, part is train, part is train, generator) for part in sets]


def classifier(config: GPTConfig) -> GPTConfig:
    """The architecture with a head that has an output for each label."""
    return config.replace(**CLASSIFY.changes())


@figure("ch06.encode.eot")
def end_token() -> list[int]:
    return encode_special(tokenizers.load("gpt2"), END_OF_TEXT)


@figure("ch06.data.shape")
def shape_of_the_messages() -> dict[str, int]:
    rows = messages()
    return {"rows": len(rows), "cols": len(rows[0])}


@figure("ch06.data.value_counts")
def messages_of_each_label() -> dict[str, int]:
    return counts(messages())


@figure("ch06.data.balanced")
def balanced_messages_of_each_label() -> dict[str, int]:
    return counts(balance(messages()))


@figure("ch06.data.split_sizes")
def parts_of_the_messages() -> dict[str, Any]:
    train, validation, test = split(balance(messages()))
    sizes = {"train": len(train), "val": len(validation), "test": len(test)}
    return {**sizes, "train_spam": sum(label for label, _ in train), "first5_train": [list(row) for row in train[:5]]}


@figure("ch06.data.max_length")
def longest_training_message() -> int:
    return Classification(split(balance(messages()))[0], tokenizers.load("gpt2")).max_length


@figure("ch06.data.batches")
def number_of_batches() -> dict[str, int]:
    return dict(zip(("train", "val", "test"), map(len, loaders()), strict=True))


@figure("ch06.data.batch_shape")
def shape_of_a_batch() -> dict[str, list[int]]:
    inputs, targets = next(loaders()[0].epoch())
    return {"x": list(inputs.shape), "y": list(targets[targets != IGNORE].shape)}


@figure("ch06.trainable_params")
def parameters_that_learn() -> int:
    model = classifier(SMALL)
    shapes = model.parameter_shapes()
    return sum(math.prod(shapes[name]) for name in trained_names(model, trained_layers("last_block", model)))


@figure("ch06.head.init")
def new_head() -> dict[str, list]:
    """The head that takes the place of another is the only thing that is drawn."""
    model = GPTConfig(50257, 1, SMALL.emb_dim, 1, SMALL.n_heads, tie_embeddings=True)
    params = {name: np.broadcast_to(np.float32(0), shape) for name, shape in model.parameter_shapes().items()}
    found, _ = adapt(params, model, Generator(123), **CLASSIFY.changes())
    return {"w": np.asarray(found["head.weight"])[:, :4].tolist(), "b": np.asarray(found["head.bias"]).tolist()}
