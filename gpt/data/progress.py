"""How far a preparation is: bytes and tokens done, their rates, and the time left."""

from __future__ import annotations

import sys
import threading
import time
from datetime import timedelta
from typing import Any, TextIO

__all__ = ["Bar", "Lines", "Progress", "create_progress"]

SECONDS = 10.0  # from one line to the next


class Progress:
    """Counts, and is silent. Any thread may tell it something."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.total = self.done = self.kept = self.tokens = 0

    def start(self, total: int) -> None:
        """So many bytes are to be encoded."""
        self.total, self._since = total, time.perf_counter()

    def add(self, bytes: int, tokens: int) -> None:
        """So many more bytes are read, and so many tokens made of them."""
        with self._lock:
            self.done, self.tokens = self.done + bytes, self.tokens + tokens
            self.show()

    def keep(self, bytes: int) -> None:
        """So many bytes had been encoded before."""
        with self._lock:
            self.done, self.kept = self.done + bytes, self.kept + bytes
            self.show()

    def show(self) -> None:
        """Something has changed."""

    def line(self, text: str) -> None:
        """Something to tell."""

    def close(self) -> None:
        """It is over, or has failed."""

    def describe(self) -> str:
        """E.g. "120 of 4,000 MB, 30.1 MB/s, 7,900,000 tokens/s, 0:02:09 left". Rates leave out what was kept."""
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        rate = (self.done - self.kept) / elapsed
        text = f"{self.done / 1e6:,.0f} of {self.total / 1e6:,.0f} MB"
        if rate > 0:
            left = timedelta(seconds=round(max(0, self.total - self.done) / rate))
            text += f", {rate / 1e6:.1f} MB/s, {self.tokens / elapsed:,.0f} tokens/s, {left} left"
        return text


class Lines(Progress):
    """A line every ten seconds."""

    def __init__(self, out: TextIO | None = None) -> None:
        super().__init__()
        self._out = out or sys.stdout

    def start(self, total: int) -> None:
        super().start(total)
        self._last = self._since

    def show(self) -> None:
        if time.perf_counter() - self._last >= SECONDS:
            self._last = time.perf_counter()
            self.line(self.describe())

    def line(self, text: str) -> None:
        print(text, file=self._out, flush=True)


class Bar(Progress):
    """rich's progress bar."""

    def __init__(self, console: Any = None) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        super().__init__()
        self._bar = Progress(BarColumn(bar_width=None), TextColumn("{task.fields[numbers]}"), console=console)

    def start(self, total: int) -> None:
        super().start(total)
        self._task = self._bar.add_task("encode", total=total, numbers="")
        self._bar.start()

    def show(self) -> None:
        self._bar.update(self._task, completed=self.done, numbers=self.describe())

    def line(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._bar.stop()


def create_progress(out: TextIO | None = None) -> Progress:
    """A bar where `out` (standard output) is a terminal, else lines."""
    out = out or sys.stdout
    return Bar() if out is sys.stdout and out.isatty() else Lines(out)
