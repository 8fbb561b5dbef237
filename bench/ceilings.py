"""What this machine's CPU can do at most, measured in the same run: products summed and bytes moved in a second.

The product is of square matrices in float32, large enough that a library reaches its best rate, by NumPy and by
PyTorch; the copy is of memory far larger than the caches, by all cores, and counts each byte read and written. A
ceiling is the best of all rounds, since nothing makes a machine faster than it is.
"""

from __future__ import annotations

from typing import Any

from bench.process import take_turns
from bench.stats import sample

N, BYTES = 3072, 2**29


def measure(n: int = N, size: int = BYTES, sessions: int = 3, rounds: int = 5) -> dict[str, Any]:
    """`operations_per_s` and `bytes_per_s`, and beneath them the seconds of each kind of work."""
    products = {name: {"work": "product", "n": n} for name in ("numpy", "torch cpu")}
    taken = take_turns("ceilings: products", products, sessions, rounds)
    taken |= take_turns("ceilings: copies", {"copy": {"work": "copy", "bytes": size}}, sessions, rounds)
    best = {name: min(min(rounds) for rounds in each.sessions()) for name, each in taken.items()}
    return {
        "operations_per_s": 2 * n**3 / min(best[name] for name in products),
        "bytes_per_s": 2 * size / best["copy"],
        "n": n,
        "bytes": size,
        "seconds": {name: sample(each.sessions()) for name, each in taken.items()},
    }
