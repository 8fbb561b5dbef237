"""How far an evaluation is, in tokens: a bar on a terminal, plain lines anywhere else, nothing for `Meter` itself."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from gpt.train.progress import clock

__all__ = ["Bar", "Lines", "Meter", "create_meter"]


class Meter:
    """The face that an evaluation speaks to; this one is silent."""

    def start(self, total: int) -> None:
        """There are `total` tokens to read."""

    def advance(self, count: int) -> None:
        """So many more have been read."""

    def close(self) -> None:
        """All are read, or it is over for another reason."""


class _Count(Meter):
    """Tokens so far, and how fast."""

    def start(self, total: int) -> None:
        self._total, self._done, self._since = total, 0, time.perf_counter()

    def advance(self, count: int) -> None:
        self._done += count

    def _speed(self) -> str:
        rate = max(self._done, 1) / max(time.perf_counter() - self._since, 1e-9)
        return f"{rate:,.0f} tokens/s, {clock((self._total - self._done) / rate)} left"


class Lines(_Count):
    """A line at each tenth."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stdout

    def advance(self, count: int) -> None:
        before = self._done
        super().advance(count)
        if 10 * before // self._total < 10 * self._done // self._total:
            print(f"{self._done:,} of {self._total:,} tokens  ({self._speed()})", file=self._out, flush=True)


class Bar(_Count):
    """rich's progress bar."""

    def __init__(self, console: Any = None) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        speed = TextColumn("{task.fields[speed]}")
        self._bar = Progress(TextColumn("tokens"), MofNCompleteColumn(), BarColumn(), speed, console=console)

    def start(self, total: int) -> None:
        super().start(total)
        self._task = self._bar.add_task("read", total=total, speed="")
        self._bar.start()

    def advance(self, count: int) -> None:
        super().advance(count)
        self._bar.update(self._task, advance=count, speed=self._speed())

    def close(self) -> None:
        self._bar.stop()


def create_meter(out: TextIO | None = None) -> Meter:
    """A bar where `out` (standard output) is a terminal, else lines."""
    out = out or sys.stdout
    return Bar() if out is sys.stdout and out.isatty() else Lines(out)
