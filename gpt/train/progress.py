"""What a run prints: a progress bar on a terminal, plain lines anywhere else, nothing for `Progress` itself."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from typing import Any, TextIO

from gpt import world
from gpt.train.log import Row

__all__ = ["Bar", "Lines", "Progress", "create_progress"]


class Progress:
    """The face that the trainer speaks to; this one is silent."""

    def start(self, done: int, total: int) -> None:
        """The run begins or goes on: `done` of `total` steps are behind it."""

    def step(self, row: Row) -> None:
        """A step is done, and evaluated where its row has a validation or training loss."""

    def line(self, text: str) -> None:
        """Something to tell: a text sample, a checkpoint, why the run stopped."""

    def close(self) -> None:
        """The run is over or interrupted."""


class _Speed:
    """Tokens per second over the last steps: the harmonic mean, because it is the times that add up."""

    def __init__(self) -> None:
        self._seconds_per_token: deque[float] = deque(maxlen=20)

    def of(self, row: Row) -> float:
        """The speed with this step counted in."""
        self._seconds_per_token.append(1 / row.tokens_per_s)
        return len(self._seconds_per_token) / sum(self._seconds_per_token)


class Lines(Progress):
    """A line for each evaluation, as the book prints it, with the speed and the time left behind it."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self._speed = _Speed()

    def start(self, done: int, total: int) -> None:
        self._total, self._done, self._since = total - done, 0, time.perf_counter()

    def step(self, row: Row) -> None:
        self._done += 1
        speed = self._speed.of(row)
        if evaluated(row):
            elapsed = time.perf_counter() - self._since
            left = elapsed / self._done * (self._total - self._done)
            self.line(f"{describe(row)}  ({speed:,.0f} tokens/s, {clock(left)} left)")

    def line(self, text: str) -> None:
        print(text, file=self._out, flush=True)


class Bar(Progress):
    """rich's progress bar: step, loss, learning rate, tokens/s, time left; evaluations scroll above it."""

    def __init__(self, console: Any = None) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._speed = _Speed()
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
        )

    def start(self, done: int, total: int) -> None:
        self._task = self._bar.add_task("train", total=total, completed=done, numbers="")
        self._bar.start()

    def step(self, row: Row) -> None:
        numbers = f"loss {row.loss:.3f}  lr {row.lr:.1e}  {self._speed.of(row):,.0f} tokens/s"
        self._bar.update(self._task, advance=1, numbers=numbers)
        if evaluated(row):
            self.line(describe(row))

    def line(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._bar.stop()


def create_progress(out: TextIO | None = None) -> Progress:
    """A bar where `out` (standard output) is a terminal, else lines; silent but in the first of several processes."""
    if not world.is_first():
        return Progress()
    out = out or sys.stdout
    return Bar() if out is sys.stdout and out.isatty() else Lines(out)


def evaluated(row: Row) -> bool:
    return row.train_loss == row.train_loss or row.val_loss == row.val_loss


def describe(row: Row) -> str:
    """The book's line, e.g. "Ep 1 (Step 000005): Train loss 8.111, Val loss 8.339", and what else was measured."""
    losses = f"Train loss {row.train_loss:.3f}, Val loss {row.val_loss:.3f}"
    others = "".join(f", {name.replace('_', ' ')} {value:.3f}" for name, value in row.metrics.items())
    return f"Ep {math.ceil(row.epoch)} (Step {row.step:06d}): {losses}{others}"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
