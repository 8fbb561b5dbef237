"""Residual addition and root-mean-square normalization in one pass over the rows; the kernels are those of rms_norm.py.

x and residual may differ in type, as where a float32 shortcut meets a branch in bfloat16: results have the wider one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kernels import autograd, launch, rms_norm


class Saved(NamedTuple):
    total: torch.Tensor  # (..., C)
    weight: torch.Tensor  # (C,)
    rstd: torch.Tensor  # (N,), a row each


def forward(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6
) -> tuple[tuple[torch.Tensor, torch.Tensor], Saved]:
    """x and residual (..., C), weight (C,) -> (y, total) like x, saved. C is 16,384 at most."""
    launch.check_shape("residual", residual, x.shape)
    y, total, rstd = rms_norm.normalize(x, residual, weight, eps)
    assert total is not None
    return (y, total), Saved(total, weight, rstd)


def backward(
    dresults: tuple[torch.Tensor, torch.Tensor], saved: Saved
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dy, dtotal) like x -> dx and dresidual, which are one tensor, dweight (C,)."""
    dy, dtotal = dresults
    dx, dweight = rms_norm.normalize_backward(dy, dtotal, *saved)
    return dx, dx, dweight


operator = autograd.operator(
    "add_rms_norm",
    forward,
    backward,
    Saved,
    gradients=("x", "residual", "weight"),
    results=("y", "total"),
    same={"residual": "x"},
    autocast="float32",
)
