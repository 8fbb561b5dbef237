"""Element-wise work in pieces that stay in a core's cache, several pieces at once.

A chain of NumPy operations on a large array reads and writes main memory once for each operation. Done piece by piece
it does so once in all, and NumPy releases the interpreter's lock inside each operation, so that threads share the work.
The rows of the pieces are independent: a result does not depend on how many pieces or threads there were.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import cache

import numpy as np

PIECE = 1 << 16  # elements: 256 KiB of float32, so that a few arrays of a piece fit a second-level cache


@cache
def _threads() -> ThreadPoolExecutor | None:
    """One worker beside the calling thread for each further core, or None where there is one core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(cores, int(os.environ.get("OMP_NUM_THREADS") or cores))
    return ThreadPoolExecutor(cores - 1, "pieces") if cores > 1 else None


def run(function: Callable[..., None], *arrays: np.ndarray) -> None:
    """Call function(*pieces) for consecutive runs of rows of `arrays`, which all have the same number of rows.

    The function writes its results into pieces; it must treat rows independently and call no other `run`.
    """
    rows = len(arrays[0])
    width = max(1, max(array.size for array in arrays) // max(1, rows))
    step = max(1, PIECE // width)
    starts = range(0, rows, step)
    threads = _threads() if len(starts) > 1 else None
    if threads is None:
        for start in starts:
            function(*(array[start : start + step] for array in arrays))
        return
    remaining = iter(starts)  # next() on a range's iterator is atomic: each worker takes the piece that is next

    def work() -> None:
        for start in remaining:
            function(*(array[start : start + step] for array in arrays))

    # In a copy of the caller's context, so that its np.errstate holds there too.
    helpers = [threads.submit(copy_context().run, work) for _ in range(threads._max_workers)]
    work()
    for helper in helpers:
        helper.result()


def sum_rows(x: np.ndarray) -> np.ndarray:
    """x (N, C) -> (C,), the sum of its rows, in blocks: added up one after another, rounding would grow with N."""
    block = 128
    ones, whole = np.ones(block, x.dtype), len(x) // block * block
    total = ones[: len(x) - whole] @ x[whole:]
    if whole:
        total += (ones @ x[:whole].reshape(-1, block, x.shape[1])).sum(axis=0)
    return total
