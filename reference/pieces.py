"""Element-wise work in pieces that stay in a core's cache.

A chain of NumPy operations on a large array reads and writes main memory once for each operation; done piece by piece
it does so once in all. NumPy releases the interpreter's lock inside each operation, so that threads can share pieces;
that pays where there are many, for a thread that is woken for a few arrives when they are done. Rows are independent: a
result does not depend on how many pieces or threads there were.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import cache

import numpy as np

PIECE = 1 << 17  # elements: few enough for a core's cache, so many that threads seldom wait for the interpreter


@cache
def _threads() -> ThreadPoolExecutor | None:
    """One worker beside the calling thread for each further core, or None where there is one core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(cores, int(os.environ.get("OMP_NUM_THREADS") or cores))
    return ThreadPoolExecutor(cores - 1, "pieces") if cores > 1 else None


def run(function: Callable[..., None], *arrays: np.ndarray, together: bool = False) -> None:
    """Call function(*pieces) for consecutive runs of rows of `arrays`, which all have the same number of rows.

    The function writes its results into pieces, and must treat rows independently. `together`: all cores share them.
    """
    count = len(arrays[0])
    width = max(1, max(array.size for array in arrays) // max(1, count))
    step = max(1, PIECE // width)
    starts = iter(range(0, count, step))  # next() on it is atomic: each thread takes the piece that is next

    def work() -> None:
        for start in starts:
            function(*(array[start : start + step] for array in arrays))

    threads = _threads() if together and count > step else None
    if threads is None:
        work()
        return
    # In a copy of the caller's context, so that its np.errstate holds there too.
    helpers = [threads.submit(copy_context().run, work) for _ in range(threads._max_workers)]
    work()
    for helper in helpers:
        helper.result()


def rows(x: np.ndarray) -> np.ndarray:
    """x (..., C) -> (N, C); a number alone is one row."""
    return x.reshape(-1, x.shape[-1]) if x.ndim else x.reshape(1, 1)


def sum_rows(x: np.ndarray) -> np.ndarray:
    """x (N, C) -> (C,), the sum of its rows, in blocks: added up one after another, rounding would grow with N."""
    block = 128
    ones, whole = np.ones(block, x.dtype), len(x) // block * block
    total = ones[: len(x) - whole] @ x[whole:]
    if whole:
        total += (ones @ x[:whole].reshape(-1, block, x.shape[1])).sum(axis=0)
    return total
