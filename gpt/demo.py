"""The main job on any machine, in minutes: check the layers, train one model on both engines, and let each write.

Both runs have the same seed, so they draw the same parameters, batches and dropout masks, and their losses coincide to
rounding. Each is a process of its own, because the engines' thread pools would disturb each other in one.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt.data.text import load_text
from gpt.errors import UserError, require
from gpt.options import parse_config
from gpt.processes import twingrad

ENGINES = ("numpy", "torch")


@dataclass
class DemoConfig:
    """What the demonstration trains on and for how long."""

    data: str = "python-stdlib"
    """A name of the data catalogue, or the path of a text."""
    steps: int = 600
    """Training steps of each engine."""
    prompt: str = "def "
    """Where the generated text begins."""
    out: str = "runs/demo"
    """Folder of the results; a number is added if it exists."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"steps: expected at least 1, got {self.steps}")
        if not self.prompt:
            raise UserError("prompt: expected a text to begin with, got none")


def main(argv: list[str]) -> int:
    """Check, train on both engines, plot, generate; the exit status of the first part that fails, else 0."""
    config = parse_config(DemoConfig, argv, prog="twingrad demo")
    require("torch", extra="torch")
    load_text(config.data)  # what is wrong with it is said before all else
    out = _unused(Path(config.out))

    _say("1. Every layer, by hand, against finite differences and against PyTorch's automatic differentiation")
    status = twingrad("check")
    for i, engine in enumerate(ENGINES):
        if status:
            return status
        _say(f"{i + 2}. Train a GPT on the {engine} engine")
        status = twingrad(
            *("train", "--engine", engine, "--out", str(out / engine), "--data", config.data, "--tokenizer", "bytes"),
            *("--preset", "bytes-small", "--sampling", "random", "--batch_size", "16", "--max_length", "128"),
            *("--steps", str(config.steps), "--lr", "3e-3", "--warmup_steps", "50", "--sample_every", "0"),
            *("--eval_every", "25", "--eval_batches", "3", "--model.shortcut_dropout", "0.05"),
        )
    if status:
        return status
    _say("4. The same model, twice")
    _compare(out, config.steps)
    for engine in ENGINES:
        print(f"\nWritten by the {engine} engine:", flush=True)
        status = twingrad(
            *("generate", "--engine", engine, "--model", str(out / engine), "--prompt", config.prompt),
            *("--max_new_tokens", "200", "--temperature", "0.7", "--top_k", "40", "--seed", "1"),
        )
        if status:
            return status
    return 0


def _compare(out: Path, steps: int) -> None:
    """Plot both runs' losses in one figure, and say by how much they differ."""
    from gpt.train.log import read_log
    from gpt.train.plot import plot_losses, save_plot

    logs = {engine: read_log(out / engine / "log.csv") for engine in ENGINES}
    losses = [log["loss"] for log in logs.values()]
    difference = float(np.abs(losses[0] - losses[1]).max())
    print(f"Loss {losses[0][0]:.3f} at first, {losses[0][-1]:.3f} after {steps} steps on either engine;")
    print(f"in no step do the two engines differ by more than {difference:.1e}.")
    paths = save_plot(plot_losses(logs, "One model, trained twice from the same seed"), out / "loss")
    print(f"Both curves: {paths[0]}")


def _say(text: str) -> None:
    print(f"\n{text}\n", flush=True)


def _unused(path: Path) -> Path:
    names = itertools.chain([path], (path.with_name(f"{path.name}-{n}") for n in itertools.count(2)))
    return next(name for name in names if not name.exists())
