"""Appendix A: a perceptron on a toy problem. D: clipping and the learning rate. E: sizes of low-rank adapters."""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import Any

import numpy as np

from gpt.data.order import BatchOrder
from gpt.engine import trained_names
from gpt.generate import sample_probabilities
from gpt.train.schedule import warmup_cosine
from reference.lora import LoRA
from reference.torch_rng import Generator
from tests.figures import engines
from tests.figures.chapter6 import SMALL, classifier
from tests.figures.engines import Layers, draw_linear
from tests.figures.registry import figure

X_TRAIN = np.array([[-1.2, 3.1], [-0.9, 2.9], [-0.5, 2.6], [2.3, -1.1], [2.7, -1.5]], np.float32)
Y_TRAIN = np.array([0, 0, 0, 1, 1])
X_TEST, Y_TEST = np.array([[-0.8, 2.8], [2.6, -1.6]], np.float32), np.array([0, 1])


def perceptron(generator: Generator, n_inputs: int, n_outputs: int) -> dict[str, np.ndarray]:
    """Parameters of the book's n_inputs-30-20-n_outputs network, drawn as PyTorch does."""
    params: dict[str, np.ndarray] = {}
    for i, sizes in enumerate(itertools.pairwise((n_inputs, 30, 20, n_outputs))):
        params[f"{i}.weight"], params[f"{i}.bias"] = draw_linear(generator, *sizes)  # type: ignore[assignment]
    return params


@lru_cache
def toy_training(name: str) -> tuple[dict[str, np.ndarray], list[float]]:
    """Three epochs of gradient descent, batches of two, learning rate 0.5 -> parameters, the loss of each step."""
    layers, generator = engines.layers(name), Generator(123)
    params = perceptron(generator, 2, 2)
    order = BatchOrder(len(X_TRAIN), batch_size=2, shuffle=True, drop_last=True, generator=generator)
    losses = []
    for _ in range(3):
        for rows in order:
            loss, gradients = layers.perceptron_gradients(params, X_TRAIN[rows], Y_TRAIN[rows])
            params = {parameter: p - np.float32(0.5) * gradients[parameter] for parameter, p in params.items()}
            losses.append(loss)
    return params, losses


def outputs(layers: Layers, x: np.ndarray) -> np.ndarray:
    return layers.perceptron(toy_training(layers.name)[0], x)


@figure("appA.matmul")
def matrix_product(layers: Layers) -> list:
    x = np.arange(1, 7, dtype=np.float32).reshape(2, 3)
    return layers.linear(x, x).tolist()


@figure("appA.gradient")
def gradients_of_logistic_regression(layers: Layers) -> dict[str, float]:
    """The cross entropy of a sigmoid is that of a softmax whose other logit is 0."""
    params = {
        "0.weight": np.array([[0], [2.2]], np.float32),
        "0.bias": np.zeros(2, np.float32),
    }
    _, gradients = layers.perceptron_gradients(params, np.array([[1.1]], np.float32), np.array([1]))
    return {"dw": gradients["0.weight"][1, 0].item(), "db": gradients["0.bias"][1].item()}


@figure("appA.mlp.params")
def perceptron_sizes() -> dict[str, int]:
    sizes = {"50_3": (50, 3), "2_2": (2, 2)}
    return {name: sum(p.size for p in perceptron(Generator(123), *size).values()) for name, size in sizes.items()}


@figure("appA.mlp.weight0")
def first_weights() -> list:
    weight, edge = perceptron(Generator(123), 50, 3)["0.weight"], [0, 1, 2, -3, -2, -1]
    return weight[np.ix_(edge, edge)].tolist()


@figure("appA.mlp.softmax")
def untrained_probabilities(layers: Layers) -> list:
    logits = layers.perceptron(perceptron(Generator(123), 50, 3), Generator(123).rand((1, 50)))
    return sample_probabilities(logits).tolist()


@figure("appA.loader.order")
def order_of_the_batches() -> list:
    order = BatchOrder(len(X_TRAIN), batch_size=2, shuffle=True, drop_last=False, generator=Generator(123))
    return [rows.tolist() for rows in order]


@figure("appA.train.losses")
def losses_of_the_toy_training(layers: Layers) -> list[float]:
    return toy_training(layers.name)[1]


@figure("appA.train.outputs")
def trained_outputs(layers: Layers) -> list:
    return outputs(layers, X_TRAIN).tolist()


@figure("appA.train.probas")
def trained_probabilities(layers: Layers) -> list:
    return sample_probabilities(outputs(layers, X_TRAIN)).tolist()


@figure("appA.train.preds")
def predictions(layers: Layers) -> dict[str, Any]:
    train, test = (outputs(layers, x).argmax(axis=-1) for x in (X_TRAIN, X_TEST))
    return {
        "pred": train.tolist(),
        "correct": int(np.count_nonzero(train == Y_TRAIN)),
        "train_acc": float(np.mean(train == Y_TRAIN)),
        "test_acc": float(np.mean(test == Y_TEST)),
    }


@figure("appD.clip.norm_example")
def clipped_gradient(layers: Layers) -> dict[str, Any]:
    norm, clipped = layers.clip(np.array([[1, 2], [2, 4]], np.float32), max_norm=1.0)
    return {"norm": norm, "clipped": clipped.tolist()}


@figure("appD.lr.cosine")
def learning_rates() -> dict[str, float]:
    """Of some of 135 steps: 20 of warmup, then a cosine."""
    schedule = {"total": 135, "peak": 1e-2, "warmup": 20, "initial": 1e-4, "minimum": 1e-5}
    return {str(step): warmup_cosine(step, **schedule) for step in (0, 1, 19, 20, 77, 100, 134)}  # type: ignore[arg-type]


@figure("appE.lora.params")
def sizes_of_adapters() -> dict[str, int]:
    model = classifier(SMALL)
    adapted = model.replace(lora=LoRA(rank=16, alpha=16.0))
    shapes, trained = adapted.parameter_shapes(), trained_names(adapted)
    frozen = [name for name in trained if name in model.parameter_shapes()]
    return {
        "before": model.n_parameters,
        "frozen": sum(math.prod(shapes[name]) for name in frozen),
        "lora": sum(math.prod(shapes[name]) for name in trained),
    }


@figure("course.orpo.lr_lambda")
def learning_rate_factors() -> dict[str, float]:
    """Of some of 111408 steps: 100 of warmup, then a cosine to 0."""
    return {str(step): warmup_cosine(step, 111408, 1.0, 100) for step in (0, 50, 100, 55704, 111408)}
