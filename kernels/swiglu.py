"""SwiGLU without its projections, element by element; formulas in reference/swiglu.py.

Only gate and up are kept: the sigmoid is cheaper computed again than read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels import autograd, launch
from kernels.numerics import rounded, wide

BLOCK, WARPS = 2048, 4  # 16 elements a thread, as in gelu.py


class Saved(NamedTuple):
    gate: torch.Tensor  # any shape
    up: torch.Tensor  # like gate


def forward(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, Saved]:
    """gate and up of one shape, any -> y like gate, saved."""
    launch.check(gate=gate, up=up)
    launch.check_shape("up", up, gate.shape)
    y = torch.empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype), device=gate.device)
    grid, arguments = (triton.cdiv(y.numel(), BLOCK),), (gate.contiguous(), up.contiguous(), y, y.numel())
    launch.launch(forward_kernel, grid, *arguments, BLOCK=BLOCK, num_warps=WARPS)
    return y, Saved(gate, up)


def backward(dy: torch.Tensor, saved: Saved) -> tuple[torch.Tensor, torch.Tensor]:
    """dy like gate -> dgate like gate, dup like up."""
    gate, up = saved
    launch.check(dy=dy, gate=gate, up=up)
    dgate, dup = (torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in saved)
    inputs = (tensor.contiguous() for tensor in (dy, gate, up))
    grid = (triton.cdiv(dy.numel(), BLOCK),)
    launch.launch(backward_kernel, grid, *inputs, dgate, dup, dy.numel(), BLOCK=BLOCK, num_warps=WARPS)
    return dgate, dup


# The kernels.


@triton.jit
def forward_kernel(
    gate_ptr,  # (n,)
    up_ptr,  # (n,)
    y_ptr,  # (n,)
    n,
    BLOCK: tl.constexpr,
):
    index = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < n
    gate = wide(tl.load(gate_ptr + index, mask=inside, other=0))  # (BLOCK,)
    up = wide(tl.load(up_ptr + index, mask=inside, other=0))
    tl.store(y_ptr + index, rounded(gate * sigmoid(gate) * up, y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    dy_ptr,  # (n,)
    gate_ptr,  # (n,)
    up_ptr,  # (n,)
    dgate_ptr,  # (n,)
    dup_ptr,  # (n,)
    n,
    BLOCK: tl.constexpr,
):
    index = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < n
    gate = wide(tl.load(gate_ptr + index, mask=inside, other=0))  # (BLOCK,)
    up = wide(tl.load(up_ptr + index, mask=inside, other=0))
    dy = wide(tl.load(dy_ptr + index, mask=inside, other=0))
    s = sigmoid(gate)
    silu = gate * s
    dgate = dy * up * s * (1 + (gate - silu))  # in this order: beside a large gate 1 would be lost
    tl.store(dgate_ptr + index, rounded(dgate, dgate_ptr.dtype.element_ty), mask=inside)
    tl.store(dup_ptr + index, rounded(dy * silu, dup_ptr.dtype.element_ty), mask=inside)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), as far as float32 goes."""
    return 1 / (1 + tl.exp(tl.minimum(-x, 80.0)))


operator = autograd.operator("swiglu", forward, backward, Saved, gradients=("gate", "up"))
