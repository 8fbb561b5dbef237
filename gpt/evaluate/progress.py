"""What a long evaluation prints: a bar on a terminal, plain lines anywhere else, nothing for `Progress` itself.

What is counted is answers of a judge or a model, or the tokens that a model reads.
"""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from gpt.train.progress import clock

__all__ = ["Bar", "Lines", "Progress", "create_progress"]


class Progress:
    """The face that is spoken to; this one is silent."""

    def start(self, done: int, total: int) -> None:
        """Of `total` answers, say, `done` are there already."""

    def step(self, text: str = "", count: int = 1) -> None:
        """So many more are done; `text` is the state so far, an average say."""

    def line(self, text: str) -> None:
        """Something to tell: a question that got no answer."""

    def close(self) -> None:
        """All are done, or it is over for another reason."""


class _Rate:
    """How many a second since the start, and the time that the others will take at this rate."""

    def __init__(self, done: int, total: int, unit: str) -> None:
        self.done, self.total = done, total
        self._unit, self._first, self._since = unit, done, time.perf_counter()

    def step(self, count: int) -> None:
        self.done += count

    def of(self) -> tuple[str, str]:
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        rate = max(self.done - self._first, 1) / elapsed
        shown = f"{rate:,.0f}" if rate >= 100 else f"{rate:.2f}"
        return f"{shown} {self._unit}/s", f"{clock((self.total - self.done) / rate)} left"


class Lines(Progress):
    """A line at each tenth."""

    def __init__(self, out: TextIO | None = None, unit: str = "answers") -> None:
        self._out, self._unit = out or sys.stdout, unit

    def start(self, done: int, total: int) -> None:
        self._rate = _Rate(done, total, self._unit)
        if done:
            self.line(f"{done:,} of {total:,} {self._unit} were there before")

    def step(self, text: str = "", count: int = 1) -> None:
        before, total = self._rate.done, self._rate.total
        self._rate.step(count)
        if 10 * before // total < 10 * self._rate.done // total:
            speed, left = self._rate.of()
            state = f"  {text}" if text else ""
            self.line(f"{self._rate.done:,} of {total:,} {self._unit}{state}  ({speed}, {left})")

    def line(self, text: str) -> None:
        print(text, file=self._out, flush=True)


class Bar(Progress):
    """rich's progress bar: how many, the state so far, how many a second, time left."""

    def __init__(self, console: Any = None, unit: str = "answers") -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        numbers = TextColumn("{task.fields[numbers]}", markup=False)
        self._bar = Progress(TextColumn(unit), MofNCompleteColumn(), BarColumn(), numbers, console=console)
        self._unit = unit

    def start(self, done: int, total: int) -> None:
        self._rate = _Rate(done, total, self._unit)
        self._task = self._bar.add_task(self._unit, total=total, completed=done, numbers="")
        self._bar.start()

    def step(self, text: str = "", count: int = 1) -> None:
        self._rate.step(count)
        self._bar.update(self._task, advance=count, numbers="  ".join(filter(None, (text, *self._rate.of()))))

    def line(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._bar.stop()


def create_progress(unit: str = "answers", out: TextIO | None = None) -> Progress:
    """A bar where `out` (standard output) is a terminal, else lines."""
    out = out or sys.stdout
    return Bar(unit=unit) if out is sys.stdout and out.isatty() else Lines(out, unit)
