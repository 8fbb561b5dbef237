"""Small demonstrations of the book, made of the reference's layers: two plots, and why a model has shortcuts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gpt.generate import sample_probabilities
from reference import gelu, linear
from reference.torch_rng import Generator
from tests.figures.chapter5 import LOGITS, WORDS
from tests.figures.engines import draw_linear

SAMPLE = np.array([[1.0, 0.0, -1.0]], np.float32)


def plot_activations(path: Path) -> Any:
    """GELU and ReLU in two panels; returns matplotlib's figure."""
    from matplotlib.figure import Figure

    figure = Figure((8, 3), layout="constrained")
    x = np.linspace(-3, 3, 100, dtype=np.float32)
    curves = {"GELU": gelu.forward(x, "tanh")[0], "ReLU": np.maximum(x, 0)}
    for axes, (title, y) in zip(figure.subplots(1, 2), curves.items(), strict=True):
        axes.plot(x, y)
        axes.set(title=title, xlabel="x", ylabel=f"{title}(x)")
        axes.grid(True)
    figure.savefig(path)
    return figure


def plot_temperatures(path: Path, temperatures: tuple[float, ...] = (1.0, 0.1, 5.0)) -> Any:
    """Probabilities of the next word as groups of bars, one for each temperature; returns matplotlib's figure."""
    from matplotlib.figure import Figure

    figure = Figure((6, 3), layout="constrained")
    axes, width = figure.subplots(), 0.8 / len(temperatures)
    for i, temperature in enumerate(temperatures):
        axes.bar(np.arange(9) + i * width, sample_probabilities(LOGITS, temperature), width, label=f"T = {temperature}")
    axes.set_xticks(np.arange(9) + 0.4 - width / 2, WORDS, rotation=90)
    axes.set_ylabel("probability")
    axes.legend()
    figure.savefig(path)
    return figure


def deep_network() -> list[tuple[np.ndarray, np.ndarray | None]]:
    """Weight and bias of five layers, 3-3-3-3-3-1, seed 123."""
    generator = Generator(123)
    return [draw_linear(generator, 3, d_out) for d_out in (3, 3, 3, 3, 1)]


def gradient_means(shortcuts: bool) -> list[float]:
    """Mean size of each weight's gradient of the squared output; each layer is linear, then GELU."""
    x, saved = SAMPLE, []
    for weight, bias in deep_network():
        z, of_linear = linear.forward(x, weight, bias)
        y, of_gelu = gelu.forward(z, "tanh")
        skipped = shortcuts and x.shape == y.shape
        saved.append((of_linear, of_gelu, skipped))
        x = x + y if skipped else y
    dx, means = 2 * x, []
    for of_linear, of_gelu, skipped in reversed(saved):
        through, dweight, _ = linear.backward(gelu.backward(dx, of_gelu), of_linear)
        means.append(float(np.abs(dweight).mean()))
        dx = dx + through if skipped else through
    return means[::-1]


def gradient_table() -> str:
    """The means with and without shortcuts, layer by layer."""
    rows = zip(gradient_means(False), gradient_means(True), strict=True)
    lines = [f"{i:>5}  {without:>9.5f}  {with_them:>9.5f}" for i, (without, with_them) in enumerate(rows)]
    return "\n".join(["layer  plain      shortcuts", *lines])
