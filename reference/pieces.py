"""Element-wise work in pieces that stay in a core's cache.

A chain of NumPy operations on a large array reads and writes main memory once for each operation; done piece by piece
it does so once in all. NumPy releases the interpreter's lock inside each operation, so that threads can share pieces;
that pays where there are many, for a thread that is woken for a few arrives when they are done. Rows are independent: a
result does not depend on how many pieces or threads there were.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import cache

import numpy as np

PIECE = 1 << 17  # elements: few enough for a core's cache, so many that threads seldom wait for the interpreter


def run(function: Callable[..., None], *arrays: np.ndarray) -> None:
    """Call function(*pieces) for consecutive runs of rows of `arrays`, which all have the same number of rows.

    The function writes its results into pieces, and must treat rows independently.
    """
    count = len(arrays[0])
    width = max(1, max(array.size for array in arrays) // max(1, count))
    step = max(1, PIECE // width)
    for start in range(0, count, step):
        function(*(array[start : start + step] for array in arrays))


def share(function: Callable[..., None], work: Iterable[tuple]) -> None:
    """Call function(*arguments), an array first, for each of `work`, on all cores: each takes what is next.

    They must be independent of each other.
    """
    calls = list(work)
    following = iter(calls)  # next() on it is atomic

    def take() -> None:
        for arguments in following:
            function(*arguments)

    threads = _threads() if sum(arguments[0].size for arguments in calls) > 4 * PIECE else None
    # In a copy of the caller's context, so that its np.errstate holds there too.
    helpers = [threads.submit(copy_context().run, take) for _ in range(threads._max_workers)] if threads else []
    take()
    for helper in helpers:
        helper.result()


@cache
def _threads() -> ThreadPoolExecutor | None:
    """One worker beside the calling thread for each further core, or None where there is one core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(cores, int(os.environ.get("OMP_NUM_THREADS") or cores))
    return ThreadPoolExecutor(cores - 1, "pieces") if cores > 1 else None


if hasattr(os, "register_at_fork"):  # a forked process has none of the threads
    os.register_at_fork(after_in_child=_threads.cache_clear)


def rows(x: np.ndarray) -> np.ndarray:
    """x (..., C) -> (N, C); a number alone is one row."""
    return x.reshape(-1, x.shape[-1]) if x.ndim else x.reshape(1, 1)


def sum_rows(x: np.ndarray) -> np.ndarray:
    """x (N, C) -> (C,), the sum of its rows, in blocks: added up one after another, rounding would grow with N."""
    block = 512
    ones, whole = _ones(block, x.dtype), len(x) // block * block
    total = np.dot(ones[: len(x) - whole], x[whole:])
    if whole:
        total += (ones @ x[:whole].reshape(-1, block, x.shape[1])).sum(axis=0)
    return total


def dot_rows(x: np.ndarray, w: np.ndarray | None = None) -> np.ndarray:
    """x (..., C), w (C,) or all ones -> (..., 1), of each row the product with w.

    Not by @, which keeps the interpreter's lock where it multiplies a matrix and a vector.
    """
    C = x.shape[-1]
    return np.dot(x.reshape(-1, C), _ones(C, x.dtype) if w is None else w).reshape(*x.shape[:-1], 1)


@cache
def _ones(n: int, dtype: np.dtype) -> np.ndarray:
    return np.ones(n, dtype)
