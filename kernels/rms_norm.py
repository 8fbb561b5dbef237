"""Root-mean-square normalization over the last axis, a row a program; the formulas are in reference/rms_norm.py.

forward    rstd = 1 / sqrt(E[x^2] + eps) is kept, in float32; h is computed again
backward   a few programs for each multiprocessor take rows in turns: dx of a row, and their own sum of dy h, which one
           column sum then adds up. No two programs write the same number, so the order of sums is fixed.
           Beside a row wider than SUMS_WIDTH the sums find no room in registers: another kernel makes them.

The same kernels add a residual before they normalize, see add_rms_norm.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels import autograd, launch
from kernels.numerics import rounded, wide

MAX_WIDTH = 16_384  # entries of a row, which a program holds in registers
SUMS_WIDTH = 8_192


class Saved(NamedTuple):
    x: torch.Tensor  # (..., C)
    weight: torch.Tensor  # (C,)
    rstd: torch.Tensor  # (N,), a row each


def forward(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> tuple[torch.Tensor, Saved]:
    """x (..., C), weight (C,) -> y (..., C), saved. C is 16,384 at most."""
    y, _, rstd = normalize(x, None, weight, eps)
    return y, Saved(x, weight, rstd)


def backward(dy: torch.Tensor, saved: Saved) -> tuple[torch.Tensor, torch.Tensor]:
    """dy (..., C) -> dx (..., C), dweight (C,)."""
    return normalize_backward(dy, None, *saved)


# The launches, with a residual or without.


def normalize(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """y, x + residual (None without a residual), and rstd (N,) of what was normalized."""
    launch.check(x=x, residual=residual, weight=weight)
    C = x.shape[-1]
    launch.check_size("x: width of a row", C, MAX_WIDTH)
    launch.check_shape("weight", weight, (C,))
    x_rows = x.reshape(-1, C).contiguous()
    dtype, residual_rows, total = x.dtype, None, None
    if residual is not None:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        residual_rows = residual.reshape(-1, C).contiguous()
        total = torch.empty(x.shape, dtype=dtype, device=x.device)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    rstd = torch.empty(len(x_rows), dtype=launch.wide(dtype), device=x.device)
    arguments = (x_rows, residual_rows, weight.contiguous(), y, total, rstd, C)
    launch.launch(forward_kernel, (len(x_rows),), *arguments, EPS=eps, **launch.row_block(C))
    return y, total, rstd


def normalize_backward(
    dy: torch.Tensor, dtotal: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx, dweight, x being what was normalized. dtotal: a gradient that reaches x past the normalization."""
    launch.check(dy=dy, dtotal=dtotal, x=x, weight=weight)
    C = x.shape[-1]
    x_rows, dy_rows = (tensor.reshape(-1, C).contiguous() for tensor in (x, dy))
    dtotal_rows = None if dtotal is None else dtotal.reshape(-1, C).contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    programs = min(len(x_rows), launch.programs(x.device, 4 if C <= 4096 else 2))
    dweights = torch.empty((programs, C), dtype=rstd.dtype, device=x.device)
    here = dweights if C <= SUMS_WIDTH else None
    arguments = (dy_rows, dtotal_rows, x_rows, weight.contiguous(), rstd, dx, here, len(x_rows), C)
    launch.launch(backward_kernel, (programs,), *arguments, **launch.row_block(C))
    if C > SUMS_WIDTH:
        tile = launch.tile(C)
        grid = programs, triton.cdiv(C, tile["COLUMNS"])
        launch.launch(sums_kernel, grid, dy_rows, x_rows, rstd, dweights, len(x_rows), C, **tile)
    return dx, dweights.sum(0).to(weight.dtype)


# The kernels.


@triton.jit
def forward_kernel(
    x_ptr,  # (N, C)
    residual_ptr,  # (N, C) or None
    weight_ptr,  # (C,)
    y_ptr,  # (N, C)
    total_ptr,  # (N, C) or None: x + residual
    rstd_ptr,  # (N,)
    C,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,  # at least C
):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < C
    start = tl.cast(row, tl.int64) * C
    x = wide(tl.load(x_ptr + start + columns, mask=inside, other=0))  # (BLOCK,), 0 outside
    if residual_ptr is not None:
        x += wide(tl.load(residual_ptr + start + columns, mask=inside, other=0))
        total = rounded(x, total_ptr.dtype.element_ty)
        tl.store(total_ptr + start + columns, total, mask=inside)
        x = wide(total)  # what is normalized is what is handed on
    rstd = 1 / tl.sqrt(tl.sum(x * x, axis=0) / C + EPS)
    y = x * rstd * wide(tl.load(weight_ptr + columns, mask=inside, other=0))
    tl.store(y_ptr + start + columns, rounded(y, y_ptr.dtype.element_ty), mask=inside)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def backward_kernel(
    dy_ptr,  # (N, C)
    dtotal_ptr,  # (N, C) or None
    x_ptr,  # (N, C)
    weight_ptr,  # (C,)
    rstd_ptr,  # (N,)
    dx_ptr,  # (N, C)
    dweight_ptr,  # (programs, C), a sum each, or None
    N,
    C,
    BLOCK: tl.constexpr,  # at least C
):
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < C
    weight = wide(tl.load(weight_ptr + columns, mask=inside, other=0))  # (BLOCK,)
    dweight = tl.zeros((BLOCK,), rstd_ptr.dtype.element_ty)
    for row in range(program, N, tl.num_programs(0)):
        start = tl.cast(row, tl.int64) * C
        x = wide(tl.load(x_ptr + start + columns, mask=inside, other=0))
        dy = wide(tl.load(dy_ptr + start + columns, mask=inside, other=0))
        if dweight_ptr is None:  # beside so wide a row no registers are left to keep the weight in
            weight = wide(tl.load(weight_ptr + columns, mask=inside, other=0))
        rstd = tl.load(rstd_ptr + row)
        h = x * rstd  # 0 outside
        g = dy * weight
        g_along_h = tl.sum(g * h, axis=0) / C
        dx = rstd * (g - h * g_along_h)
        if dtotal_ptr is not None:
            dx += wide(tl.load(dtotal_ptr + start + columns, mask=inside, other=0))
        tl.store(dx_ptr + start + columns, rounded(dx, dx_ptr.dtype.element_ty), mask=inside)
        if dweight_ptr is not None:
            dweight += dy * h
    if dweight_ptr is not None:
        tl.store(dweight_ptr + tl.cast(program, tl.int64) * C + columns, dweight, mask=inside)


@triton.jit
def sums_kernel(
    dy_ptr,  # (N, C)
    x_ptr,  # (N, C)
    rstd_ptr,  # (N,)
    dweight_ptr,  # (programs, C), a sum each
    N,
    C,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    columns = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    dweight = tl.zeros((ROWS, COLUMNS), rstd_ptr.dtype.element_ty)
    for first in range(program * ROWS, N, tl.num_programs(0) * ROWS):
        rows = (first + tl.arange(0, ROWS))[:, None]
        inside = (rows < N) & (columns < C)
        index = tl.cast(rows, tl.int64) * C + columns
        x = wide(tl.load(x_ptr + index, mask=inside, other=0))  # (ROWS, COLUMNS)
        dy = wide(tl.load(dy_ptr + index, mask=inside, other=0))
        dweight += dy * x * tl.load(rstd_ptr + rows, mask=rows < N, other=0)
    partial = tl.cast(program, tl.int64) * C + columns
    tl.store(dweight_ptr + partial, tl.sum(dweight, axis=0)[None, :], mask=columns < C)


operator = autograd.operator("rms_norm", forward, backward, Saved, gradients=("x", "weight"), autocast="float32")
