"""Philox4x32-10: random words as a function of a counter and a key (Salmon et al. 2011, section 3.3).

forward    ten rounds of   (c0, c1, c2, c3) <- (high(m1 c2) ^ c1 ^ k0, low(m1 c2), high(m0 c0) ^ c3 ^ k1, low(m0 c0)),
           between them    (k0, k1) <- (k0 + w0, k1 + w1), all words 32 bits

There is no state: the word for an element is computed whenever and wherever it is needed. That makes a dropout mask a
function of (seed, step, layer, site, element), the same in NumPy and in Triton, whose `tl.philox` and `tl.randint4x`
compute these words, and the same again in a recomputation, a resumed run, or another split into micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

# What decides a mask: (key, index of the first example or head), or the mask itself, True where an element is kept.
Noise: TypeAlias = tuple[int, int] | np.ndarray

# The dropout sites of a layer; the embedding's layer is 0.
EMBEDDING, ATTENTION, ATTENTION_SHORTCUT, MLP_SHORTCUT = range(4)

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF
_PIECE = 1 << 14  # counters at once: a few arrays of their words fit a core's second-level cache


def philox(counter: Sequence[int | np.ndarray], key: int) -> tuple[np.ndarray, ...]:
    """Four counter words 0 .. 2**32 - 1, integers or arrays that broadcast; key 0 .. 2**64 - 1 -> four uint32 arrays.

    Raises ValueError for a counter or key out of range.
    """
    _require_word("key", key, bits=64)
    c0, c1, c2, c3 = (_counter_word(word) for word in counter)
    m0, m1 = _MULTIPLIERS
    k0, k1 = key & _LOW, key >> 32
    for _ in range(10):
        p0, p1 = c0 * m0, c2 * m1  # 64 bits: the high and the low word of a product
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _LOW, (p0 >> 32) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return tuple(word.astype(np.uint32) for word in (c0, c1, c2, c3))


def site_key(seed: int, step: int, layer: int, site: int) -> int:
    """The 64-bit key of one dropout site: words 0 (low) and 1 (high) of counter (site, layer, step) under key `seed`.

    seed and step are 64-bit, layer and site 32-bit. Raises ValueError for one out of range.
    """
    for name, value, bits in (("seed", seed, 64), ("step", step, 64), ("layer", layer, 32), ("site", site, 32)):
        _require_word(name, value, bits)
    low, high, _, _ = philox((site, layer, step & _LOW, step >> 32), seed)
    return int(high) << 32 | int(low)


def keep_mask(noise: Noise, shape: Sequence[int], rate: float) -> np.ndarray:
    """Which elements dropout keeps: bool array of `shape` (..., R, C) or (C,), each True with probability 1 - rate.

    noise is (key, first), or a bool array of that shape, which is returned as it is. Element (n, r, c), n the flattened
    leading index plus `first`, is decided by word c % 4 of counter (c // 4, r, n), n in two words: kept when the word
    is at least rate * 2**32. A vector is one row. Raises ValueError unless 0 <= rate < 1 and `shape` has an axis.
    """
    shape = tuple(shape)
    if isinstance(noise, np.ndarray):
        if noise.dtype != bool or noise.shape != shape:
            raise ValueError(f"noise: expected a bool array of shape {shape}, got {noise.dtype} {noise.shape}")
        return noise
    if not 0 <= rate < 1:
        raise ValueError(f"rate: expected 0 <= rate < 1, got {rate!r}")
    if not shape:
        raise ValueError("shape: expected an axis at least, got ()")
    key, first = noise
    _require_word("first", first, bits=64)
    if rate == 0:
        return np.ones(shape, bool)
    threshold = min(2**32 - 1, round(rate * 2**32))
    R, C = (1, *shape)[-2:]
    rows, groups = math.prod(shape[:-1]), -(-C // 4)
    group = np.arange(groups, dtype=np.uint64)
    keep = np.empty((rows, groups, 4), bool)
    step = max(1, _PIECE // max(1, groups))
    for start in range(0, rows, step):
        piece = keep[start : start + step]
        n, r = np.divmod(np.arange(start, start + len(piece), dtype=np.uint64)[:, None], np.uint64(R))
        n += np.uint64(first)
        for i, word in enumerate(philox((group, r, n & _LOW, n >> 32), key)):
            np.greater_equal(word, threshold, out=piece[:, :, i])
    return keep.reshape(*shape[:-1], 4 * groups)[..., :C]


class PhiloxNoise:
    """The noise of one training step, for examples that start at number `first_example` of the step's batch."""

    def __init__(self, seed: int, step: int, first_example: int = 0) -> None:
        self.seed, self.step, self.first_example = seed, step, first_example

    def __call__(self, layer: int, site: int, shape: Sequence[int], rate: float) -> tuple[int, int]:
        """What `keep_mask` takes for an activation of `shape` (B, T, C) or (B, H, T, S). `rate` plays no part."""
        return site_key(self.seed, self.step, layer, site), self.first_example * math.prod(shape[1:-2])


def _counter_word(word: int | np.ndarray) -> np.ndarray:
    word = np.asarray(word)
    if word.dtype.kind not in "iu" or (word.size and not (word.min() >= 0 and word.max() <= _LOW)):
        raise ValueError(f"counter: expected integers from 0 to 2**32 - 1, got {word}")
    return word.astype(np.uint64)


def _require_word(name: str, value: int, bits: int) -> None:
    if not 0 <= value < 1 << bits:
        raise ValueError(f"{name}: expected an integer from 0 to 2**{bits} - 1, got {value!r}")
