"""Processes that encode parts: each is a Python of its own, told what to do line by line in JSON.

A worker whose owner is gone, however it went, reads the end of its input and ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from gpt import tokenizers
from gpt.data.documents import Range
from gpt.data.parts import Ranges, Report, make_part
from gpt.errors import UserError
from gpt.processes import start
from gpt.tokenizers import Tokenizer

__all__ = ["cores", "make_parts"]

_SECONDS = 0.2  # from one report to the next

Made = Callable[[Ranges, bool], object]  # is told of each part when its file is there, and whether it was made now


def cores() -> int:
    """How many processes can run at once."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_parts(
    parts: Sequence[Ranges],
    targets: Sequence[Path],
    tokenizer: Tokenizer,
    field: str,
    processes: int,
    report: Report,
    made: Made,
) -> None:
    """Have each part's file at its target, by so many processes, or by this one alone if one is enough.

    The UserError of the first part that has one, whatever the number of processes; no process is left then either.
    """
    processes = min(processes, len(parts))
    if processes == 1:
        for part, target in zip(parts, targets, strict=True):
            made(part, make_part(part, target, tokenizer, field, report))
        return
    workers = [_Worker(tokenizer, field) for _ in range(processes)]
    idle: SimpleQueue[_Worker] = SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def make(part: Ranges, target: Path) -> None:
        worker = idle.get()
        try:
            made(part, worker.make(part, target, report))
        finally:
            idle.put(worker)

    threads = ThreadPoolExecutor(processes)
    try:
        for _ in threads.map(make, parts, targets):
            pass
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.close()
        threads.shutdown()


class _Worker:
    """A process that makes one part after the other."""

    def __init__(self, tokenizer: Tokenizer, field: str) -> None:
        self._process = start(work, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._tell({"tokenizer": tokenizer.spec(), "field": field})

    def make(self, part: Ranges, target: Path, report: Report) -> bool:
        """What make_part does, in the process."""
        self._tell({"part": part, "target": str(target)})
        assert self._process.stdout
        for line in self._process.stdout:
            answer = json.loads(line)
            if "error" in answer:
                raise UserError(answer["error"])
            if "made" in answer:
                return answer["made"]
            report(answer["bytes"], answer["tokens"])
        status = self._process.wait()
        how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        raise UserError(f"a process that encodes {how}; the parts that are finished are kept: run again to go on")

    def close(self) -> None:
        """End the process, in the middle of a part if need be."""
        self._process.kill()
        with contextlib.suppress(BrokenPipeError), self._process:
            pass  # closes the pipes and waits

    def _tell(self, message: Any) -> None:
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # the answer that does not come says it
            print(json.dumps(message), file=self._process.stdin, flush=True)


class _Teller:
    """Adds up what is reported, and tells it every now and then."""

    def __init__(self) -> None:
        self._bytes = self._tokens = 0
        self._last = time.monotonic()

    def __call__(self, bytes: int, tokens: int) -> None:
        self._bytes, self._tokens = self._bytes + bytes, self._tokens + tokens
        if time.monotonic() - self._last > _SECONDS:
            self.tell()

    def tell(self) -> None:
        _answer({"bytes": self._bytes, "tokens": self._tokens})
        self._bytes = self._tokens = 0
        self._last = time.monotonic()


def _answer(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def work() -> None:
    """A worker's life: the tokenizer, then parts until there are no more, or nobody is there to hear of them."""
    try:
        _make_what_is_asked()
    except BrokenPipeError:
        os._exit(1)


def _make_what_is_asked() -> None:
    try:
        begin = json.loads(sys.stdin.readline())
        tokenizer = tokenizers.from_spec(begin["tokenizer"])
    except UserError as error:
        return _answer({"error": str(error)})
    tell = _Teller()
    for line in sys.stdin:
        message = json.loads(line)
        part = tuple(Range(*each) for each in message["part"])
        try:
            made = make_part(part, Path(message["target"]), tokenizer, begin["field"], tell)
        except UserError as error:
            _answer({"error": str(error)})
            continue
        tell.tell()
        _answer({"made": made})
