"""How long calls take on a device, and how much memory."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

Call = Callable[[], Any]
Name = TypeVar("Name")


def times(calls: Mapping[Name, Call], device: str, seconds: float) -> dict[Name, list[float]]:
    """Make calls in turns for about so many seconds altogether, ten times each at least; the seconds of each call.

    Before each call memory far larger than any cache is written, so that none begins with its inputs there. That takes
    a GPU half a millisecond, in which the host gets ahead: what a launch costs it does not count unless it is more.
    """
    if device != "cuda":
        return _host_times(calls, seconds)
    cache = torch.empty(
        min(2**31, torch.cuda.get_device_properties(0).total_memory // 16), dtype=torch.uint8, device=device
    )

    def one(call: Call) -> tuple[Any, Any]:
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        cache.zero_()
        first.record()
        call()
        last.record()
        return first, last

    def rounds(n: int) -> dict[Name, list[tuple[Any, Any]]]:
        events: dict[Name, list[tuple[Any, Any]]] = {name: [] for name in calls}
        for _ in range(n):
            for name, call in calls.items():
                events[name].append(one(call))
        torch.cuda.synchronize()
        return events

    rounds(3)
    begun = time.perf_counter()
    rounds(2)
    once = (time.perf_counter() - begun) / 2
    events = rounds(min(200, max(10, int(seconds / once))))
    return {name: [first.elapsed_time(last) / 1e3 for first, last in pairs] for name, pairs in events.items()}


def _host_times(calls: Mapping[Name, Call], seconds: float) -> dict[Name, list[float]]:
    taken: dict[Name, list[float]] = {name: [] for name in calls}
    begun, rounds = time.perf_counter(), 0
    while rounds < 3 or time.perf_counter() - begun < seconds:
        for name, call in calls.items():
            before = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - before)
        rounds += 1
    return taken


def batches(taken: list[float], count: int = 5) -> list[list[float]]:
    """Consecutive parts of a series, `count` of them or as many as it has numbers: the means of batches are nearly
    independent where calls that follow each other are not."""
    bounds = [len(taken) * i // count for i in range(count + 1)]
    parts = [taken[a:b] for a, b in itertools.pairwise(bounds)]
    return [[float(f"{seconds:.4g}") for seconds in part] for part in parts if part]


def peak(call: Call) -> int:
    """Bytes that a call takes beyond what was there, at most; 0 where there is no GPU."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before
