"""Residual addition and layer normalization in one pass over the rows; the kernels are those of layer_norm.py.

x and residual may differ in type, as where a float32 shortcut meets a branch in bfloat16: results have the wider one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kernels import autograd, launch, layer_norm


class Saved(NamedTuple):
    total: torch.Tensor  # (..., C)
    weight: torch.Tensor  # (C,)
    bias: torch.Tensor | None
    mean: torch.Tensor  # (N,), a row each
    rstd: torch.Tensor  # (N,)


def forward(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float = 1e-5
) -> tuple[tuple[torch.Tensor, torch.Tensor], Saved]:
    """x and residual (..., C), weight (C,), bias (C,) or None -> (y, total) like x, saved. C is 16,384 at most."""
    launch.check_shape("residual", residual, x.shape)
    y, total, mean, rstd = layer_norm.normalize(x, residual, weight, bias, eps)
    assert total is not None
    return (y, total), Saved(total, weight, bias, mean, rstd)


def backward(
    dresults: tuple[torch.Tensor, torch.Tensor], saved: Saved
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(dy, dtotal) like x -> dx and dresidual, which are one tensor, dweight (C,), dbias (C,) or None."""
    dy, dtotal = dresults
    dx, dweight, dbias = layer_norm.normalize_backward(dy, dtotal, *saved)
    return dx, dx, dweight, dbias


operator = autograd.operator(
    "add_layer_norm",
    forward,
    backward,
    Saved,
    gradients=("x", "residual", "weight", "bias"),
    results=("y", "total"),
    same={"residual": "x"},
    autocast="float32",
)
