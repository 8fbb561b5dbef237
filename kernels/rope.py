"""Rotary position embedding: each pair of a head's entries turned by its angle; formulas in reference/rope.py.

A program takes rows, (position, head) after (position, head) as projections write them. In halves, a row's two halves
are loaded each by itself; interleaved, the row is loaded whole and taken apart in registers. Results lie in memory as
(B, T, H, D), as attention's do: heads of queries and keys, and gradients on their way to the projections, need no copy.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels import autograd, launch
from kernels.attention import aligned, known
from kernels.numerics import rounded, wide

MAX_HEAD_DIM = 256
ENTRIES, WARPS = 2048, 4  # of a tile: 16 a thread


class Saved(NamedTuple):
    cos: torch.Tensor  # (T, D / 2) or (B, T, D / 2)
    sin: torch.Tensor  # like cos
    interleaved: bool


def forward(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
) -> tuple[torch.Tensor, Saved]:
    """x (B, H, T, D) -> y like x, saved. x has any strides, D is even and 256 at most.

    cos and sin (T, D / 2), or (B, T, D / 2) for rows at different positions, are float32 whatever x is.
    """
    return rotate(x, cos, sin, interleaved, 1), Saved(cos, sin, interleaved)


def backward(dy: torch.Tensor, saved: Saved) -> torch.Tensor:
    """dy (B, H, T, D) -> dx like dy."""
    return rotate(dy, *saved, -1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, sign: int) -> torch.Tensor:
    """x turned by the angles times `sign`, which is 1 or -1."""
    if x.ndim != 4:
        raise ValueError(f"x: expected shape (B, H, T, D), got {tuple(x.shape)}")
    B, H, T, D = x.shape
    if D % 2 or not D:
        raise ValueError(f"x: expected an even head_dim of at least 2, got {D}")
    launch.check_size("x: head_dim", D, MAX_HEAD_DIM)
    half = D // 2
    if cos.shape not in ((T, half), (B, T, half)) or sin.shape != cos.shape:
        raise ValueError(
            f"cos, sin: expected both ({T}, {half}) or both ({B}, {T}, {half}), "
            f"got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    launch.check(x=x, cos=cos, sin=sin)
    y = torch.empty((B, T, H, D), dtype=x.dtype, device=x.device).transpose(1, 2)
    N, BLOCK = B * T * H, launch.power_of_2(half)
    constants = {"ALIGNED": aligned(x, y), "PER_ROW": cos.ndim == 3, "INTERLEAVED": interleaved}
    tile = {"HALF": int(half), "BLOCK": BLOCK, "ROWS": ENTRIES // (2 * BLOCK), "num_warps": WARPS}
    launch.launch(
        rotate_kernel, (triton.cdiv(N, tile["ROWS"]),), x, cos.contiguous(), sin.contiguous(), y,
        *x.stride(), *y.stride()[:3], N, H, T, sign, **constants, **tile,
    )  # fmt: skip
    return y


# The kernel.


@triton.jit(do_not_specialize=["N", "T", "sign"])
def rotate_kernel(
    x_ptr,  # (B, H, T, D)
    cos_ptr,  # (T, D / 2) or, PER_ROW, (B, T, D / 2)
    sin_ptr,  # like cos
    y_ptr,  # (B, H, T, D)
    x_b, x_h, x_t, x_d, y_b, y_h, y_t,  # strides; y's of D is 1
    N, H, T, sign,
    ALIGNED: tl.constexpr, PER_ROW: tl.constexpr, INTERLEAVED: tl.constexpr,
    HALF: tl.constexpr, BLOCK: tl.constexpr,  # at least HALF
    ROWS: tl.constexpr,
):  # fmt: skip
    x_b, x_h, x_t = known(x_b, x_h, x_t, ALIGNED)
    y_b, y_h, y_t = known(y_b, y_h, y_t, ALIGNED)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    h, t, b = n % H, n // H % T, n // H // T
    x_row = (b * x_b + h * x_h + t * x_t)[:, None]  # 64-bit, as strides are
    y_row = (b * y_b + h * y_h + t * y_t)[:, None]
    pairs = tl.arange(0, BLOCK)[None, :]
    inside = (n < N)[:, None] & (pairs < HALF)
    angle = tl.cast(b * T + t if PER_ROW else t, tl.int64)[:, None] * HALF + pairs
    cos = wide(tl.load(cos_ptr + angle, mask=inside, other=0))  # (ROWS, BLOCK)
    sin = wide(tl.load(sin_ptr + angle, mask=inside, other=0)) * sign
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    if INTERLEAVED:
        entries = tl.arange(0, 2 * BLOCK)[None, :]
        inside = (n < N)[:, None] & (entries < 2 * HALF)
        x = wide(tl.load(x_ptr + x_row + tl.cast(entries, tl.int64) * x_d, mask=inside, other=0))
        first, second = tl.split(tl.reshape(x, (ROWS, BLOCK, 2)))
        y = tl.interleave(first * cos - second * sin, first * sin + second * cos)
        tl.store(y_ptr + y_row + entries, rounded(y, dtype), mask=inside)
    else:
        x = x_ptr + x_row + tl.cast(pairs, tl.int64) * x_d
        first = wide(tl.load(x, mask=inside, other=0))
        second = wide(tl.load(x + tl.cast(HALF, tl.int64) * x_d, mask=inside, other=0))
        y = y_ptr + y_row + pairs
        tl.store(y, rounded(first * cos - second * sin, dtype), mask=inside)
        tl.store(y + HALF, rounded(first * sin + second * cos, dtype), mask=inside)


operator = autograd.operator("rope", forward, backward, Saved, gradients=("x",))
