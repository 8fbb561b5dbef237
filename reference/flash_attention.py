"""FlashAttention: attention tile by tile, so that the (T, S) scores never exist at once (Dao et al. 2022, 2023).

forward    for a tile of queries, over tiles of keys (online softmax, Milakov and Gimelshein 2018, algorithm 3):
               s = q k^T scale             m' = max(m, rowmax(s))              p = exp(s - m')
               l' = l exp(m - m') + rowsum(p)                                  o' = o exp(m - m') + drop(p) v
           then    y = o / l    lse = m + log(l)
backward   p = exp(s - lse), and delta = rowsum(y dy)
           for a tile of queries, over tiles of keys:    ds = p (drop(dy v^T) - delta)    dq = sum of ds k scale
           for a tile of keys, over tiles of queries:    dv = sum of drop(p)^T dy         dk = sum of ds^T q scale

What is kept of the softmax is one number for each query: lse, the logarithm of the sum of exponentials. The mean of dp
under p, which softmax's gradient takes away, is delta, because rowsum(p drop(dy v^T)) = rowsum((drop(p) v) dy): with
dropout too, and without a pass over keys. Each sum is owned by one tile, so that nothing is added in an order left to
chance. This module goes through the steps of the GPU kernel one by one, in the same order and with exponentials and
logarithms to base 2 as there; it is for reading, and `attention` computes the same result faster.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from reference import philox

LOG2_E = math.log2(math.e)


class Launch(NamedTuple):
    """The arguments of a forward pass, which the backward pass and every tile need again."""

    q: np.ndarray  # (B, H, T, D)
    k: np.ndarray  # (B, G, S, D)
    v: np.ndarray  # (B, G, S, D)
    causal: bool
    scale: float
    rate: float
    noise: philox.Noise | None
    block_q: int
    block_k: int

    @property
    def group(self) -> int:
        """Query heads for each key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def factor(self) -> float:
        """What makes up for what is dropped. It multiplies sums of kept terms, once, rather than each term."""
        return 1.0 if self.noise is None else 1 / (1 - self.rate)

    @property
    def past(self) -> int:
        """Query t is at position t + past."""
        return self.k.shape[2] - self.q.shape[2]


def forward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    causal: bool = True,
    scale: float | None = None,
    rate: float = 0.0,
    noise: philox.Noise | None = None,
    block_q: int = 64,
    block_k: int = 64,
) -> tuple[np.ndarray, Any]:
    """q (B, H, T, D), k and v (B, G, S, D), G dividing H -> y (B, H, T, D), saved. What `attention.forward` computes.

    Causal: the queries are the last T of the S positions. A query that sees no key gives 0. `block_q`, `block_k`:
    queries and keys in a tile.
    """
    B, H, T, D = q.shape
    scale = 1 / math.sqrt(D) if scale is None else scale
    launch = Launch(q, k, v, causal, scale, rate, noise if rate else None, block_q, block_k)
    y = np.empty((B, T, H, D), q.dtype).transpose(0, 2, 1, 3)  # in this order, joining heads needs no copy
    lse = np.empty((B, H, T), q.dtype)  # to base 2
    for b, h in np.ndindex(B, H):
        for rows in _tiles(0, T, block_q):
            y[b, h, rows], lse[b, h, rows] = _y_lse(launch, b, h, rows)
    return y, (launch, y, lse)


def backward(dy: np.ndarray, saved: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dy (B, H, T, D) -> dq (B, H, T, D), dk (B, G, S, D), dv (B, G, S, D)."""
    launch, y, lse = saved
    q, k, v = launch[:3]
    dq, dk, dv, delta = np.empty_like(q), np.empty_like(k), np.empty_like(v), np.empty_like(lse)
    for b, h in np.ndindex(q.shape[:2]):
        for rows in _tiles(0, q.shape[2], launch.block_q):
            delta[b, h, rows] = (y[b, h, rows] * dy[b, h, rows]).sum(axis=1)
            dq[b, h, rows] = _dq(launch, dy, lse, delta, b, h, rows)
    for b, g in np.ndindex(k.shape[:2]):
        for columns in _tiles(0, k.shape[2], launch.block_k):
            dk[b, g, columns], dv[b, g, columns] = _dk_dv(launch, dy, lse, delta, b, g, columns)
    return dq, dk, dv


# What one program of a kernel does, for the tile that it owns. Its loop yields what it holds after each step.


class Forward(NamedTuple):
    """A step over a tile of keys: what it computed, and the loop's running values after it. `s` is to base 2."""

    columns: np.ndarray  # (columns,)
    s: np.ndarray  # (rows, columns)
    p: np.ndarray  # (rows, columns), beside the largest score so far
    shrink: np.ndarray  # (rows,): what all that came before is multiplied by
    m: np.ndarray  # (rows,)
    l: np.ndarray  # noqa: E741, (rows,)
    o: np.ndarray  # (rows, D)


class BackwardQueries(NamedTuple):
    """A step over a tile of keys, and the sum so far, which lacks its scale."""

    columns: np.ndarray  # (columns,)
    kept: np.ndarray  # (rows, columns)
    ds: np.ndarray  # (rows, columns)
    dq: np.ndarray  # (rows, D)


class BackwardKeys(NamedTuple):
    """A step over a tile of queries of one head, and the sums so far, which lack their scale and factor."""

    h: int
    rows: np.ndarray  # (rows,)
    kept: np.ndarray  # (rows, columns)
    ds: np.ndarray  # (rows, columns)
    dk: np.ndarray  # (columns, D)
    dv: np.ndarray  # (columns, D)


def forward_steps(launch: Launch, b: int, h: int, rows: np.ndarray) -> Iterator[Forward]:
    """The loop of a tile of queries over the keys that they see."""
    v, g = launch.v, h // launch.group
    m, l, o = _before(launch, rows)  # noqa: E741
    for columns in _tiles(0, _seen(launch, rows), launch.block_k):
        s = _scores(launch, b, h, rows, columns)
        larger = np.maximum(m, s.max(axis=1))
        p = np.exp2(s - larger[:, None])  # (rows, columns)
        shrink = np.exp2(m - larger)
        l = l * shrink + p.sum(axis=1)  # noqa: E741
        o = o * shrink[:, None] + _kept(launch, p, b, h, rows, columns) @ v[b, g, columns]
        m = larger
        yield Forward(columns, s, p, shrink, m, l, o)


def backward_queries_steps(
    launch: Launch, dy: np.ndarray, lse: np.ndarray, delta: np.ndarray, b: int, h: int, rows: np.ndarray
) -> Iterator[BackwardQueries]:
    """The loop of a tile of queries over the keys that they see, once more."""
    k, g = launch.k, h // launch.group
    dq = np.zeros((len(rows), k.shape[3]), k.dtype)
    for columns in _tiles(0, _seen(launch, rows), launch.block_k):
        kept, ds = _softmax_backward(launch, dy, lse, delta, b, h, rows, columns)
        dq = dq + ds @ k[b, g, columns]
        yield BackwardQueries(columns, kept, ds, dq)


def backward_keys_steps(
    launch: Launch, dy: np.ndarray, lse: np.ndarray, delta: np.ndarray, b: int, g: int, columns: np.ndarray
) -> Iterator[BackwardKeys]:
    """The loop of a tile of keys and values over the group's heads and, in each, the queries that see one of them."""
    q = launch.q
    dk, dv = np.zeros((2, len(columns), q.shape[3]), q.dtype)
    first = max(0, columns[0] - launch.past) // launch.block_q * launch.block_q if launch.causal else 0
    for h in range(g * launch.group, (g + 1) * launch.group):
        for rows in _tiles(first, q.shape[2], launch.block_q):
            kept, ds = _softmax_backward(launch, dy, lse, delta, b, h, rows, columns)
            dv = dv + kept.T @ dy[b, h, rows]
            dk = dk + ds.T @ q[b, h, rows]
            yield BackwardKeys(h, rows, kept, ds, dk, dv)


def _before(launch: Launch, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """m, l and o before the first key. m is finite, so that m - m is 0 where no key is seen."""
    dtype = launch.q.dtype
    smallest = np.full(len(rows), np.finfo(dtype).min)
    return smallest, np.zeros(len(rows), dtype), np.zeros((len(rows), launch.q.shape[3]), dtype)


def _y_lse(launch: Launch, b: int, h: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The result for a tile of queries, (rows, D), and its lse, (rows,)."""
    m, l, o = _before(launch, rows)  # noqa: E741
    for step in forward_steps(launch, b, h, rows):
        m, l, o = step.m, step.l, step.o  # noqa: E741
    l = np.where(l > 0, l, 1)  # noqa: E741
    return o * (launch.factor / l)[:, None], m + np.log2(l)


def _dq(
    launch: Launch, dy: np.ndarray, lse: np.ndarray, delta: np.ndarray, b: int, h: int, rows: np.ndarray
) -> np.ndarray:
    """The gradient of a tile of queries, (rows, D)."""
    dq = np.zeros((len(rows), launch.k.shape[3]), launch.k.dtype)
    for step in backward_queries_steps(launch, dy, lse, delta, b, h, rows):
        dq = step.dq
    return dq * launch.scale


def _dk_dv(
    launch: Launch, dy: np.ndarray, lse: np.ndarray, delta: np.ndarray, b: int, g: int, columns: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The gradients of a tile of keys and values, (columns, D) each."""
    dk, dv = np.zeros((2, len(columns), launch.q.shape[3]), launch.q.dtype)
    for step in backward_keys_steps(launch, dy, lse, delta, b, g, columns):
        dk, dv = step.dk, step.dv
    return dk * launch.scale, dv * launch.factor


# Steps on one tile, rows by columns, of head (b, h).


def _softmax_backward(
    launch: Launch,
    dy: np.ndarray,
    lse: np.ndarray,
    delta: np.ndarray,
    b: int,
    h: int,
    rows: np.ndarray,
    columns: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """What is kept of p, computed again, and ds, the gradient of the scores."""
    # At most 1: large scores, made in another order of sums, may differ from those in lse by far more than that.
    p = np.exp2(np.minimum(_scores(launch, b, h, rows, columns) - lse[b, h, rows][:, None], 0))
    dp = dy[b, h, rows] @ launch.v[b, h // launch.group, columns].T * launch.factor
    ds = p * (_kept(launch, dp, b, h, rows, columns) - delta[b, h, rows][:, None])
    return _kept(launch, p, b, h, rows, columns), ds


def _scores(launch: Launch, b: int, h: int, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Scores to base 2. The mask is for tiles on the diagonal: those before it are seen whole."""
    s = launch.q[b, h, rows] @ launch.k[b, h // launch.group, columns].T * (launch.scale * LOG2_E)
    if launch.causal and columns[-1] > rows[0] + launch.past:
        s[columns > rows[:, None] + launch.past] = -np.inf
    return s


def _kept(launch: Launch, p: np.ndarray, b: int, h: int, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """p where it is kept, 0 elsewhere: the mask of `philox.keep_mask`, computed where it is needed."""
    noise = launch.noise
    if noise is None:
        return p
    if isinstance(noise, np.ndarray):
        keep = noise[b, h][np.ix_(rows, columns)]
    else:
        key, first = noise
        n = first + b * launch.q.shape[1] + h
        words = philox.philox((columns // 4, rows[:, None], n & 0xFFFFFFFF, n >> 32), key)  # four of (rows, columns)
        keep = np.choose(columns % 4, words) >= min(2**32 - 1, round(launch.rate * 2**32))
    return p * keep


def _seen(launch: Launch, rows: np.ndarray) -> int:
    """How many keys the last of these queries sees."""
    return max(0, int(rows[-1]) + 1 + launch.past) if launch.causal else launch.k.shape[2]


def _tiles(start: int, stop: int, size: int) -> Iterator[np.ndarray]:
    """The numbers from start to stop, `size` at a time."""
    for first in range(start, stop, size):
        yield np.arange(first, min(first + size, stop))
