"""Workers (worker.py) as their owner sees them: contestants that take turns.

A machine that slows down slows all that run then, so contestants are timed in turns: a round is once each, and who
begins changes from round to round. What chance gives a process it keeps to its end, so after some rounds all
processes end, and the next session begins with fresh ones. How much sessions differ is how far a figure is to be
trusted (stats.py).
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.progress import Progress

from gpt.errors import UserError
from reference.config import GPTConfig

SESSIONS = 5


class Worker:
    """A contestant in its process, ready for the work that `settings` describe. `first`: what its first time gave."""

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        self.name = name
        # In a session of its own, so that Ctrl-C reaches its owner alone, which ends it.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            self.first = self.ask({**settings, "contestant": name})
        except BaseException:
            self.kill()
            raise

    def ask(self, message: Any) -> Any:
        """Send one line, wait for one back."""
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # what hears nothing more says why below
            print(json.dumps(message), file=self.process.stdin, flush=True)
        return self.hear()

    def hear(self) -> Any:
        """The next line the worker writes."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            why = ", killed: was there memory for all contestants at once?" if status == -9 else ""
            raise UserError(f"{self.name}: its process ended early with status {status}{why}")
        return json.loads(line)

    def close(self) -> Any:
        """End the worker; its last words."""
        assert self.process.stdin
        self.process.stdin.close()
        last = self.hear()
        self.process.wait()
        return last

    def kill(self) -> None:
        """End it whatever it does; nothing where it has ended."""
        self.process.kill()
        self.process.wait()


@dataclass
class Taken:
    """What a contestant took: by session and round what the worker answered, its first answers and its last."""

    rounds: list[list[dict[str, float]]] = field(default_factory=list)
    first: list[dict[str, float]] = field(default_factory=list)
    last: list[dict[str, int]] = field(default_factory=list)

    def bytes(self, part: str = "peak_bytes") -> int:
        """One part of the last answers, the most of all sessions."""
        return max(last[part] for last in self.last)

    def sessions(self, part: str = "seconds") -> list[list[float]]:
        """One part of the answers, by session."""
        return [[answer[part] for answer in rounds] for rounds in self.rounds]


def take_turns(
    title: str,
    contestants: Mapping[str, Mapping[str, Any]],
    sessions: int,
    rounds: int,
    once: Collection[str] = (),
) -> dict[str, Taken]:
    """Each contestant's settings by its name -> what it took. `once`: who takes the first round of a session alone."""
    taken = {name: Taken() for name in contestants}
    with Progress(transient=True) as progress:
        task = progress.add_task(title, total=sessions * (len(contestants) + rounds))
        for _ in range(sessions):
            workers: dict[str, Worker] = {}
            try:
                for name, settings in contestants.items():
                    workers[name] = Worker(name, settings)
                    taken[name].first.append(workers[name].first)
                    taken[name].rounds.append([])
                    progress.advance(task)
                for number in range(rounds):
                    for name in _rotated(list(workers), number):
                        if number == 0 or name not in once:
                            taken[name].rounds[-1].append(workers[name].ask("again"))
                    progress.advance(task)
                for name, worker in workers.items():
                    taken[name].last.append(worker.close())
            finally:
                for worker in workers.values():
                    worker.kill()
    return taken


def _rotated(names: list[str], by: int) -> list[str]:
    by %= len(names)
    return names[by:] + names[:by]


def model_settings(config: GPTConfig, work: str, **more: Any) -> dict[str, Any]:
    """Settings of work on a model."""
    return {"work": work, "config": config.to_dict(), **more}
