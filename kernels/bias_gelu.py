"""Bias and GELU in one; the activation is that of gelu.py.

In the backward pass a program owns some columns and takes rows in turns with others, so that it sums dbias as it goes;
one column sum then adds these sums up.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels import autograd, launch
from kernels.gelu import gate, is_tanh, slope
from kernels.numerics import rounded, wide


class Saved(NamedTuple):
    x: torch.Tensor  # (..., C)
    bias: torch.Tensor  # (C,)
    approximate: str


def forward(x: torch.Tensor, bias: torch.Tensor, approximate: str = "none") -> tuple[torch.Tensor, Saved]:
    """x (..., C), bias (C,), approximate "none" or "tanh" -> y like x, saved."""
    launch.check(x=x, bias=bias)
    launch.check_shape("bias", bias, x.shape[-1:])
    C = x.shape[-1]
    rows = x.reshape(-1, C).contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile = launch.tile(C)
    arguments = (rows, bias.contiguous(), y, len(rows), C)
    launch.launch(forward_kernel, launch.tiles(rows, tile), *arguments, TANH=is_tanh(approximate), **tile)
    return y, Saved(x, bias, approximate)


def backward(dy: torch.Tensor, saved: Saved) -> tuple[torch.Tensor, torch.Tensor]:
    """dy (..., C) -> dx like x, dbias (C,)."""
    x, bias, approximate = saved
    launch.check(dy=dy, x=x, bias=bias)
    C = x.shape[-1]
    dy_rows, x_rows = (tensor.reshape(-1, C).contiguous() for tensor in (dy, x))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile = launch.tile(C)
    row_tiles, column_tiles = launch.tiles(x_rows, tile)
    programs = min(row_tiles, max(1, launch.programs(x.device, 8) // max(1, column_tiles)))
    sums = torch.empty((programs, C), dtype=launch.wide(x.dtype), device=x.device)
    arguments = (dy_rows, x_rows, bias.contiguous(), dx, sums, len(x_rows), C)
    launch.launch(backward_kernel, (programs, column_tiles), *arguments, TANH=is_tanh(approximate), **tile)
    return dx, sums.sum(0).to(bias.dtype)


# The kernels.


@triton.jit
def forward_kernel(
    x_ptr,  # (N, C)
    bias_ptr,  # (C,)
    y_ptr,  # (N, C)
    N,
    C,
    TANH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (rows < N) & (columns < C)
    index = tl.cast(rows, tl.int64) * C + columns
    bias = wide(tl.load(bias_ptr + columns, mask=columns < C, other=0))  # (1, COLUMNS)
    x = wide(tl.load(x_ptr + index, mask=inside, other=0)) + bias
    tl.store(y_ptr + index, rounded(x * gate(x, TANH), y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    dy_ptr,  # (N, C)
    x_ptr,  # (N, C)
    bias_ptr,  # (C,)
    dx_ptr,  # (N, C)
    sums_ptr,  # (programs, C), of dx over the rows of a program
    N,
    C,
    TANH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    columns = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    bias = wide(tl.load(bias_ptr + columns, mask=columns < C, other=0))  # (1, COLUMNS)
    sums = tl.zeros((ROWS, COLUMNS), sums_ptr.dtype.element_ty)
    for first in range(tl.program_id(0) * ROWS, N, tl.num_programs(0) * ROWS):
        rows = (first + tl.arange(0, ROWS))[:, None]
        inside = (rows < N) & (columns < C)
        index = tl.cast(rows, tl.int64) * C + columns
        x = wide(tl.load(x_ptr + index, mask=inside, other=0)) + bias
        dy = wide(tl.load(dy_ptr + index, mask=inside, other=0))
        dx = dy * slope(x, TANH)
        tl.store(dx_ptr + index, rounded(dx, dx_ptr.dtype.element_ty), mask=inside)
        sums += dx  # 0 outside, where dy is 0
    total = tl.sum(sums, axis=0)[None, :]
    tl.store(sums_ptr + tl.cast(tl.program_id(0), tl.int64) * C + columns, total, mask=columns < C)


operator = autograd.operator("bias_gelu", forward, backward, Saved, gradients=("x", "bias"))
