"""Attention matrices of a model on a text: every head's, as heat maps, and how they grew in training.

`capture` needs an engine's trace, nothing else, and so works for either: queries and keys are what the engine computed,
and their softmax is written out by the reference.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gpt.data.files import atomic_write
from gpt.engine import Batch, Engine, create_engine
from gpt.errors import UserError
from gpt.train.plot import COLOURS, GREY, STYLE, save_plot
from reference import attention

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["AttentionConfig", "animate", "capture", "plot_maps", "plot_track", "show", "snapshots"]

SNAPSHOT = re.compile(r"step-(\d{8,})\.safetensors")
MOST_LABELS = 40  # tokens that fit on an axis
TITLE: Any = {"x": 0.02, "ha": "left", "fontweight": "bold"}


def capture(engine: Engine, tokens: np.ndarray) -> np.ndarray:
    """tokens (T,) -> attention of every layer and head, (L, H, T, T): row t is how query t divides 1 over the keys."""
    config = engine.config
    suffix = ".rope" if config.position == "rope" else ""
    wanted = {f"blocks.{i}.attn.{part}{suffix}" for i in range(config.n_layers) for part in ("query", "key")}
    found: dict[str, np.ndarray] = {}

    def keep(name: str, tensor: np.ndarray) -> None:
        if name in wanted:
            found[name] = np.array(tensor)

    row = np.asarray(tokens, np.int64)[None]
    engine.trace(Batch(row, row), keep)

    def heads(x: np.ndarray) -> np.ndarray:
        return x if x.ndim == 4 else x.reshape(1, row.shape[1], -1, config.head_dim).transpose(0, 2, 1, 3)

    maps = []
    for i in range(config.n_layers):
        q, k = (heads(found[f"blocks.{i}.attn.{part}{suffix}"]) for part in ("query", "key"))
        _, saved = attention.forward(q, k, k)
        maps.append(attention.weights(saved)[0])
    return np.stack(maps)


def plot_maps(maps: np.ndarray, labels: Sequence[str], title: str = "") -> Figure:
    """Heat maps of (L, H, T, T), a row a layer and a column a head; queries go down, keys to the right."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    layers, heads = maps.shape[:2]
    size = min(3.2, 14 / heads)
    with rc_context(STYLE):
        figure = Figure(figsize=(size * heads + 1.2, size * layers + 0.8), layout="constrained")
        grid = figure.subplots(layers, heads, squeeze=False)
        for i in range(layers):
            for h in range(heads):
                image = _draw(grid[i, h], maps[i, h], labels, f"layer {i}, head {h}", size)
        figure.colorbar(image, ax=grid, shrink=0.6, label="weight")
        if title:
            figure.suptitle(title, **TITLE)
    return figure


def _draw(axes: Any, weights: np.ndarray, labels: Sequence[str], title: str, size: float) -> Any:
    image = axes.imshow(weights, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    axes.set_title(title, fontsize=9)
    if len(labels) <= MOST_LABELS and size > 2:
        font: Any = {"fontsize": max(4, min(8, 130 * size / 3 / len(labels))), "family": "monospace"}
        font["parse_math"] = False  # a text may have dollars
        axes.set_xticks(range(len(labels)), labels, rotation=90, **font)
        axes.set_yticks(range(len(labels)), labels, **font)
    return image


def snapshots(run: Path) -> dict[int, Path]:
    """The snapshots in a run's folder by the number of steps that came before them."""
    found = {int(match[1]): path for path in run.glob("step-*") if (match := SNAPSHOT.fullmatch(path.name))}
    return dict(sorted(found.items()))


def plot_track(steps: Sequence[int], weights: np.ndarray, pair: tuple[str, str]) -> Figure:
    """weights (S, L, H) of one query-key pair over the steps: a line a head, a colour a layer."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with rc_context(STYLE):
        figure = Figure(figsize=(7, 4.3), layout="constrained")
        axes = figure.add_subplot()
        for i in range(weights.shape[1]):
            for h in range(weights.shape[2]):
                label = f"layer {i}" if h == 0 else None
                axes.plot(steps, weights[:, i, h], color=COLOURS[i % len(COLOURS)], lw=1.6, alpha=0.8, label=label)
        axes.set(xlabel="Steps", ylabel="Weight", ylim=(0, 1.02))
        title = f'How much "{pair[0]}" attends to "{pair[1]}", a line a head'
        axes.set_title(title, loc="left", fontweight="bold", parse_math=False)
        axes.grid(color=GREY, alpha=0.15)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False)
    return figure


def animate(path: Path, steps: Sequence[int], maps: np.ndarray, labels: Sequence[str]) -> None:
    """Write maps (S, L, H, T, T) as an animated GIF, a frame a snapshot."""
    from matplotlib.animation import FuncAnimation, PillowWriter
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = plot_maps(maps[0], labels, f"step {steps[0]}")
    FigureCanvasAgg(figure)
    images = [axes.images[0] for axes in figure.axes if axes.images][: maps.shape[1] * maps.shape[2]]

    def frame(number: int) -> list[Any]:
        for image, weights in zip(images, maps[number].reshape(-1, *maps.shape[-2:]), strict=True):
            image.set_data(weights)
        figure.suptitle(f"step {steps[number]}", **TITLE)
        return images

    with atomic_write(path) as file:
        part = Path(file.name).with_suffix(".gif")
        try:
            FuncAnimation(figure, frame, frames=len(steps)).save(part, writer=PillowWriter(fps=4), dpi=80)
            file.write(part.read_bytes())
        finally:
            part.unlink(missing_ok=True)


@dataclass(frozen=True)
class AttentionConfig:
    """Draw the attention of every head of a model on a text; and, of a run with snapshots, how it grew."""

    model: str = "runs/latest"
    """A run's folder, a folder or file of weights, or a name (weights list)."""
    text: str = ""
    """The text to look at."""
    out: str = "attention"
    """The folder to write into: maps.png and maps.pdf; with snapshots evolution.gif, with a pair track.png and .pdf."""
    pair: tuple[int, int] | None = None
    """QUERY,KEY: two tokens' numbers, counted from 0; negative ones from the end."""
    engine: Literal["auto", "numpy", "torch", "triton"] = "auto"
    """auto: PyTorch where it is installed, else NumPy."""

    def __post_init__(self) -> None:
        if not self.text:
            raise UserError('text: expected a text to look at, got none; give one with --text "..."')


def show(config: AttentionConfig) -> list[Path]:
    """Write the plots that `config` asks for; returns their paths. Raises UserError."""
    from gpt.llm import LLM
    from gpt.weights.load import load

    llm, out = LLM.load(config.model, config.engine), Path(config.out)
    ids = np.array(llm.encode(config.text)[: llm.engine.config.context_length], np.int64)
    labels = [repr(llm.tokenizer.decode([token]))[1:-1] for token in ids]
    pair = tuple(range(len(ids))[number] if -len(ids) <= number < len(ids) else -1 for number in config.pair or ())
    if -1 in pair:
        raise UserError(f"pair: {config.pair} is not in the text, which has {len(ids)} tokens")
    written = [out / "maps.png", out / "maps.pdf"]
    save_plot(plot_maps(capture(llm.engine, ids), labels), out / "maps")
    saved = snapshots(Path(config.model))
    if config.pair and not saved:
        raise UserError(f"pair: {config.model} has no snapshots to track it over; train with --study-every N")
    if not saved:
        return written
    maps = []
    for path in saved.values():
        model = load(path)
        maps.append(capture(create_engine(config.engine, model.config, model.params), ids))
    animate(out / "evolution.gif", list(saved), np.stack(maps), labels)
    written.append(out / "evolution.gif")
    if config.pair:
        query, key = pair
        weights = np.stack(maps)[..., query, key]  # (S, L, H)
        save_plot(plot_track(list(saved), weights, (labels[query], labels[key])), out / "track")
        written += [out / "track.png", out / "track.pdf"]
    return written
