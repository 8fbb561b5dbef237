"""Loss curves of one run or several, as PNG and PDF, drawn without a display."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt.data.files import atomic_write
from gpt.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["is_measured", "plot_losses", "plot_metric", "save_plot"]

BLUE, ORANGE, GREEN, PURPLE, GREY = "#1f6fb4", "#d9602b", "#2e8b6d", "#7b5ea7", "#555555"
SPLITS = (("train", BLUE, "training"), ("val", ORANGE, "validation"))
COLOURS = (BLUE, ORANGE, GREEN, PURPLE)
STYLE: Any = {
    "font.size": 10,
    "axes.edgecolor": GREY,
    "axes.labelcolor": "#222222",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": "#222222",
    "ytick.labelcolor": "#222222",
    "pdf.fonttype": 42,  # text stays text
}


def plot_losses(
    logs: Mapping[str, Mapping[str, np.ndarray]], title: str = "", loss: str = "Loss (nats per token)"
) -> Figure:
    """A figure of the logs (label -> what `read_log` returns): loss over epochs, or over steps below two epochs.

    The second axis counts tokens seen. One run: training and validation in two colours, and the loss of each step
    behind them. Several: a colour each, validation dashed, the later ones thinner, so that curves that agree are seen
    to lie upon each other.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    if not logs or any(len(log["step"]) == 0 for log in logs.values()):
        raise UserError("no steps in the log, so there is nothing to plot")
    in_epochs = all(log["epoch"][-1] >= 2 for log in logs.values())
    with rc_context(STYLE):
        figure = Figure(figsize=(7, 4.3), layout="constrained")
        axes = figure.add_subplot()
        for i, (label, log) in enumerate(logs.items()):
            x = log["epoch"] if in_epochs else log["step"] - log["step"][0] + 1
            if len(logs) == 1:
                _draw_one(axes, x, log)
            else:
                _draw_among(axes, x, log, label, COLOURS[i % len(COLOURS)], width=1.4 + 2.6 * (len(logs) - 1 - i))
        axes.set(xlabel="Epochs" if in_epochs else "Steps", ylabel=loss)
        axes.set_title(title, loc="left", fontweight="bold")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
        axes.spines["right"].set_visible(False)
        axes.legend(frameon=False)

        first = next(iter(logs.values()))
        tokens = axes.twiny()  # the lower axis in other units
        end = first["epoch"][-1] if in_epochs else len(first["step"])
        tokens.set_xlim(0, axes.get_xlim()[1] * first["tokens"][-1] / end)
        tokens.set_xlabel("Tokens seen")
        tokens.xaxis.set_major_formatter(EngFormatter(sep=""))
        tokens.spines["right"].set_visible(False)
    return figure


def is_measured(log: Mapping[str, np.ndarray], name: str) -> bool:
    """Whether any evaluation measured it, on either split."""
    columns = [f"{split}_{name}" for split, *_ in SPLITS]
    return any(np.isfinite(log[column]).any() for column in columns if column in log)


def plot_metric(log: Mapping[str, np.ndarray], name: str) -> Figure:
    """A figure of what evaluations measured beside the loss, columns train_NAME and val_NAME, over epochs.

    The second axis counts examples seen. UserError where nothing was measured.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    curves = [(log[f"{split}_{name}"], c, label) for split, c, label in SPLITS if f"{split}_{name}" in log]
    if not is_measured(log, name):
        raise UserError(f"no {name} in the log, so there is nothing to plot")
    with rc_context(STYLE):
        figure = Figure(figsize=(7, 4.3), layout="constrained")
        axes = figure.add_subplot()
        for y, colour, label in curves:
            known = np.isfinite(y)
            axes.plot(log["epoch"][known], y[known], color=colour, linewidth=2, label=label, **_markers(known))
        axes.set(xlabel="Epochs", ylabel=name.replace("_", " ").capitalize())
        axes.set_xlim(left=0)
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
        axes.spines["right"].set_visible(False)
        axes.legend(frameon=False)
        examples = axes.twiny()  # the lower axis in other units
        examples.set_xlim(0, axes.get_xlim()[1] * log["examples"][-1] / log["epoch"][-1])
        examples.set_xlabel("Examples seen")
        examples.xaxis.set_major_formatter(EngFormatter(sep=""))
        examples.spines["right"].set_visible(False)
    return figure


def save_plot(figure: Figure, path: str | Path) -> list[Path]:
    """Write path.png and path.pdf, and return the two. Raises UserError if they cannot be written."""
    from matplotlib import rc_context

    paths = [Path(f"{path}.png"), Path(f"{path}.pdf")]
    for target, metadata in zip(paths, ({}, {"CreationDate": None}), strict=True):  # no date: same figure, same file
        with rc_context(STYLE), atomic_write(target) as file:
            figure.savefig(file, format=target.suffix[1:], dpi=200, metadata=metadata)
    return paths


def _draw_one(axes: Axes, x: np.ndarray, log: Mapping[str, np.ndarray]) -> None:
    axes.plot(x, log["loss"], color=BLUE, linewidth=0.8, alpha=0.3, label="each step")
    for split, colour, label in SPLITS:
        losses = log[f"{split}_loss"]
        known = ~np.isnan(losses)
        if known.any():
            axes.plot(x[known], losses[known], color=colour, linewidth=2, label=label, **_markers(known))


def _draw_among(
    axes: Axes, x: np.ndarray, log: Mapping[str, np.ndarray], label: str, colour: str, width: float
) -> None:
    evaluated = ~np.isnan(log["train_loss"])
    shown, y = (evaluated, log["train_loss"]) if evaluated.any() else (np.ones(len(x), bool), log["loss"])
    line: dict[str, Any] = {"color": colour, "linewidth": width, "alpha": 0.45 if width > 1.4 else 1.0}
    if shown.sum() == 1:  # of which there is no line
        line["marker"] = "o"
    axes.plot(x[shown], y[shown], label=f"{label}, training", **line)
    known = ~np.isnan(log["val_loss"])
    if known.any():
        line.update(linestyle=(0, (7 / width, 4 / width)))  # in units of the width: dashes of all runs coincide
        axes.plot(x[known], log["val_loss"][known], label=f"{label}, validation", **line)


def _markers(known: np.ndarray) -> dict[str, Any]:
    """Points on a curve of few of them."""
    return {"marker": "o", "markersize": 4} if known.sum() <= 30 else {}
