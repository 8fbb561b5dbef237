"""Output projection and cross entropy in one, some rows at a time; formulas in reference/linear_cross_entropy.py.

The matrix products are cuBLAS's, between them a kernel turns a chunk's logits into their gradient, in place. What is
left of N x V numbers is one chunk of them, and the sum of dweight, in float32 over all chunks.

Gradients are computed in the forward pass, wanted or not, and multiplied by dloss / count only in the backward pass:
before, with a count of thousands, they would fall below what float16 can hold, out of a gradient scaler's reach.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels import autograd, launch
from kernels.cross_entropy import block, check_targets, counted, dlogits, loss_of_row, softmax_statistics
from kernels.numerics import rounded, wide

LOGITS = 2**26  # at a time, about: 128 MiB of them in 16 bits, enough work for every multiprocessor


class Saved(NamedTuple):
    x: torch.Tensor  # (..., C)
    weight: torch.Tensor  # (V, C)
    bias: torch.Tensor | None
    dx: torch.Tensor  # (N, C); all three without the factor dloss / count
    dweight: torch.Tensor  # (V, C)
    dbias: torch.Tensor  # (V,)
    n_counted: torch.Tensor  # (): how many targets count, 1 if none does


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    ignore_index: int = -100,
) -> tuple[torch.Tensor, Saved]:
    """x (..., C), weight (V, C), bias (V,) or None, targets (...) as in cross_entropy.py -> loss, a scalar, saved.

    The loss is of the type that kernels compute in: float32.
    """
    check_targets(targets, x)
    launch.check(x=x, weight=weight, bias=bias, targets=targets)
    V, C = weight.shape
    launch.check_shape("weight", weight, (V, x.shape[-1]))
    if bias is not None:
        launch.check_shape("bias", bias, (V,))
    rows, target = x.reshape(-1, C), targets.reshape(-1).contiguous()
    chunk = rows_at_a_time(len(rows), V)
    # A row of logits takes a multiple of 16 entries, whatever V is, to be read and written 16 bytes at a time.
    buffer = torch.empty((chunk, triton.cdiv(V, 16) * 16), dtype=x.dtype, device=x.device)
    losses = torch.empty(len(rows), dtype=launch.wide(x.dtype), device=x.device)
    dx = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    dweight = torch.zeros((V, C), dtype=losses.dtype, device=x.device)
    dbias = torch.zeros(V, dtype=losses.dtype, device=x.device)
    for start in range(0, len(rows), chunk):
        part = slice(start, min(start + chunk, len(rows)))
        logits = buffer[: part.stop - start, :V]
        torch.mm(rows[part], weight.T, out=logits)
        if bias is not None:
            logits += bias
        arguments = (logits, target[part], losses[part], logits.stride(0), V, ignore_index)
        launch.launch(in_place_kernel, (len(logits),), *arguments, **block(V))
        torch.mm(logits, weight, out=dx[part])
        _add_product(dweight, logits.T, rows[part])
        if bias is not None:
            dbias += logits.sum(0, dtype=dbias.dtype)
    n_counted = counted(target, ignore_index)
    return losses.sum() / n_counted, Saved(x, weight, bias, dx, dweight, dbias, n_counted)


def backward(dloss: torch.Tensor, saved: Saved) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """dloss, a scalar -> dx (..., C), dweight (V, C), dbias (V,) or None."""
    x, weight, bias, dx, dweight, dbias, n_counted = saved
    factor = dloss.to(dweight.dtype) / n_counted
    return (
        (dx * factor).to(x.dtype).reshape(x.shape),
        (dweight * factor).to(weight.dtype),
        None if bias is None else (dbias * factor).to(bias.dtype),
    )


def rows_at_a_time(N: int, V: int) -> int:
    """About LOGITS // V, a quarter of the rows at most, rounded up to a multiple of 64."""
    return triton.cdiv(max(1, min(LOGITS // V, triton.cdiv(N, 4))), 64) * 64


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a b; of factors of 16 bits in float32, for a sum over many rows is more than float16 holds."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.is_cpu:
        total += a.to(total.dtype) @ b.to(total.dtype)
    else:
        total += torch.mm(a, b, out_dtype=total.dtype)


# The kernel.


@triton.jit
def in_place_kernel(
    x_ptr,  # (N, length), V of it used: logits, then their gradient
    target_ptr,  # (N,)
    loss_ptr,  # (N,)
    length,  # of a row
    V,
    ignore_index,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    x_ptr += tl.cast(row, tl.int64) * length
    m, z = softmax_statistics(x_ptr, V, length, BLOCK, loss_ptr.dtype.element_ty)
    target = tl.load(target_ptr + row)
    tl.store(loss_ptr + row, loss_of_row(x_ptr, target, m, z, V, ignore_index))
    tl.debug_barrier()  # all threads have read the target's logit before one of them overwrites it
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = wide(tl.load(x_ptr + columns, mask=columns < length, other=float("-inf")))  # (BLOCK,)
        x = tl.where(columns < V, x, float("-inf"))
        dx = dlogits(x, columns, target, m, z, V, ignore_index)
        tl.store(x_ptr + columns, rounded(dx, x_ptr.dtype.element_ty), mask=columns < length)


operator = autograd.operator(
    "linear_cross_entropy",
    forward,
    backward,
    Saved,
    gradients=("x", "weight", "bias"),
    results=("loss",),
    autocast="lower",
)
