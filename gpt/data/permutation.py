"""A permutation of 0..n-1 from a seed: PyTorch's own up to a million rows, beyond that one that takes no memory.

torch.randperm needs its n numbers in memory, and takes them one after the other. Beyond LIMIT rows the permutation is a
Feistel network (Luby and Rackoff 1988): a number of 2 h bits, 2^(2 h) >= n, is cut into halves, and each round

    left, right = right, left xor F(right, key of the round)

can be undone whatever F is, so the whole is one-to-one on 0..2^(2 h)-1. A number that ends at n or beyond goes through
again until it ends below (Black and Rogaway 2002), less than three more times on average, since 2^(2 h) < 4 n. So any
row of the order can be asked for alone. F is the finalizer of splitmix64 (Steele, Lea and Flood 2014).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from reference.torch_rng import Generator

__all__ = ["LIMIT", "Feistel", "permutation"]

LIMIT = 1 << 20  # rows; with randperm's Python integers some 90 MB for as long as the order is drawn
_ROUNDS = 8


def permutation(n: int, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """The function that takes positions (B,) in 0..n-1 to the rows (B,) int64 that stand there in the order of `seed`.

    As for all generators here, only the low 32 bits of the seed count.
    """
    if n <= LIMIT:
        return Generator(seed).randperm(n).__getitem__
    return Feistel(n, seed)


class Feistel:
    """The network for 0..n-1, n at least 1, with keys from PyTorch's stream of that seed."""

    def __init__(self, n: int, seed: int) -> None:
        generator = Generator(seed)
        self.n = n
        self._half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
        self._keys = [np.uint64(generator.randint64()) for _ in range(_ROUNDS)]

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        rows = self._once(np.asarray(positions).astype(np.uint64))
        while (outside := rows >= self.n).any():
            rows[outside] = self._once(rows[outside])
        return rows.astype(np.int64)

    def _once(self, numbers: np.ndarray) -> np.ndarray:
        left, right = numbers >> self._half, numbers & ((np.uint64(1) << self._half) - np.uint64(1))
        for key in self._keys:
            left, right = right, left ^ (_mix(right + key) >> (np.uint64(64) - self._half))
        return left << self._half | right


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer, modulo 2^64: each bit of x changes each bit of the result with a chance of one half."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
