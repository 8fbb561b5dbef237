"""A batch in parts, one for each core: how the NumPy engine keeps several cores busy.

    loss of a batch    sum_p  (n_p / n) loss_p          n_p: what counts in the mean in the texts of part p, n: in all
    its gradient       sum_p  (n_p / n) dloss_p

A matrix library can divide each product among its threads, but then all else waits for one of them, and threads that
come and go at every operation cost more than most operations do. So each part goes through the whole forward and
backward pass in a thread of its own, every product computed by one thread, and what it works on stays in its core's
cache. Parts meet only where gradients add up, always in the same order, so that the sums come out the same.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import copy_context
from functools import cache
from typing import Any, TypeVar

from threadpoolctl import ThreadpoolController

__all__ = ["Turn", "divide", "run"]

Result = TypeVar("Result")
Turn = Callable[[str], AbstractContextManager[Any]]  # within it, a part alone has the sum of this name
LEAST = 1 << 15  # entries of a hidden state in a part: where operations are shorter, threads only wait for each other


def divide(examples: int, entries: int) -> list[slice]:
    """Which of the examples each part has; `entries`: of a hidden state (B, T, C) of all. Shares differ by one."""
    parts = max(1, min(_threads(), examples, entries // LEAST))
    return [slice(examples * part // parts, examples * (part + 1) // parts) for part in range(parts)]


def run(work: Callable[[slice, Turn], Result], shares: Sequence[slice]) -> list[Result]:
    """What `work(share, turn)` gives for each share, all at once. An error of one part ends all, and is raised."""
    if len(shares) == 1:
        return [work(shares[0], lambda name: nullcontext())]
    turns, errors = _Turns(len(shares)), list[BaseException]()

    def carry_out(part: int) -> Any:
        try:
            return work(shares[part], turns.of(part))
        except BaseException as error:
            errors.append(error)  # the first is why the others end
            turns.end()

    # Each in a copy of the caller's context, so that its np.errstate holds there too.
    contexts = [copy_context() for _ in shares]
    with _controller().limit(limits=1, user_api="blas"):
        others = [_pool().submit(contexts[part].run, carry_out, part) for part in range(1, len(shares))]
        results = [contexts[0].run(carry_out, 0), *(other.result() for other in others)]
    if errors:
        raise errors[0]
    return results


class _Turns:
    """The order in which parts add to sums: to each, one part after another, and then the first again."""

    def __init__(self, parts: int) -> None:
        self.parts, self.taken = parts, Counter[str]()
        self.changed, self.ended = threading.Condition(), False

    def of(self, part: int) -> Turn:
        own = Counter[str]()

        @contextmanager
        def turn(name: str) -> Iterator[None]:
            due = own[name] * self.parts + part
            own[name] += 1
            with self.changed:
                self.changed.wait_for(lambda: self.ended or self.taken[name] == due)
                if self.ended:
                    raise RuntimeError("another part of the batch failed")
            yield
            with self.changed:
                self.taken[name] += 1
                self.changed.notify_all()

        return turn

    def end(self) -> None:
        with self.changed:
            self.ended = True
            self.changed.notify_all()


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


@cache
def _threads() -> int:
    """How many threads the matrix library has: what its environment variables and the cores allow."""
    return max((library["num_threads"] for library in _controller().info() if library["user_api"] == "blas"), default=1)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, _threads() - 1), "parts")
