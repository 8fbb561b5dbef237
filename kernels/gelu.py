"""GELU, exact or with GPT-2's tanh, element by element; formulas in reference/gelu.py.

Only x is kept: what multiplies it is cheaper computed again than read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels import autograd, launch
from kernels.numerics import rounded, wide

BLOCK, WARPS = 2048, 4  # 16 elements a thread: two 16-byte loads of a 16-bit type are on their way before the first use


class Saved(NamedTuple):
    x: torch.Tensor  # any shape
    approximate: str


def forward(x: torch.Tensor, approximate: str = "none") -> tuple[torch.Tensor, Saved]:
    """x of any shape, approximate "none" or "tanh" -> y like x, saved."""
    launch.check(x=x)
    tanh = is_tanh(approximate)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(x.numel(), BLOCK),)
    launch.launch(forward_kernel, grid, x.contiguous(), y, x.numel(), TANH=tanh, BLOCK=BLOCK, num_warps=WARPS)
    return y, Saved(x, approximate)


def backward(dy: torch.Tensor, saved: Saved) -> torch.Tensor:
    """dy like x -> dx like x."""
    x, tanh = saved.x, is_tanh(saved.approximate)
    launch.check(dy=dy, x=x)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid, arguments = (triton.cdiv(x.numel(), BLOCK),), (dy.contiguous(), x.contiguous(), dx, x.numel())
    launch.launch(backward_kernel, grid, *arguments, TANH=tanh, BLOCK=BLOCK, num_warps=WARPS)
    return dx


def is_tanh(approximate: str) -> bool:
    """Raises ValueError unless it is "none" or "tanh"."""
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate: {approximate!r} is not one of none, tanh")
    return approximate == "tanh"


# The kernels.


@triton.jit
def forward_kernel(
    x_ptr,  # (n,)
    y_ptr,  # (n,)
    n,
    TANH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < n
    x = wide(tl.load(x_ptr + index, mask=inside, other=0))  # (BLOCK,)
    tl.store(y_ptr + index, rounded(x * gate(x, TANH), y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    dy_ptr,  # (n,)
    x_ptr,  # (n,)
    dx_ptr,  # (n,)
    n,
    TANH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < n
    x = wide(tl.load(x_ptr + index, mask=inside, other=0))  # (BLOCK,)
    dy = wide(tl.load(dy_ptr + index, mask=inside, other=0))
    tl.store(dx_ptr + index, rounded(dy * slope(x, TANH), dx_ptr.dtype.element_ty), mask=inside)


# A kernel's constants have to be marked as such, and stand to the right of a tensor for the interpreter.
SQRT_HALF = tl.constexpr(0.5**0.5)
NORMAL_DENSITY_0 = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
C = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)
A = tl.constexpr(0.044715)


@triton.jit
def gate(x, TANH: tl.constexpr):
    """What multiplies x in gelu(x)."""
    if TANH:
        return 1 / (1 + decay(x))
    else:
        return 0.5 * (1 + tl.erf(x * SQRT_HALF))


@triton.jit
def slope(x, TANH: tl.constexpr):
    """gelu'(x)."""
    p = gate(x, TANH)
    if TANH:
        return p * (1 + 2 * p * decay(x) * x * (1 + 3 * x * x * A) * C)
    else:
        return p + x * NORMAL_DENSITY_0 * tl.exp(-0.5 * x * x)


@triton.jit
def decay(x):
    """exp(-2 u), as far as float32 goes."""
    return tl.exp(tl.minimum(-2 * (x + x * x * x * A) * C, 80.0))


operator = autograd.operator("gelu", forward, backward, Saved, gradients=("x",))
