"""Attention over a key-value cache, the keys of each row split among programs: flash-decoding (Dao et al. 2023).

What is computed is in reference/cached_attention.py; a tile of queries goes through keys as in attention.py. What is
particular here:

- A step of generation has one query a head, too few programs for a GPU. So each tile's keys are split, and a second
  kernel adds the parts up in the order of the keys: results repeat bit for bit. How many splits there are follows from
  shapes alone; the host never asks the device how long a row is.
- All queries of the heads that share a key head lie in one tile, so that a key is read once for them.
- With m the largest score of a split, l = sum_j exp(s_j - m) and o = sum_j exp(s_j - m) v_j of its keys,
  y = sum_splits exp(m - max m) o / sum_splits exp(m - max m) l. A split that begins after a query's own key is neither
  computed nor read.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensor

from kernels import attention, autograd, launch
from kernels.attention import LOWEST, attend, head, known
from kernels.numerics import rounded

BLOCK_Q = 16  # queries of a tile: the fewest that a tensor core takes
BLOCK_SPLITS = 16  # splits that are added up at a time
FEWEST_KEYS = 128  # of a split, where a row has so many: fewer are not worth their partial results
PROGRAMS = 4  # for a multiprocessor, as far as there are keys for so many

# Bytes of an element -> for heads up to this wide: (BLOCK_K, num_warps, num_stages), and for heads of a width that is
# no power of 2, whose loads have masks.
Configuration = tuple[int, int, int]
CONFIGURATIONS: dict[int, dict[int, tuple[Configuration, Configuration]]] = {
    2: {64: ((64, 4, 3), (32, 4, 2)), 128: ((64, 4, 2), (32, 4, 2)), 256: ((32, 4, 2), (32, 4, 2))},
    4: {64: ((32, 8, 2), (32, 8, 2)), 128: ((32, 8, 2), (32, 8, 2)), 256: ((16, 4, 2), (16, 4, 2))},
}


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, scale: float | None = None
) -> tuple[torch.Tensor, None]:
    """q (B, H, T, D), k and v (B, G, S, D), G dividing H, one dtype, any strides, D at most 256, starts (B,) of
    integers from 0 to S - T -> y like q, None.

    `scale` is 1 / sqrt(D) unless given, and positive. y lies in memory as (B, T, H, D), so that joining heads copies
    nothing. With starts out of their range y is wrong, but nothing outside k and v is read.
    """
    _check(q, k, v, starts, scale)
    B, H, T, D = q.shape
    G, S = k.shape[1:3]
    y = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device).transpose(1, 2)
    if isinstance(q, FakeTensor):  # sizes may be symbols, and nothing is launched
        return y, None
    BLOCK_D = max(16, launch.power_of_2(D))
    BLOCK_K, num_warps, num_stages = CONFIGURATIONS[min(4, q.element_size())][max(64, BLOCK_D)][D < BLOCK_D]
    tiles = B * G * triton.cdiv(H // G * T, BLOCK_Q)
    split = _split(tiles, S, BLOCK_K, q.device)
    splits = triton.cdiv(S, split)
    o = torch.empty((splits, B, H, T, D), dtype=launch.wide(q.dtype), device=q.device)
    m, l = (torch.empty((splits, B, H, T), dtype=o.dtype, device=q.device) for _ in "ml")  # noqa: E741
    constants = {"HEAD_DIM": int(D), "BLOCK_D": BLOCK_D}
    tile = {"BLOCK_Q": BLOCK_Q, "BLOCK_K": BLOCK_K, "num_warps": num_warps, "num_stages": num_stages}
    launch.launch(
        split_kernel, (tiles, splits), q, k, v, starts, o, m, l,
        *q.stride(), *k.stride(), *v.stride(), *starts.stride(), B, H, H // G, T, S, split,
        SCALE=1 / math.sqrt(D) if scale is None else scale, ALIGNED=attention.aligned(q, k, v), **constants, **tile,
    )  # fmt: skip
    launch.launch(
        combine_kernel, (B * H * T,), o, m, l, starts, y, *y.stride(), *starts.stride(), B, H, T, S, split,
        BLOCK_SPLITS=BLOCK_SPLITS, num_warps=4, **constants,
    )  # fmt: skip
    return y, None


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, scale: float | None) -> None:
    attention.check(q, k, v, scale)
    B, _, T, _ = q.shape
    if k.shape[2] < T:
        raise ValueError(f"k, v: expected the keys of all {T} queries at least, got {k.shape[2]}")
    launch.check(q=q, starts=starts)
    launch.check_shape("starts", starts, (B,))
    if starts.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"starts: expected int64 or int32, got {str(starts.dtype).removeprefix('torch.')}")


def _split(tiles: int, S: int, BLOCK_K: int, device: torch.device) -> int:
    """Keys of a split, a multiple of BLOCK_K: so many splits that with this many tiles no multiprocessor is idle."""
    wanted = triton.cdiv(launch.programs(device, PROGRAMS), max(tiles, 1))
    splits = max(1, min(wanted, triton.cdiv(S, FEWEST_KEYS)))
    return max(1, triton.cdiv(triton.cdiv(S, splits), BLOCK_K)) * BLOCK_K


@triton.jit(do_not_specialize=["B", "T", "S", "split"])
def split_kernel(
    q_ptr,  # (B, H, T, D)
    k_ptr,  # (B, G, S, D)
    v_ptr,  # (B, G, S, D)
    starts_ptr,  # (B,)
    o_ptr,  # (splits, B, H, T, D), in rows
    m_ptr,  # (splits, B, H, T), in rows: of scores times log2(e), whose exponentials are to base 2
    l_ptr,  # (splits, B, H, T), in rows
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, starts_b,  # strides
    B, H, GROUP, T, S, split,
    SCALE: tl.constexpr, ALIGNED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """o, m and l of a tile of queries over the keys of one split.

    A tile holds rows of the GROUP * T queries that share a key head, in the order of y: head by head, query by query.
    Past the last of them it computes that one again, and stores nothing.
    """
    q_b, q_h, q_t = known(q_b, q_h, q_t, ALIGNED)
    k_b, k_h, k_t = known(k_b, k_h, k_t, ALIGNED)
    v_b, v_h, v_t = known(v_b, v_h, v_t, ALIGNED)
    G, tiles = H // GROUP, tl.cdiv(GROUP * T, BLOCK_Q)
    n = tl.program_id(0) // tiles
    b, g = n // G, n % G
    places, columns = tl.program_id(0) % tiles * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    rows = tl.minimum(places, GROUP * T - 1)
    h, t = g * GROUP + rows // T, rows % T
    start = tl.load(starts_ptr + tl.cast(b, tl.int64) * starts_b).to(tl.int32)
    own = tl.minimum(start + T, S)  # the keys of this row's text
    first = tl.program_id(1) * split
    stop = tl.minimum(tl.minimum(first + split, start + tl.max(t, 0) + 1), own)
    if first < stop:
        masked = tl.minimum(start + tl.min(t, 0) + 1, stop) // BLOCK_K * BLOCK_K  # before it, all see every key
        masked = tl.maximum(masked, first)
        q = q_ptr + tl.cast(b, tl.int64) * q_b + tl.cast(h, tl.int64)[:, None] * q_h
        q += tl.cast(t, tl.int64)[:, None] * q_t + tl.cast(columns, tl.int64)[None, :] * q_d
        q = tl.load(q, mask=(columns < HEAD_DIM)[None, :], other=0.0)
        k, v = head(k_ptr, b, g, k_b, k_h), head(v_ptr, b, g, v_b, v_h)
        o = tl.zeros((BLOCK_Q, BLOCK_D), o_ptr.dtype.element_ty)
        l = tl.zeros((BLOCK_Q,), o_ptr.dtype.element_ty)  # noqa: E741
        m = tl.full((BLOCK_Q,), LOWEST, o_ptr.dtype.element_ty)
        o, l, m = attend(  # noqa: E741
            o, l, m, q, k, v, k_t, k_d, v_t, v_d, first, masked, t, T, own, 0, 0, 0,
            SCALE, True, False, False, HEAD_DIM, BLOCK_D, BLOCK_K,
        )  # fmt: skip
        o, l, m = attend(  # noqa: E741
            o, l, m, q, k, v, k_t, k_d, v_t, v_d, masked, stop, t, T, own, 0, 0, 0,
            SCALE, True, True, False, HEAD_DIM, BLOCK_D, BLOCK_K,
        )  # fmt: skip
        row = (tl.cast(tl.program_id(1), tl.int64) * B * G + n) * GROUP * T + places
        inside = places < GROUP * T
        tl.store(m_ptr + row, m, mask=inside)
        tl.store(l_ptr + row, l, mask=inside)
        o_pointers = o_ptr + row[:, None] * HEAD_DIM + columns[None, :]
        tl.store(o_pointers, o, mask=inside[:, None] & (columns < HEAD_DIM)[None, :])


@triton.jit(do_not_specialize=["B", "T", "S", "split"])
def combine_kernel(
    o_ptr,  # (splits, B, H, T, D), in rows
    m_ptr,  # (splits, B, H, T), in rows
    l_ptr,  # (splits, B, H, T), in rows
    starts_ptr,  # (B,)
    y_ptr,  # (B, H, T, D)
    y_b, y_h, y_t, y_d, starts_b,  # strides
    B, H, T, S, split,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """y of one query: the sum over the splits that it sees, each shrunk to the largest score of all."""
    n = tl.program_id(0)
    b, h, t = n // T // H, n // T % H, n % T
    start = tl.load(starts_ptr + tl.cast(b, tl.int64) * starts_b).to(tl.int32)
    splits = tl.cdiv(tl.maximum(tl.minimum(start + t + 1, S), 0), split)
    columns = tl.arange(0, BLOCK_D)
    o = tl.zeros((BLOCK_D,), o_ptr.dtype.element_ty)
    l = tl.zeros((1,), o_ptr.dtype.element_ty)  # noqa: E741
    m = tl.full((1,), LOWEST, o_ptr.dtype.element_ty)
    for first in range(0, splits, BLOCK_SPLITS):
        each = first + tl.arange(0, BLOCK_SPLITS)
        rows, there = tl.cast(each, tl.int64) * B * H * T + n, each < splits
        part_m = tl.load(m_ptr + rows, mask=there, other=LOWEST)
        part_l = tl.load(l_ptr + rows, mask=there, other=0.0)
        o_pointers = o_ptr + rows[:, None] * HEAD_DIM + columns[None, :]
        part_o = tl.load(o_pointers, mask=there[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)
        larger = tl.maximum(m, tl.max(part_m, 0))
        shrink, share = tl.exp2(m - larger), tl.exp2(part_m - larger)
        l = l * shrink + tl.sum(share * part_l, 0)  # noqa: E741
        o = o * shrink + tl.sum(share[:, None] * part_o, 0)
        m = larger
    y = head(y_ptr, b, h, y_b, y_h) + tl.cast(t, tl.int64) * y_t + tl.cast(columns, tl.int64) * y_d
    y_of_row = rounded(o / tl.where(l > 0, l, 1.0), y_ptr.dtype.element_ty)
    tl.store(y, y_of_row, mask=columns < HEAD_DIM)


operator = autograd.forward_only("cached_attention", forward, autocast="lower")
