"""Cross entropy of a softmax with integer targets, a row of logits a program; formulas in reference/cross_entropy.py.

forward    one pass over a row, block by block: the running maximum m, and z, the sum of exp(x - m), which shrinks
           whenever m grows (online softmax, Milakov and Gimelshein 2018, algorithm 3)
backward   dx = (exp(x - m) / z - one_hot) dloss / count in a second pass

Logits are read twice and written once. Computed in the forward pass already, the gradient would be written there, and
read and written again to be multiplied by dloss; where the logits need not outlive the forward pass, that is another
matter: linear_cross_entropy.py. How many targets count is counted on the GPU, nothing waits for it. A target out of
range cannot be told to the host without waiting either: it makes the loss and its row of the gradient NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels import autograd, launch
from kernels.numerics import rounded, wide

MAX_BLOCK = 4096  # logits at a time: 16 a thread


class Saved(NamedTuple):
    logits: torch.Tensor  # (..., V)
    targets: torch.Tensor  # (...)
    ignore_index: int
    m: torch.Tensor  # (N,): the largest logit of a row
    z: torch.Tensor  # (N,): the sum of exponentials beside it
    n_counted: torch.Tensor  # (): how many targets count, 1 if none does


def forward(logits: torch.Tensor, targets: torch.Tensor, ignore_index: int = -100) -> tuple[torch.Tensor, Saved]:
    """logits (..., V), targets (...) of integers in [0, V) or ignore_index -> loss, a scalar like the logits, saved.

    With every target ignored the loss is 0 and so is the gradient. Another target out of range makes the loss NaN.
    """
    check_targets(targets, logits)
    launch.check(logits=logits, targets=targets)
    x, target = rows(logits), targets.reshape(-1).contiguous()
    losses, m, z = (torch.empty(len(x), dtype=launch.wide(x.dtype), device=x.device) for _ in range(3))
    arguments = (x, target, losses, m, z, x.stride(0), x.shape[1], ignore_index)
    launch.launch(forward_kernel, (len(x),), *arguments, **block(x.shape[1]))
    n_counted = counted(target, ignore_index)
    return (losses.sum() / n_counted).to(logits.dtype), Saved(logits, targets, ignore_index, m, z, n_counted)


def backward(dloss: torch.Tensor, saved: Saved) -> torch.Tensor:
    """dloss, a scalar -> dlogits (..., V)."""
    logits, targets, ignore_index, m, z, n_counted = saved
    launch.check(logits=logits, targets=targets, dloss=dloss)
    x, target = rows(logits), targets.reshape(-1).contiguous()
    dx = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    tile = block(x.shape[1])
    grid = len(x), triton.cdiv(x.shape[1], tile["BLOCK"])
    arguments = (dloss, x, target, m, z, n_counted, dx, x.stride(0), x.shape[1], ignore_index)
    launch.launch(backward_kernel, grid, *arguments, **tile)
    return dx


def check_targets(targets: torch.Tensor, like: torch.Tensor) -> None:
    """Raises ValueError or TypeError unless there is an integer for each row."""
    if not like.ndim or not like.shape[-1]:
        raise ValueError(f"logits: expected shape (..., V), got {tuple(like.shape)}")
    launch.check_shape("targets", targets, like.shape[:-1])
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"targets: expected int64 or int32, got {str(targets.dtype).removeprefix('torch.')}")


def rows(logits: torch.Tensor) -> torch.Tensor:
    """(N, V), with the entries of a row side by side."""
    x = logits.reshape(-1, logits.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def counted(target: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """How many targets count, on their device; 1 if none does."""
    return (target != ignore_index).sum().clamp(min=1)


def block(V: int) -> dict[str, int]:
    """BLOCK and num_warps for a program that goes through V logits."""
    BLOCK = min(MAX_BLOCK, max(16, launch.power_of_2(V)))
    return {"BLOCK": BLOCK, "num_warps": max(1, BLOCK // 512)}


# The kernels.

LOWEST = tl.constexpr(-3.0e38)  # where a running maximum starts: finite, so that m - m is 0 beside logits of -inf


@triton.jit
def forward_kernel(
    x_ptr,  # (N, V)
    target_ptr,  # (N,)
    loss_ptr,  # (N,), 0 where the target is ignored
    m_ptr,  # (N,)
    z_ptr,  # (N,)
    stride,  # from row to row of x
    V,
    ignore_index,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    x_ptr += tl.cast(row, tl.int64) * stride
    m, z = softmax_statistics(x_ptr, V, V, BLOCK, m_ptr.dtype.element_ty)
    tl.store(m_ptr + row, m)
    tl.store(z_ptr + row, z)
    tl.store(loss_ptr + row, loss_of_row(x_ptr, tl.load(target_ptr + row), m, z, V, ignore_index))


@triton.jit
def backward_kernel(
    dloss_ptr,  # ()
    x_ptr,  # (N, V)
    target_ptr,  # (N,)
    m_ptr,  # (N,)
    z_ptr,  # (N,)
    count_ptr,  # ()
    dx_ptr,  # (N, V)
    stride,  # from row to row of x
    V,
    ignore_index,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m, z, target = tl.load(m_ptr + row), tl.load(z_ptr + row), tl.load(target_ptr + row)
    scale = tl.load(dloss_ptr).to(m.dtype) / tl.load(count_ptr).to(m.dtype)
    x = wide(tl.load(x_ptr + tl.cast(row, tl.int64) * stride + columns, mask=columns < V, other=float("-inf")))
    dx = dlogits(x, columns, target, m, z, V, ignore_index) * scale
    dx_ptr += tl.cast(row, tl.int64) * V
    tl.store(dx_ptr + columns, rounded(dx, dx_ptr.dtype.element_ty), mask=columns < V)


# Steps that linear_cross_entropy.py takes as well.


@triton.jit
def softmax_statistics(x_ptr, V, length, BLOCK: tl.constexpr, dtype: tl.constexpr):
    """m, the largest of V logits, and z, the sum of exp(x - m). `length`, V at least, is how many may be loaded."""
    m = tl.full((), LOWEST, dtype)
    z = tl.zeros((), dtype)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = wide(tl.load(x_ptr + columns, mask=columns < length, other=float("-inf")))  # (BLOCK,)
        x = tl.where(columns < V, x, float("-inf"))
        larger = tl.maximum(m, tl.max(x, axis=0))
        z = z * tl.exp(m - larger) + tl.sum(tl.exp(x - larger), axis=0)
        m = larger
    return m, z


@triton.jit
def loss_of_row(x_ptr, target, m, z, V, ignore_index):
    """log z - (x[target] - m): beside a large m the digits of log z would be lost. NaN for a target out of range."""
    inside = (target >= 0) & (target < V)
    x = tl.load(x_ptr + target, mask=inside, other=0).to(m.dtype)
    loss = tl.where(inside, tl.log(z) - (x - m), float("nan"))
    return tl.where(target == ignore_index, 0.0, loss)


@triton.jit
def dlogits(x, columns, target, m, z, V, ignore_index):
    """softmax(x) - one_hot(target), 0 where the target is ignored, NaN where it is out of range."""
    dx = tl.exp(x - m) / z - tl.where(columns == target, 1.0, 0.0)
    dx = tl.where((target >= 0) & (target < V), dx, float("nan"))
    return tl.where(target == ignore_index, 0.0, dx)


operator = autograd.operator(
    "cross_entropy", forward, backward, Saved, gradients=("logits",), results=("loss",), autocast="float32"
)
