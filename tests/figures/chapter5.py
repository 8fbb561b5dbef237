"""Chapter 5 and its training run: losses, decoding, ten epochs on a short story; and appendix D's run."""

from __future__ import annotations

import math
from contextlib import suppress
from functools import lru_cache
from typing import Any

import numpy as np

from gpt import tokenizers
from gpt.data.text import split_text
from gpt.data.windows import WindowLoader
from gpt.engine import Engine, OptimizerConfig
from gpt.generate import Sampling, generate, next_token, sample_probabilities
from gpt.train.config import TrainConfig
from gpt.train.log import Row
from gpt.train.progress import Progress
from gpt.train.trainer import Trainer, evaluate
from reference.torch_rng import Generator
from tests.figures import engines
from tests.figures.chapter2 import encode, verdict
from tests.figures.engines import BOOK_256, Layers, seeded, seeded_engine, seeded_model
from tests.figures.registry import figure

INPUTS = np.array([[16833, 3626, 6100], [40, 1107, 588]])
TARGETS = np.array([[3626, 6100, 345], [1107, 588, 11311]])
WORDS = ["closer", "every", "effort", "forward", "inches", "moves", "pizza", "toward", "you"]
LOGITS = np.array(
    [4.51, 0.89, -1.90, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79], np.float32
)  # after "every effort moves you"


# Decoding.


@figure("ch05.decode.argmax")
def most_probable_word() -> str:
    return WORDS[int(sample_probabilities(LOGITS, temperature=0).argmax())]


def drawn(temperature: float) -> dict[str, int]:
    """How often a thousand draws with seed 123 give each word."""
    generator, sampling = Generator(123), Sampling(temperature=temperature)
    ids = [next_token(LOGITS, sampling, generator) for _ in range(1000)]
    return {word: ids.count(i) for i, word in enumerate(WORDS)}


@figure("ch05.decode.counts")
def words_drawn() -> dict[str, int]:
    return {word: count for word, count in drawn(1.0).items() if count}


@figure("ch05.decode.ex5.1.pizza")
def pizza() -> dict[str, float]:
    probability = sample_probabilities(LOGITS, temperature=5)[WORDS.index("pizza")]
    return {"T0.1": drawn(0.1)["pizza"], "T5": drawn(5.0)["pizza"], "prob": float(probability)}


@figure("ch05.decode.topk")
def largest_three() -> dict[str, list]:
    p = sample_probabilities(LOGITS, top_k=3)
    kept = np.argsort(-p)[: np.count_nonzero(p)]
    return {"v": LOGITS[kept].tolist(), "i": kept.tolist()}


@figure("ch05.decode.topk_masked")
def all_but_three_masked() -> list[float | None]:
    p = sample_probabilities(LOGITS, top_k=3)
    return [logit if kept else None for logit, kept in zip(LOGITS.tolist(), p > 0, strict=True)]


@figure("ch05.decode.topk_probas")
def probabilities_of_three() -> list[float]:
    return sample_probabilities(LOGITS, top_k=3).tolist()


# The loss, step by step.


def target_log_probabilities(layers: Layers) -> np.ndarray:
    """(6,): less the cross entropy of each position alone."""
    logits = seeded_model(layers.name, BOOK_256)(INPUTS).reshape(6, -1)
    return np.array([-layers.cross_entropy(logits[i : i + 1], TARGETS.reshape(6, 1)[i]) for i in range(6)])


def loss(layers: Layers, targets: np.ndarray = TARGETS) -> float:
    return layers.cross_entropy(seeded_model(layers.name, BOOK_256)(INPUTS), targets)


@figure("ch05.loss.inputs_encode")
def inputs_and_targets() -> dict[str, list]:
    first, second = encode("every effort moves you"), encode("I really like chocolate")
    return {"i": [first[:3], second[:3]], "t": [first[1:], second[1:]]}


@figure("ch05.loss.argmax")
def most_probable_ids(layers: Layers) -> list:
    return seeded_model(layers.name, BOOK_256)(INPUTS).argmax(axis=-1).tolist()


@figure("ch05.loss.target_probas")
def target_probabilities(layers: Layers) -> list:
    return np.exp(target_log_probabilities(layers)).reshape(2, 3).tolist()


@figure("ch05.loss.log_probas")
def log_probabilities(layers: Layers) -> list:
    return target_log_probabilities(layers).tolist()


@figure("ch05.loss.avg")
def mean_log_probability(layers: Layers) -> dict[str, float]:
    mean = float(target_log_probabilities(layers).mean())
    return {"avg": mean, "neg": -mean}


@figure("ch05.loss.cross_entropy")
def mean_cross_entropy(layers: Layers) -> float:
    return loss(layers)


@figure("ch05.loss.misprint")
def loss_with_a_misprinted_target(layers: Layers) -> float:
    return loss(layers, np.where(TARGETS == 1107, 107, TARGETS))


@figure("ch05.loss.perplexity")
def perplexity(layers: Layers) -> float:
    return math.exp(loss(layers))


@figure("ch05.generate.untrained")
def untrained_text(layers: Layers) -> dict[str, Any]:
    out = generate(seeded_engine(layers.name, BOOK_256), np.array([encode("Every effort moves you")]), Sampling(10))[0]
    return {"n": len(out), "text": tokenizers.load("gpt2").decode(out)}


# Data, and training.


def loaders(generator: Generator) -> tuple[WindowLoader, WindowLoader]:
    """Training and validation batches of 2 x 256 tokens, drawn from one stream as the book's are."""
    ids = [encode(part) for part in split_text(verdict())]
    train = WindowLoader(ids[0], 2, 256, 256, shuffle=True, drop_last=True, generator=generator)
    return train, WindowLoader(ids[1], 2, 256, 256, shuffle=False, drop_last=False, generator=generator)


@figure("ch05.data.split_chars")
def characters_of_the_split() -> dict[str, int]:
    train, validation = split_text(verdict())
    return {"train_chars": len(train), "val_chars": len(validation)}


@figure("ch05.data.loader_shapes")
def shapes_of_the_batches() -> dict[str, list]:
    train, validation = loaders(Generator(123))
    shapes = {"train": train, "val": validation}
    return {name: [list(batch.inputs.shape) for batch in loader] for name, loader in shapes.items()}


@figure("ch05.initial_losses")
def losses_before_training(layers: Layers) -> dict[str, Any]:
    engine = seeded_engine(layers.name, BOOK_256)
    train, validation = loaders(Generator(123))
    each = [engine.loss(batch) for batch in train]
    return {"train": float(np.mean(each)), "val": evaluate(engine, validation)}


class Evaluations(Progress):
    """Keeps the evaluated rows; stops the run after some steps, if told to."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.rows: list[Row] = []
        self.samples: list[str] = []
        self.stop_after = stop_after

    def step(self, row: Row) -> None:
        if not math.isnan(row.train_loss):
            self.rows.append(row)

    def line(self, text: str) -> None:
        self.samples.append(text)
        if len(self.samples) == self.stop_after:
            raise EnoughError


class EnoughError(Exception):
    """The epochs that the figure needs are over."""


def train(layers: Layers, config: TrainConfig, lr: float, epochs: int | None = None) -> Evaluations:
    """The book's training function on the seeded model: dropout and data from one stream, a greedy sample an epoch."""
    generator = Generator.from_state(seeded(BOOK_256)[1])
    engine = seeded_engine(layers.name, BOOK_256, OptimizerConfig(lr=lr, weight_decay=0.1))
    evaluations = Evaluations(epochs)
    trainer = Trainer(
        engine, config, *loaders(generator), lr=lr, generator=generator, progress=evaluations, sample=sample_text
    )
    with suppress(EnoughError):
        trainer.run()
    return evaluations


def sample_text(engine: Engine) -> str:
    """50 greedy tokens after "Every effort moves you"."""
    ids = generate(engine, np.array([encode("Every effort moves you")]), Sampling(max_new_tokens=50))
    return tokenizers.load("gpt2").decode(ids[0])


@figure("ch05.train10.log.regression", slow=True)
def ten_epochs(layers: Layers) -> dict[str, list[float]]:
    config = TrainConfig(
        epochs=10, schedule="constant", max_norm=None, eval_every=5, eval_batches=5, dropout_source="torch"
    )
    rows = train(layers, config, lr=4e-4).rows
    return {"train": [row.train_loss for row in rows], "val": [row.val_loss for row in rows]}


@figure("ch05.ex5.3.deterministic")
def one_candidate_is_greedy(layers: Layers) -> bool:
    engine, prompt = seeded_engine(layers.name, BOOK_256), np.array([encode("Every effort moves you")])
    choices = (Sampling(3), Sampling(3, temperature=0.0, top_k=25), Sampling(3, temperature=1.4, top_k=1))
    greedy, *others = (generate(engine, prompt, sampling).tolist() for sampling in choices)
    return all(other == greedy for other in others)


@lru_cache(maxsize=1)
def two_epochs_with_warmup(name: str) -> Evaluations:
    """Appendix D: warmup, cosine decay and clipping, of which the source prints the first epochs.

    The source gives AdamW no learning rate, so the peak is AdamW's own 1e-3, and it clips only after the warmup.
    """
    config = TrainConfig(
        epochs=15, warmup_steps=10, initial_lr=1e-5, min_lr=1e-5, max_norm=1.0, clip_from_step=11,
        eval_every=5, eval_batches=1, dropout_source="torch",
    )  # fmt: skip
    return train(engines.layers(name), config, lr=1e-3, epochs=2)


@figure("appD.train.log.first4", slow=True)
def first_evaluations_with_warmup(layers: Layers) -> list:
    rows = two_epochs_with_warmup(layers.name).rows
    return [[math.ceil(row.epoch), row.step, row.train_loss, row.val_loss] for row in rows]


@figure("appD.train.samples", slow=True)
def first_samples_with_warmup(layers: Layers) -> list[str]:
    return two_epochs_with_warmup(layers.name).samples
