"""Scaled dot-product attention whose scores never exist in memory: FlashAttention (Dao et al. 2022, 2023).

What is computed is in reference/attention.py; how, tile by tile, step by step and in the same order, is in
reference/flash_attention.py. What is particular to the kernels:

- A program owns a tile of queries (y, dq) or of keys (dk and dv, over the query heads that share them), so that no two
  programs add to one number: results repeat bit for bit.
- Exponentials are to base 2, as the hardware has them: scale log2(e) multiplies the scores after the product.
- Tiles that need no mask, all but those on the diagonal and at the end, have a loop of their own without one.
- Dropout's mask is computed again in each pass, from an element's place alone.
- Products of float32 are exact to float32. The tensor cores' tf32 would be faster and a thousand times less precise.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensor

from kernels import autograd, launch, philox
from kernels.numerics import dot, rounded
from kernels.philox import Noise

MAX_HEAD_DIM = 256  # a tile of a head has to fit on chip

# Kernel and bytes of an element -> for heads up to this wide: (BLOCK_Q, BLOCK_K, num_warps, num_stages), the same with
# dropout, whose random words take registers, and for heads of a width that is no power of 2, with dropout or not: their
# loads have masks, and are narrow. `python -m bench static` shows what becomes of each: at its widths none spills.
Configuration = tuple[int, int, int, int]
CONFIGURATIONS: dict[tuple[str, int], dict[int, tuple[Configuration, Configuration, Configuration]]] = {
    ("forward", 2): {
        64: ((128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 2)),
        128: ((128, 64, 8, 3), (128, 32, 8, 2), (64, 32, 8, 2)),
        256: ((64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
    },
    ("dq", 2): {
        64: ((128, 64, 8, 3), (128, 32, 8, 2), (128, 32, 8, 2)),
        128: ((128, 32, 8, 2), (64, 32, 4, 2), (64, 32, 4, 2)),
        256: ((64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
    },
    ("dk_dv", 2): {
        64: ((32, 128, 8, 2), (16, 128, 8, 2), (16, 128, 8, 2)),
        128: ((32, 64, 8, 2), (16, 64, 8, 2), (16, 64, 8, 2)),
        256: ((32, 32, 8, 2), (16, 32, 8, 2), (16, 32, 8, 2)),
    },
    ("forward", 4): {
        64: ((64, 32, 8, 2), (64, 32, 8, 2), (16, 16, 8, 2)),
        128: ((32, 32, 8, 2), (32, 32, 8, 2), (32, 16, 8, 2)),
        256: ((16, 16, 8, 2), (16, 16, 8, 2), (16, 16, 8, 2)),
    },
    ("dq", 4): {
        64: ((64, 32, 8, 2), (64, 32, 8, 2), (16, 32, 8, 2)),
        128: ((32, 32, 8, 2), (32, 16, 8, 2), (16, 16, 8, 2)),
        256: ((16, 16, 8, 2), (16, 16, 8, 2), (16, 16, 8, 2)),
    },
    ("dk_dv", 4): {
        64: ((16, 64, 8, 1), (32, 32, 8, 2), (16, 32, 16, 1)),
        128: ((16, 16, 4, 1), (16, 32, 4, 1), (16, 32, 16, 1)),
        256: ((16, 32, 16, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
    },
}


class Saved(NamedTuple):
    q: torch.Tensor  # (B, H, T, D)
    k: torch.Tensor  # (B, G, S, D)
    v: torch.Tensor  # (B, G, S, D)
    causal: bool
    scale: float | None
    rate: float
    noise: Noise | None
    y: torch.Tensor  # (B, H, T, D)
    lse: torch.Tensor  # (B, H, T): log2 of the sum of exponentials of a query's scores


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool = True,
    scale: float | None = None,
    rate: float = 0.0,
    noise: Noise | None = None,
) -> tuple[torch.Tensor, Saved]:
    """q (B, H, T, D), k and v (B, G, S, D), G dividing H, one dtype, any strides, D at most 256 -> y like q, saved.

    Causal: the queries are the last T of the S positions, and a query sees no key after its own. A query that sees no
    key at all gives 0. `scale` is 1 / sqrt(D) unless given, and positive. `rate`, `noise`: dropout of p.
    y lies in memory as (B, T, H, D), so that joining heads copies nothing.
    """
    check(q, k, v, scale)
    B, H, T, D = q.shape
    y = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty((B, H, T), dtype=launch.wide(q.dtype), device=q.device)
    saved = Saved(q, k, v, causal, scale, rate, noise, y, lse)
    numbers, constants, tile = _arguments("forward", saved, q, k, v, y)
    grid = (B * H * triton.cdiv(T, tile["BLOCK_Q"]),)
    launch.launch(forward_kernel, grid, q, k, v, y, lse, *numbers, **constants, **tile)
    return y, saved


def backward(dy: torch.Tensor, saved: Saved) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dy (B, H, T, D) -> dq (B, H, T, D), dk (B, G, S, D), dv (B, G, S, D)."""
    q, k, v, *_, y, lse = saved
    launch.check(dy=dy, q=q)
    launch.check_shape("dy", dy, q.shape)
    (B, H, T, D), (_, G, S, _) = q.shape, k.shape
    dq = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device).transpose(1, 2)
    dk, dv = (torch.empty((B, S, G, D), dtype=q.dtype, device=q.device).transpose(1, 2) for _ in "kv")
    delta = torch.empty_like(lse)

    numbers, constants, tile = _arguments("dq", saved, q, k, v, y, dy, dq)
    grid = (B * H * triton.cdiv(T, tile["BLOCK_Q"]),)
    launch.launch(dq_kernel, grid, q, k, v, y, dy, lse, delta, dq, *numbers, **constants, **tile)

    numbers, constants, tile = _arguments("dk_dv", saved, q, k, v, dy, dk, dv)
    grid = (B * G * triton.cdiv(S, tile["BLOCK_K"]),)
    launch.launch(dk_dv_kernel, grid, q, k, v, dy, lse, delta, dk, dv, *numbers, **constants, **tile)
    return dq, dk, dv


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> None:
    if q.ndim != 4:
        raise ValueError(f"q: expected shape (B, H, T, D), got {tuple(q.shape)}")
    B, H, _, D = q.shape
    if k.ndim != 4 or k.shape != (B, *k.shape[1:3], D) or v.shape != k.shape or not k.shape[1] or H % k.shape[1]:
        raise ValueError(
            f"k, v: expected both ({B}, G, S, {D}) with G dividing {H}, got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    launch.check(q=q, k=k, v=v)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            expected, got = (str(dtype).removeprefix("torch.") for dtype in (q.dtype, tensor.dtype))
            raise TypeError(f"{name}: expected {expected} like q, got {got}")
    if not D:
        raise ValueError("q: expected a head_dim of at least 1, got 0")
    launch.check_size("q: head_dim", D, MAX_HEAD_DIM)
    if scale is not None and not scale > 0:
        raise ValueError(f"scale: expected a positive number, got {scale!r}")


def _arguments(
    kernel: str, saved: Saved, *tensors: torch.Tensor
) -> tuple[tuple[int, ...], dict[str, float | bool], dict[str, int]]:
    """What a kernel takes after its pointers: strides and other numbers, what a model fixes, and the tile."""
    H, T, D = saved.q.shape[1:]
    G, S = saved.k.shape[1:3]
    key, first, threshold, factor = philox.arguments(saved.rate, saved.noise)
    BLOCK_D = max(16, launch.power_of_2(D))  # the narrowest operand of a tensor core
    configurations = CONFIGURATIONS[kernel, min(4, saved.q.element_size())][max(64, BLOCK_D)]
    choice = configurations[2 if D < BLOCK_D else 1 if factor > 1 else 0]
    tile = dict(zip(("BLOCK_Q", "BLOCK_K", "num_warps", "num_stages"), choice, strict=True))
    constants = {
        "SCALE": 1 / math.sqrt(D) if saved.scale is None else saved.scale,
        "CAUSAL": saved.causal,
        "DROPOUT": factor > 1,
        "FACTOR": factor,
        "ALIGNED": aligned(*tensors),
        "HEAD_DIM": int(D),
        "BLOCK_D": BLOCK_D,
    }
    strides = tuple(stride for tensor in tensors for stride in tensor.stride())
    return (*strides, H, H // G, T, S, key, first, threshold), constants, tile


def aligned(*tensors: torch.Tensor) -> int:
    """Of how many entries the distance of any two rows is a multiple: a power of 2, 16 at most.

    By itself Triton looks for 16 or nothing, and would read heads of 54 entries one by one.
    """
    if isinstance(tensors[0], FakeTensor):  # strides may be symbols, and nothing is launched
        return 1
    return math.gcd(16, *(stride for tensor in tensors for stride in tensor.stride()[:3]))


# Steps that the kernels have in common. A tile holds rows of one head, (rows, BLOCK_D): with zeros beyond HEAD_DIM.

LOG2_E = tl.constexpr(math.log2(math.e))
LOWEST = tl.constexpr(-3.0e38)  # where a running maximum starts: finite, so that m - m is 0 where no key is seen


@triton.jit
def known(stride_b, stride_h, stride_row, ALIGNED: tl.constexpr):
    """The same strides, which the compiler now knows to be multiples of ALIGNED: so wide can loads be."""
    b, h, row = tl.cast(stride_b, tl.int64), tl.cast(stride_h, tl.int64), tl.cast(stride_row, tl.int64)
    return tl.multiple_of(b, ALIGNED), tl.multiple_of(h, ALIGNED), tl.multiple_of(row, ALIGNED)


@triton.jit
def head(pointer, b, h, stride_b, stride_h):
    """Where head h of example b begins."""
    return pointer + tl.cast(b, tl.int64) * stride_b + tl.cast(h, tl.int64) * stride_h


@triton.jit
def offsets(rows, columns, stride_row, stride_column):
    """Of elements (rows, columns) from the beginning of their head."""
    return tl.cast(rows, tl.int64)[:, None] * stride_row + tl.cast(columns, tl.int64)[None, :] * stride_column


@triton.jit
def _load(pointers, rows, limit, columns, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr):
    """A tile; where MASKED, rows may lie beyond `limit`, and are 0 there."""
    if MASKED:
        return tl.load(pointers, mask=(rows < limit)[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)
    elif HEAD_DIM < columns.shape[0]:
        return tl.load(pointers, mask=(columns < HEAD_DIM)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store(pointers, tile, rows, limit, columns, HEAD_DIM: tl.constexpr):
    mask = (rows < limit)[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(pointers, rounded(tile, pointers.dtype.element_ty), mask=mask)


@triton.jit
def _seen(rows, columns, T, S, CAUSAL: tl.constexpr):
    """Which keys, `columns`, queries `rows` see. One of the two is (n, 1), the other (1, n)."""
    if CAUSAL:
        return (columns < S) & (columns <= rows + (S - T))
    else:
        return columns < S


@triton.jit
def _key_range(first, T, S, CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """For the tile of queries that begins at `first`: from which key on tiles need a mask, and where keys end."""
    if CAUSAL:
        unmasked = tl.minimum(tl.maximum(first + 1 + S - T, 0), S)  # all of these queries see all of these keys
        stop = tl.minimum(tl.maximum(first + BLOCK_Q + S - T, 0), S)
    else:
        unmasked = S
        stop = S
    return unmasked // BLOCK_K * BLOCK_K, stop


@triton.jit
def _probabilities(s, lse, SCALE: tl.constexpr):
    """What the forward pass had. At most 1: large scores, made in another order, differ by far more than that in s."""
    return tl.exp2(tl.minimum(s * (SCALE * LOG2_E) - lse, 0.0, propagate_nan=tl.PropagateNan.ALL))


# The kernels.


@triton.jit(do_not_specialize=["T", "S", "key", "first_head", "threshold"])
def forward_kernel(
    q_ptr,  # (B, H, T, D)
    k_ptr,  # (B, G, S, D)
    v_ptr,  # (B, G, S, D)
    y_ptr,  # (B, H, T, D)
    lse_ptr,  # (B, H, T), in rows
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, y_b, y_h, y_t, y_d,  # strides
    H, GROUP, T, S, key: tl.int64, first_head: tl.int64, threshold: tl.int32,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, FACTOR: tl.constexpr, ALIGNED: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y and lse of a tile of queries of one head."""
    q_b, q_h, q_t = known(q_b, q_h, q_t, ALIGNED)
    k_b, k_h, k_t = known(k_b, k_h, k_t, ALIGNED)
    v_b, v_h, v_t = known(v_b, v_h, v_t, ALIGNED)
    y_b, y_h, y_t = known(y_b, y_h, y_t, ALIGNED)
    tiles = tl.cdiv(T, BLOCK_Q)
    n = tl.program_id(0) // tiles
    b, h = n // H, n % H
    first = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_Q  # under a causal mask the last have most to do
    rows, columns = first + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    q = head(q_ptr, b, h, q_b, q_h) + offsets(rows, columns, q_t, q_d)
    q = _load(q, rows, T, columns, HEAD_DIM, True)
    k, v = head(k_ptr, b, h // GROUP, k_b, k_h), head(v_ptr, b, h // GROUP, v_b, v_h)
    o = tl.zeros((BLOCK_Q, BLOCK_D), lse_ptr.dtype.element_ty)
    l = tl.zeros((BLOCK_Q,), lse_ptr.dtype.element_ty)  # noqa: E741
    m = tl.full((BLOCK_Q,), LOWEST, lse_ptr.dtype.element_ty)
    masked, stop = _key_range(first, T, S, CAUSAL, BLOCK_Q, BLOCK_K)
    o, l, m = attend(  # noqa: E741
        o, l, m, q, k, v, k_t, k_d, v_t, v_d, 0, masked, rows, T, S, n + first_head, key, threshold,
        SCALE, CAUSAL, False, DROPOUT, HEAD_DIM, BLOCK_D, BLOCK_K,
    )  # fmt: skip
    o, l, m = attend(  # noqa: E741
        o, l, m, q, k, v, k_t, k_d, v_t, v_d, masked, stop, rows, T, S, n + first_head, key, threshold,
        SCALE, CAUSAL, True, DROPOUT, HEAD_DIM, BLOCK_D, BLOCK_K,
    )  # fmt: skip
    l = tl.where(l > 0, l, 1.0)  # noqa: E741
    y = head(y_ptr, b, h, y_b, y_h) + offsets(rows, columns, y_t, y_d)
    store(y, o * (FACTOR / l)[:, None], rows, T, columns, HEAD_DIM)
    tl.store(lse_ptr + tl.cast(n, tl.int64) * T + rows, m + tl.log2(l), mask=rows < T)


@triton.jit
def attend(
    o, l, m, q, k, v, k_t, k_d, v_t, v_d, start, stop, rows, T, S, n, key, threshold,  # noqa: E741
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The online softmax of a tile of queries, over the keys from `start` to `stop`."""
    columns, keys = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_K)
    k_offsets, v_offsets = offsets(keys, columns, k_t, k_d), offsets(keys, columns, v_t, v_d)
    for first in range(start, stop, BLOCK_K):
        first = tl.multiple_of(first, BLOCK_K)
        offset = tl.cast(first, tl.int64)
        k_tile = _load(k + offset * k_t + k_offsets, first + keys, S, columns, HEAD_DIM, MASKED)
        s = dot(q, tl.trans(k_tile), tl.zeros((q.shape[0], BLOCK_K), o.dtype))  # (BLOCK_Q, BLOCK_K)
        if MASKED:
            s = tl.where(_seen(rows[:, None], (first + keys)[None, :], T, S, CAUSAL), s, float("-inf"))
        larger = tl.maximum(m, tl.max(s, 1) * (SCALE * LOG2_E))
        p = tl.exp2(s * (SCALE * LOG2_E) - larger[:, None])
        shrink = tl.exp2(m - larger)
        l = l * shrink + tl.sum(p, 1)  # noqa: E741
        if DROPOUT:
            p = tl.where(philox.keep_mask(key, threshold, n, rows[:, None], first, BLOCK_K), p, 0.0)
        v_tile = _load(v + offset * v_t + v_offsets, first + keys, S, columns, HEAD_DIM, MASKED)
        o = dot(rounded(p, v_tile.dtype), v_tile, o * shrink[:, None])
        m = larger
    return o, l, m


@triton.jit(do_not_specialize=["T", "S", "key", "first_head", "threshold"])
def dq_kernel(
    q_ptr,  # (B, H, T, D)
    k_ptr,  # (B, G, S, D)
    v_ptr,  # (B, G, S, D)
    y_ptr,  # (B, H, T, D)
    dy_ptr,  # (B, H, T, D)
    lse_ptr,  # (B, H, T), in rows
    delta_ptr,  # (B, H, T), in rows: written here, read by dk_dv_kernel
    dq_ptr,  # (B, H, T, D)
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d,  # strides
    y_b, y_h, y_t, y_d, dy_b, dy_h, dy_t, dy_d, dq_b, dq_h, dq_t, dq_d,
    H, GROUP, T, S, key: tl.int64, first_head: tl.int64, threshold: tl.int32,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, FACTOR: tl.constexpr, ALIGNED: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries of one head, and delta = rowsum(y dy): what softmax's gradient takes away."""
    q_b, q_h, q_t = known(q_b, q_h, q_t, ALIGNED)
    k_b, k_h, k_t = known(k_b, k_h, k_t, ALIGNED)
    v_b, v_h, v_t = known(v_b, v_h, v_t, ALIGNED)
    y_b, y_h, y_t = known(y_b, y_h, y_t, ALIGNED)
    dy_b, dy_h, dy_t = known(dy_b, dy_h, dy_t, ALIGNED)
    dq_b, dq_h, dq_t = known(dq_b, dq_h, dq_t, ALIGNED)
    tiles = tl.cdiv(T, BLOCK_Q)
    n = tl.program_id(0) // tiles
    b, h = n // H, n % H
    first = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_Q
    rows, columns = first + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    statistics = tl.cast(n, tl.int64) * T + rows
    lse = tl.load(lse_ptr + statistics, mask=rows < T, other=0.0)
    y = head(y_ptr, b, h, y_b, y_h) + offsets(rows, columns, y_t, y_d)
    y = _load(y, rows, T, columns, HEAD_DIM, True)
    dy = head(dy_ptr, b, h, dy_b, dy_h) + offsets(rows, columns, dy_t, dy_d)
    dy = _load(dy, rows, T, columns, HEAD_DIM, True)
    delta = tl.sum(y.to(lse.dtype) * dy.to(lse.dtype), 1)
    tl.store(delta_ptr + statistics, delta, mask=rows < T)
    q = head(q_ptr, b, h, q_b, q_h) + offsets(rows, columns, q_t, q_d)
    q = _load(q, rows, T, columns, HEAD_DIM, True)
    k, v = head(k_ptr, b, h // GROUP, k_b, k_h), head(v_ptr, b, h // GROUP, v_b, v_h)
    dq = tl.zeros((BLOCK_Q, BLOCK_D), lse.dtype)
    masked, stop = _key_range(first, T, S, CAUSAL, BLOCK_Q, BLOCK_K)
    dq = _add_dq(
        dq, q, dy, lse, delta, k, v, k_t, k_d, v_t, v_d, 0, masked, rows, T, S, n + first_head, key, threshold,
        SCALE, CAUSAL, False, DROPOUT, FACTOR, HEAD_DIM, BLOCK_D, BLOCK_K,
    )  # fmt: skip
    dq = _add_dq(
        dq, q, dy, lse, delta, k, v, k_t, k_d, v_t, v_d, masked, stop, rows, T, S, n + first_head, key, threshold,
        SCALE, CAUSAL, True, DROPOUT, FACTOR, HEAD_DIM, BLOCK_D, BLOCK_K,
    )  # fmt: skip
    pointers = head(dq_ptr, b, h, dq_b, dq_h) + offsets(rows, columns, dq_t, dq_d)
    store(pointers, dq * SCALE, rows, T, columns, HEAD_DIM)


@triton.jit
def _add_dq(
    dq, q, dy, lse, delta, k, v, k_t, k_d, v_t, v_d, start, stop, rows, T, S, n, key, threshold,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr, FACTOR: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add what the keys from `start` to `stop` give to a tile's dq, but for the scale."""
    columns, keys = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_K)
    k_offsets, v_offsets = offsets(keys, columns, k_t, k_d), offsets(keys, columns, v_t, v_d)
    for first in range(start, stop, BLOCK_K):
        first = tl.multiple_of(first, BLOCK_K)
        offset = tl.cast(first, tl.int64)
        k_tile = _load(k + offset * k_t + k_offsets, first + keys, S, columns, HEAD_DIM, MASKED)
        v_tile = _load(v + offset * v_t + v_offsets, first + keys, S, columns, HEAD_DIM, MASKED)
        zeros = tl.zeros((q.shape[0], BLOCK_K), dq.dtype)
        s = dot(q, tl.trans(k_tile), zeros)  # (BLOCK_Q, BLOCK_K)
        if MASKED:
            s = tl.where(_seen(rows[:, None], (first + keys)[None, :], T, S, CAUSAL), s, float("-inf"))
        p = _probabilities(s, lse[:, None], SCALE)
        dp = dot(dy, tl.trans(v_tile), zeros)
        if DROPOUT:
            keep = philox.keep_mask(key, threshold, n, rows[:, None], first, BLOCK_K)
            dp = tl.where(keep, dp * FACTOR, 0.0)
        ds = p * (dp - delta[:, None])
        dq = dot(rounded(ds, k_tile.dtype), k_tile, dq)
    return dq


@triton.jit(do_not_specialize=["T", "S", "key", "first_head", "threshold"])
def dk_dv_kernel(
    q_ptr,  # (B, H, T, D)
    k_ptr,  # (B, G, S, D)
    v_ptr,  # (B, G, S, D)
    dy_ptr,  # (B, H, T, D)
    lse_ptr,  # (B, H, T), in rows
    delta_ptr,  # (B, H, T), in rows
    dk_ptr,  # (B, G, S, D)
    dv_ptr,  # (B, G, S, D)
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d,  # strides
    dy_b, dy_h, dy_t, dy_d, dk_b, dk_h, dk_t, dk_d, dv_b, dv_h, dv_t, dv_d,
    H, GROUP, T, S, key: tl.int64, first_head: tl.int64, threshold: tl.int32,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, FACTOR: tl.constexpr, ALIGNED: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys of one key head, over the query heads that share it."""
    q_b, q_h, q_t = known(q_b, q_h, q_t, ALIGNED)
    k_b, k_h, k_t = known(k_b, k_h, k_t, ALIGNED)
    v_b, v_h, v_t = known(v_b, v_h, v_t, ALIGNED)
    dy_b, dy_h, dy_t = known(dy_b, dy_h, dy_t, ALIGNED)
    dk_b, dk_h, dk_t = known(dk_b, dk_h, dk_t, ALIGNED)
    dv_b, dv_h, dv_t = known(dv_b, dv_h, dv_t, ALIGNED)
    tiles = tl.cdiv(S, BLOCK_K)
    G = H // GROUP
    b, g = tl.program_id(0) // tiles // G, tl.program_id(0) // tiles % G
    first_key = tl.program_id(0) % tiles * BLOCK_K
    keys, columns = first_key + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    k = head(k_ptr, b, g, k_b, k_h) + offsets(keys, columns, k_t, k_d)
    k = _load(k, keys, S, columns, HEAD_DIM, True)
    v = head(v_ptr, b, g, v_b, v_h) + offsets(keys, columns, v_t, v_d)
    v = _load(v, keys, S, columns, HEAD_DIM, True)
    dk = tl.zeros((BLOCK_K, BLOCK_D), lse_ptr.dtype.element_ty)
    dv = tl.zeros((BLOCK_K, BLOCK_D), lse_ptr.dtype.element_ty)
    if CAUSAL:  # queries before `start` see none of these keys, those from `unmasked` on see them all
        start = tl.maximum(first_key - (S - T), 0) // BLOCK_Q * BLOCK_Q
        unmasked = tl.cdiv(tl.maximum(first_key + BLOCK_K - 1 - (S - T), 0), BLOCK_Q) * BLOCK_Q
    else:
        start = 0
        unmasked = 0
    for h in range(g * GROUP, (g + 1) * GROUP):
        n = b * H + h
        q, dy = head(q_ptr, b, h, q_b, q_h), head(dy_ptr, b, h, dy_b, dy_h)
        lse, delta = lse_ptr + tl.cast(n, tl.int64) * T, delta_ptr + tl.cast(n, tl.int64) * T
        if CAUSAL:
            dk, dv = _add_dk_dv(
                dk, dv, k, v, q, dy, lse, delta, q_t, q_d, dy_t, dy_d, start, tl.minimum(unmasked, T), first_key,
                T, S, n + first_head, key, threshold,
                SCALE, CAUSAL, True, DROPOUT, FACTOR, HEAD_DIM, BLOCK_D, BLOCK_Q, BLOCK_K,
            )  # fmt: skip
        dk, dv = _add_dk_dv(
            dk, dv, k, v, q, dy, lse, delta, q_t, q_d, dy_t, dy_d, unmasked, T, first_key,
            T, S, n + first_head, key, threshold,
            SCALE, CAUSAL, False, DROPOUT, FACTOR, HEAD_DIM, BLOCK_D, BLOCK_Q, BLOCK_K,
        )  # fmt: skip
    dk_pointers = head(dk_ptr, b, g, dk_b, dk_h) + offsets(keys, columns, dk_t, dk_d)
    store(dk_pointers, dk * SCALE, keys, S, columns, HEAD_DIM)
    dv_pointers = head(dv_ptr, b, g, dv_b, dv_h) + offsets(keys, columns, dv_t, dv_d)
    store(dv_pointers, dv * FACTOR, keys, S, columns, HEAD_DIM)


@triton.jit
def _add_dk_dv(
    dk, dv, k, v, q, dy, lse, delta, q_t, q_d, dy_t, dy_d, start, stop, first_key, T, S, n, key, threshold,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr, FACTOR: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add what the queries from `start` to `stop` of one head give to a tile's dk and dv, but for scale and factor.

    Scores are transposed, (BLOCK_K, BLOCK_Q). Past the last query dy, lse and delta are 0: such rows add nothing.
    """
    columns, queries = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_Q)
    keys = first_key + tl.arange(0, BLOCK_K)
    q_offsets, dy_offsets = offsets(queries, columns, q_t, q_d), offsets(queries, columns, dy_t, dy_d)
    for first in range(start, stop, BLOCK_Q):
        first = tl.multiple_of(first, BLOCK_Q)
        rows = first + queries
        offset = tl.cast(first, tl.int64)
        q_tile = _load(q + offset * q_t + q_offsets, rows, T, columns, HEAD_DIM, True)
        dy_tile = _load(dy + offset * dy_t + dy_offsets, rows, T, columns, HEAD_DIM, True)
        zeros = tl.zeros((BLOCK_K, BLOCK_Q), dk.dtype)
        s = dot(k, tl.trans(q_tile), zeros)
        if MASKED:
            s = tl.where(_seen(rows[None, :], keys[:, None], T, S, CAUSAL), s, float("-inf"))
        p = _probabilities(s, tl.load(lse + rows, mask=rows < T, other=0.0)[None, :], SCALE)
        dp = dot(v, tl.trans(dy_tile), zeros)
        dropped = p
        if DROPOUT:
            keep = tl.trans(philox.keep_mask(key, threshold, n, rows[:, None], first_key, BLOCK_K))
            dropped = tl.where(keep, p, 0.0)
            dp = tl.where(keep, dp * FACTOR, 0.0)
        dv = dot(rounded(dropped, dy_tile.dtype), dy_tile, dv)
        ds = p * (dp - tl.load(delta + rows, mask=rows < T, other=0.0)[None, :])
        dk = dot(rounded(ds, q_tile.dtype), q_tile, dk)
    return dk, dv


operator = autograd.operator("attention", forward, backward, Saved, gradients=("q", "k", "v"), autocast="lower")
