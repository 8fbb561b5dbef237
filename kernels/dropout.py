"""Dropout with a mask that is computed, never stored (philox.py): forward and backward are one kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels import autograd, launch, philox
from kernels.numerics import rounded, wide
from kernels.philox import Noise


class Saved(NamedTuple):
    rate: float
    noise: Noise | None


def forward(x: torch.Tensor, rate: float, noise: Noise | None) -> tuple[torch.Tensor, Saved]:
    """x (..., R, C) or (C,), 0 <= rate < 1, noise (key, first) or None: no dropout -> y like x, saved."""
    return drop(x, rate, noise), Saved(rate, noise)


def backward(dy: torch.Tensor, saved: Saved) -> torch.Tensor:
    """dy (..., R, C) -> dx like dy."""
    return drop(dy, *saved)


def drop(x: torch.Tensor, rate: float, noise: Noise | None) -> torch.Tensor:
    """x m / (1 - rate), m being 1 where an element is kept."""
    launch.check(x=x)
    key, first, threshold, factor = philox.arguments(rate, noise)
    if not rate or noise is None:
        return x.clone()
    x = x.contiguous()
    y = torch.empty_like(x)
    R, C = (1, *x.shape)[-2:]
    rows = x.reshape(-1, C)
    tile = launch.tile(C)
    arguments = (rows, y, len(rows), R, C, key, first, threshold)
    launch.launch(dropout_kernel, launch.tiles(rows, tile), *arguments, FACTOR=factor, **tile)
    return y


# The kernel.


@triton.jit
def dropout_kernel(
    x_ptr,  # (N, C), N a multiple of R
    y_ptr,  # (N, C)
    N,
    R,
    C,
    key: tl.int64,
    first: tl.int64,
    threshold: tl.int32,
    FACTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (rows < N) & (columns < C)
    index = tl.cast(rows, tl.int64) * C + columns
    x = wide(tl.load(x_ptr + index, mask=inside, other=0))  # (ROWS, COLUMNS)
    keep = philox.keep_mask(key, threshold, first + rows // R, rows % R, tl.program_id(1) * COLUMNS, COLUMNS)
    tl.store(y_ptr + index, rounded(tl.where(keep, x * FACTOR, 0), y_ptr.dtype.element_ty), mask=inside)


operator = autograd.operator("dropout", forward, backward, Saved, gradients=("x",))
