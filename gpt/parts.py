"""A batch in parts, one for each core: how the NumPy engine keeps several cores busy.

    loss of a batch    sum_p  (n_p / n) loss_p          n_p: what counts in the mean in part p, n: in all
    its gradient       sum_p  (n_p / n) dloss_p

A matrix library can divide each product among its threads, but then all else waits for one of them, and threads that
come and go at every operation cost more than most operations do. So each part goes through the whole forward and
backward pass in a thread of its own, every product computed by one thread, and what it works on stays in its core's
cache. Parts meet where gradients add up, and the sums come out the same whoever comes first. (Parts of small models
are in processes instead of threads, see crew.py; how a batch is divided is the same.)

A part is some of the texts. Where there are more cores than texts it is some positions of them, a span; in the notation
of reference/attention.py, of a text's spans 1, 2, ...:

    forward    K_s = [K_(s-1), k_s]                  the keys that span s sees: all up to its end; V_s likewise
    backward   dK_s = its attention's dK + [dK_(s+1) up to here]      dk_s = the end of dK_s, the rest goes to span s-1

Forward an early span is ahead, backward a late one, so that they wait for each other at the two ends only.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from functools import cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
from threadpoolctl import ThreadpoolController

__all__ = [
    "Pair", "Part", "Share", "are_apart", "divide", "most_parts", "one_batch", "run", "threads", "whole",
]  # fmt: skip

Result = TypeVar("Result")
Pair = tuple[np.ndarray, np.ndarray]
_one_batch = threading.Lock()
# Entries of a hidden state that a part has at least: where operations are shorter, threads only wait for each other,
# and processes of their own for what they are told.
LEAST, LEAST_APART = 1 << 15, 1 << 13
# Bytes, at most, of the gradients that processes have beside those of the first: beyond, threads that wait are cheaper.
MOST_APART = 1 << 28


class Share(NamedTuple):
    """What a part has: some of the examples, and of these some positions, of a text's last span to None."""

    examples: slice
    positions: slice = slice(0, None)


def whole(spans: int) -> list[slice]:
    """The positions of texts that are not divided into spans."""
    return [slice(0, None)]


def are_apart(gradients: int, cores: int) -> bool:
    """Whether parts are in processes of their own (gpt/crew.py) rather than in threads, for so many bytes of them."""
    return 0 < (cores - 1) * gradients <= MOST_APART and os.name == "posix"


def most_parts(entries: int, cores: int, apart: bool) -> int:
    """Into how many parts a hidden state (B, T, C) of so many entries can be divided."""
    return max(1, min(cores, entries // (LEAST_APART if apart else LEAST)))


def divide(
    examples: int, entries: int, split: Callable[[int], list[slice]] = whole, apart: bool = False
) -> list[Share]:
    """Which of the examples each part has; `entries`: of a hidden state (B, T, C) of all. Shares differ by one.

    `split(n)`: the positions of n spans of each text, in order, for cores beyond one for each example.
    """
    parts = most_parts(entries, threads(), apart)
    groups = min(parts, examples)
    texts = [slice(examples * group // groups, examples * (group + 1) // groups) for group in range(groups)]
    spans = split(parts // groups)
    return [Share(of, positions) for of in texts for positions in spans]


class Part:
    """What has a share, and meets the others."""

    def __init__(self, share: Share, number: int = 0, meeting: _Meeting | None = None) -> None:
        self.share, self.number, self._meeting = share, number, meeting or _Meeting(1)
        self.start, self._stop = share.positions.start, share.positions.stop

    def sum(self, name: str, array: np.ndarray) -> np.ndarray | None:
        """The sum of all parts' arrays of this name, for the one that comes last; the others get None, and go on.

        As in a tournament, two and two, and then the sums of two: that a + b is b + a to the last bit makes the sum the
        same whoever comes first, and nobody waits.
        """
        size = 1
        while size < self._meeting.parts:
            group = self.number // size
            if (group ^ 1) * size < self._meeting.parts:  # or there is no other
                other = self._meeting.swap((name, size, group // 2), array)
                if other is None:
                    return None
                array += other
            size *= 2
        return array

    @contextmanager
    def turn(self, name: str) -> Iterator[None]:
        """Within it this part is alone, one part after another, and the first when all others have come."""
        if self.number:
            self._meeting.give((name, "here", self.number), None)
            self._meeting.take((name, "next", self.number))
        else:
            for other in range(1, self._meeting.parts):
                self._meeting.take((name, "here", other))
        yield
        self._meeting.give((name, "next", self.number + 1), None)

    def join(self, layer: int, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """k and v (B, G, T, D) of these positions -> of all the text's up to here, (B, G, start + T, D)."""
        if self.start:
            k, v = (np.concatenate(pair, axis=2) for pair in zip(self._from_earlier(layer), (k, v), strict=True))
        if self._stop is not None:
            self._to_later(layer, (k, v))
        return k, v

    def hand_back(self, layer: int, dk: np.ndarray, dv: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """dk and dv (B, G, start + T, D) of what `join` gave -> of what it was given, (B, G, T, D)."""
        if self._stop is not None:
            for own, later in zip((dk, dv), self._from_later(layer), strict=True):
                own += later
        if self.start:
            self._to_earlier(layer, (dk[:, :, : self.start], dv[:, :, : self.start]))
        return dk[:, :, self.start :], dv[:, :, self.start :]

    # What goes over the border between two spans of a text: keys and values to the later, their gradients back.

    def _to_later(self, layer: int, kv: Pair) -> None:
        self._meeting.give(self._border("k, v", layer, self._stop), kv)

    def _from_earlier(self, layer: int) -> Pair:
        return self._meeting.take(self._border("k, v", layer, self.start))

    def _to_earlier(self, layer: int, gradients: Pair) -> None:
        self._meeting.give(self._border("dk, dv", layer, self.start), gradients)

    def _from_later(self, layer: int) -> Pair:
        return self._meeting.take(self._border("dk, dv", layer, self._stop))

    def _border(self, what: str, layer: int, position: int | None) -> Hashable:
        return what, layer, self.share.examples.start, position


def run(work: Callable[[Part], Result], shares: Sequence[Share]) -> list[Result]:
    """What `work(part)` gives for each share, all at once. An error of one part ends all, and is raised.

    Batches of several threads come one after another: parts wait for each other, so that all need a thread at once.
    """
    if len(shares) == 1:
        return [work(Part(shares[0]))]
    meeting, errors = _Meeting(len(shares)), list[BaseException]()

    def carry_out(number: int) -> Any:
        try:
            return work(Part(shares[number], number, meeting))
        except BaseException as error:
            errors.append(error)  # the first is why the others end
            meeting.end()

    # Each in a copy of the caller's context, so that its np.errstate holds there too.
    contexts = [copy_context() for _ in shares]
    with one_batch():
        others = [_pool().submit(contexts[part].run, carry_out, part) for part in range(1, len(shares))]
        results = [contexts[0].run(carry_out, 0), *(other.result() for other in others)]
    if errors:
        raise errors[0]
    return results


@contextmanager
def one_batch() -> Iterator[None]:
    """Within it no other batch is computed in parts, and each product by one thread."""
    with _one_batch, _controller().limit(limits=1, user_api="blas"):
        yield


class _Meeting:
    """Where parts leave things for each other under names, of which each is given once and taken once."""

    def __init__(self, parts: int) -> None:
        self.parts = parts
        self._things: dict[Hashable, Any] = {}
        self._changed, self._ended = threading.Condition(), False

    def give(self, name: Hashable, thing: Any) -> None:
        with self._changed:
            self._things[name] = thing
            self._changed.notify_all()

    def take(self, name: Hashable) -> Any:
        """Waits until it is there."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or name in self._things)
            if self._ended:
                raise RuntimeError("another part of the batch failed")
            return self._things.pop(name)

    def swap(self, name: Hashable, thing: Any) -> Any:
        """What another left under this name; None if nobody did, and then this is left there."""
        with self._changed:
            if name in self._things:
                return self._things.pop(name)
            self._things[name] = thing
            return None

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


@cache
def threads() -> int:
    """How many threads the matrix library has: what its environment variables and the cores allow."""
    return max((library["num_threads"] for library in _controller().info() if library["user_api"] == "blas"), default=1)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, threads() - 1), "parts")


def _after_fork() -> None:
    """A forked process has none of the threads, and nobody who would release the lock."""
    global _one_batch
    _one_batch = threading.Lock()
    _pool.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
