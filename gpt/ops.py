"""The sets of operators that the PyTorch model runs on: PyTorch's own. Model code takes a set and never asks which.

The operators have the faces of `reference`'s layers: the same arguments in the same order, without what is saved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from gpt.errors import UserError
from reference import philox


@dataclass(frozen=True)
class Operators:
    """One implementation of each operator that has more than one."""

    name: str
    layer_norm: Callable[..., torch.Tensor]  # x, weight, bias, eps
    gelu: Callable[..., torch.Tensor]  # x, approximate
    attention: Callable[..., torch.Tensor]  # q, k, v, causal, scale, rate, noise
    dropout: Callable[..., torch.Tensor]  # x, rate, noise
    cross_entropy: Callable[..., torch.Tensor]  # logits, targets, ignore_index


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float = 1e-5) -> torch.Tensor:
    """x (..., C), weight (C,), bias (C,) or None -> (..., C)."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def gelu(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """x (...), approximate "none" or "tanh" -> like x."""
    return F.gelu(x, approximate=approximate)


def dropout(x: torch.Tensor, rate: float, noise: Any) -> torch.Tensor:
    """x (..., R, C), noise as in reference.dropout -> like x."""
    if not rate or noise is None:
        return x
    return x * _keep(x, rate, noise) * (1 / (1 - rate))


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool = True,
    scale: float | None = None,
    rate: float = 0.0,
    noise: Any = None,
) -> torch.Tensor:
    """q (B, H, T, D), k and v (B, G, S, D) -> (B, H, T, D), as reference.attention."""
    T, S, grouped = q.shape[2], k.shape[2], k.shape[1] != q.shape[1]
    if not (rate and noise is not None) and (T == S or not causal):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)
    if grouped:  # what follows is written out because PyTorch's operator takes no mask of what dropout keeps
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    seen = torch.ones(T, S, dtype=torch.bool, device=q.device)
    if causal:
        seen = seen.tril(S - T)
    scores = scores.masked_fill(~seen, -torch.inf)
    p = torch.softmax(scores, dim=-1).masked_fill(~seen.any(-1, keepdim=True), 0)  # a query that sees no key gives 0
    return dropout(p, rate, noise) @ v


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """logits (..., V), targets (...) -> mean over counted targets, 0 if none counts."""
    total = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=ignore_index, reduction="sum")
    return total / (targets != ignore_index).sum().clamp(min=1)


def _keep(x: torch.Tensor, rate: float, noise: Any) -> torch.Tensor:
    return torch.from_numpy(philox.keep_mask(noise, tuple(x.shape), rate)).to(x.device)


TORCH = Operators("torch", layer_norm, gelu, attention, dropout, cross_entropy)


def choose(name: str = "auto") -> Operators:
    """The set of this name; "auto" picks the fastest that runs here."""
    if name in ("auto", "torch"):
        return TORCH
    raise UserError(f"operators: {name!r} is not one of auto, torch")
