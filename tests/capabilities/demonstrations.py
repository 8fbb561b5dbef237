"""Small demonstrations of the book, made of the reference's layers: two plots, and why a model has shortcuts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gpt.generate import sample_probabilities
from gpt.study.flow import deep_network, run_deep
from reference import gelu
from tests.figures.chapter5 import LOGITS, WORDS


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


def gradient_means(shortcuts: bool) -> list[float]:
    """Mean size of each weight's gradient of the squared output of five layers, 3-3-3-3-3-1, seed 123."""
    _, gradients = run_deep(deep_network(), shortcuts)
    return [float(np.abs(dweight).mean()) for dweight, _ in gradients]


def gradient_table() -> str:
    """The means with and without shortcuts, layer by layer."""
    rows = zip(gradient_means(False), gradient_means(True), strict=True)
    lines = [f"{i:>5}  {without:>9.5f}  {with_them:>9.5f}" for i, (without, with_them) in enumerate(rows)]
    return "\n".join(["layer  plain      shortcuts", *lines])
