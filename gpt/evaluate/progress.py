"""What asking a judge prints: a bar on a terminal, plain lines anywhere else, nothing for `Progress` itself."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from gpt.train.progress import clock

__all__ = ["Bar", "Lines", "Progress", "create_progress"]


class Progress:
    """The face that is spoken to; this one is silent."""

    def start(self, done: int, total: int) -> None:
        """Of `total` questions `done` need not be asked."""

    def step(self, text: str) -> None:
        """One more is answered; `text` is the state so far, an average say."""

    def line(self, text: str) -> None:
        """Something to tell: a question that got no answer."""

    def close(self) -> None:
        """All are asked, or it is over for another reason."""


class _Rate:
    """Questions a second since the start, and the time that the others will take at this rate."""

    def __init__(self, done: int, total: int) -> None:
        self.done, self.total = done, total
        self._first, self._since = done, time.perf_counter()

    def step(self) -> None:
        self.done += 1

    def of(self) -> tuple[str, str]:
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        asked = self.done - self._first
        return f"{asked / elapsed:.2f} answers/s", f"{clock(elapsed / asked * (self.total - self.done))} left"


class Lines(Progress):
    """A line at each tenth of the questions."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stdout

    def start(self, done: int, total: int) -> None:
        self._rate = _Rate(done, total)
        if done:
            self.line(f"{done} of {total} were answered before")

    def step(self, text: str) -> None:
        before, total = self._rate.done, self._rate.total
        self._rate.step()
        if 10 * before // total < 10 * self._rate.done // total:
            speed, left = self._rate.of()
            self.line(f"{self._rate.done} of {total}  {text}  ({speed}, {left})")

    def line(self, text: str) -> None:
        print(text, file=self._out, flush=True)


class Bar(Progress):
    """rich's progress bar: how many, the state so far, answers a second, time left."""

    def __init__(self, console: Any = None) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        numbers = TextColumn("{task.fields[numbers]}", markup=False)
        self._bar = Progress(TextColumn("asked"), MofNCompleteColumn(), BarColumn(), numbers, console=console)

    def start(self, done: int, total: int) -> None:
        self._rate = _Rate(done, total)
        self._task = self._bar.add_task("ask", total=total, completed=done, numbers="")
        self._bar.start()

    def step(self, text: str) -> None:
        self._rate.step()
        self._bar.update(self._task, advance=1, numbers="  ".join((text, *self._rate.of())))

    def line(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._bar.stop()


def create_progress(out: TextIO | None = None) -> Progress:
    """A bar where `out` (standard output) is a terminal, else lines."""
    out = out or sys.stdout
    return Bar() if out is sys.stdout and out.isatty() else Lines(out)
