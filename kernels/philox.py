"""Philox4x32-10 on the GPU: the words of `reference.philox`, bit for bit, and what dropout keeps by them.

An element (n, r, c) of (..., R, C), n the flattened leading index plus `first`, is decided by word c % 4 of counter
(c // 4, r, n low, n high) under `key`: kept where the word is at least rate * 2**32. One call decides four neighbours.
"""

from __future__ import annotations

import triton
import triton.language as tl

Noise = tuple[int, int]  # key, index of the first example or head: each of 64 bits


def arguments(rate: float, noise: Noise | None) -> tuple[int, int, int, float]:
    """What kernels take: key and first as signed 64-bit words, the threshold as a 32-bit one, and 1 / (1 - rate).

    Raises ValueError unless 0 <= rate < 1, TypeError for a noise that is no pair of integers.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate: expected 0 <= rate < 1, got {rate!r}")
    if not rate or noise is None:
        return 0, 0, 0, 1.0
    if not isinstance(noise, (tuple, list)) or len(noise) != 2:
        raise TypeError(f"noise: kernels compute their masks, expected (key, first), got {type(noise).__name__}")
    key, first = signed(noise)
    return key, first, _signed(min(2**32 - 1, round(rate * 2**32)), 32), 1 / (1 - rate)


def signed(noise: Noise) -> Noise:
    """The same bits as signed words, which is what custom operators and kernels take."""
    key, first = (_signed(word, 64) for word in noise)
    return key, first


def _signed(word: int, bits: int) -> int:
    return word - (1 << bits) if word >= 1 << (bits - 1) else word


@triton.jit
def keep_mask(key, threshold, n, rows, first_column, COLUMNS: tl.constexpr):
    """n and rows (R, 1) or (1, 1), first_column a multiple of 4 -> bool (R, COLUMNS), COLUMNS a multiple of 4."""
    group = (first_column // 4 + tl.arange(0, COLUMNS // 4))[None, :]
    zero = tl.zeros_like(group + rows)
    n = tl.cast(n, tl.int64)
    low, high = (n & 0xFFFFFFFF).to(tl.uint32), ((n >> 32) & 0xFFFFFFFF).to(tl.uint32)
    word0, word1, word2, word3 = tl.philox(key, group + zero, rows + zero, low + zero, high + zero)
    words = tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))
    return words >= tl.cast(threshold, tl.uint32)
