"""The sets of operators that the PyTorch model runs on: PyTorch's own, and the kernels. Model code never asks which.

The operators have the faces of `reference`'s layers: the same arguments in the same order, without what is saved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from gpt.errors import UserError, require
from reference import philox

FEW_ROWS = 8


@dataclass(frozen=True)
class Operators:
    """One implementation of each operator that has more than one."""

    name: str
    layer_norm: Callable[..., torch.Tensor]  # x, weight, bias, eps
    add_layer_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]]  # x, residual, weight, bias, eps
    gelu: Callable[..., torch.Tensor]  # x, approximate
    attention: Callable[..., torch.Tensor]  # q, k, v, causal, scale, rate, noise
    cached_attention: Callable[..., torch.Tensor]  # q, k, v, starts, scale
    dropout: Callable[..., torch.Tensor]  # x, rate, noise
    cross_entropy: Callable[..., torch.Tensor]  # logits, targets, ignore_index
    linear_cross_entropy: Callable[..., torch.Tensor]  # x, weight, bias, targets, ignore_index
    rms_norm: Callable[..., torch.Tensor]  # x, weight, eps
    add_rms_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]]  # x, residual, weight, eps
    rope: Callable[..., torch.Tensor]  # x, cos, sin, interleaved
    swiglu: Callable[..., torch.Tensor]  # gate, up


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., I), weight (O, I), bias (O,) or None -> (..., O).

    A few rows on a CPU, as while a text is generated, take the time that reading the weight takes. PyTorch leaves that
    to one thread; here each thread reads its part of the weight, which is two to three times as fast on two.
    """
    rows = x.numel() // x.shape[-1]
    parts = torch.get_num_threads()
    if x.device.type != "cpu" or torch.is_grad_enabled() or not 0 < rows <= FEW_ROWS or parts == 1:
        return F.linear(x, weight, bias)
    O, I = weight.shape  # noqa: E741
    split = O // parts * parts
    columns = x.reshape(rows, I).t()  # (I, rows)
    y = torch.bmm(weight[:split].view(parts, -1, I), columns.expand(parts, I, rows)).view(split, rows)
    if split < O:
        y = torch.cat([y, weight[split:] @ columns])
    y = y.t().reshape(*x.shape[:-1], O)
    return y if bias is None else y + bias.to(y.dtype)  # autocast multiplies in its type, and leaves sums alone


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float = 1e-5) -> torch.Tensor:
    """x (..., C), weight (C,), bias (C,) or None -> (..., C)."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float = 1e-5
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and residual (..., C), weight (C,), bias (C,) or None -> (y, total) like x."""
    total = x + residual
    return layer_norm(total, weight, bias, eps), total


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """x (..., C), weight (C,) -> (..., C)."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and residual (..., C), weight (C,) -> (y, total) like x."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """x (B, H, T, D), cos and sin (T, D / 2) or (B, T, D / 2) -> like x, as reference.rope."""
    if cos.ndim == 3:
        cos, sin = cos[:, None], sin[:, None]  # (B, 1, T, D / 2)
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    turned = first * cos - second * sin, first * sin + second * cos
    y = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return y.to(x.dtype)


def gelu(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """x (...), approximate "none" or "tanh" -> like x."""
    return F.gelu(x, approximate=approximate)


def bias_gelu(x: torch.Tensor, bias: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """x (..., C), bias (C,), approximate "none" or "tanh" -> like x."""
    return gelu(x + bias, approximate)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gate and up of one shape -> like them."""
    return F.silu(gate) * up


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


def cached_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """q (B, H, T, D), k and v (B, G, S, D), starts (B,) -> (B, H, T, D), as reference.cached_attention."""
    T, S, grouped = q.shape[2], k.shape[2], k.shape[1] != q.shape[1]
    own = starts[:, None] + torch.arange(T, device=q.device)
    seen = torch.arange(S, device=q.device) <= own[..., None]  # (B, T, S)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], scale=scale, enable_gqa=grouped)


def lora(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, rate: float = 0.0, noise: Any = None
) -> torch.Tensor:
    """x (..., I), a (r, I), b (O, r) -> (..., O), as reference.lora."""
    return F.linear(F.linear(dropout(x, rate, noise), a) * scale, b)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """logits (..., V), targets (...) -> mean over counted targets, 0 if none counts."""
    total = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=ignore_index, reduction="sum")
    return total / (targets != ignore_index).sum().clamp(min=1)


def linear_cross_entropy(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, ignore_index: int = -100
) -> torch.Tensor:
    """x (..., C), weight (V, C), bias (V,) or None, targets (...) -> `cross_entropy` of the projection of x."""
    return cross_entropy(F.linear(x, weight, bias), targets, ignore_index)


def token_logps(logits: torch.Tensor, targets: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """logits (..., V), targets (...) -> log-probability of each target, 0 where it does not count."""
    losses = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=ignore_index, reduction="none")
    return -losses.view(targets.shape)


def dpo(
    chosen: torch.Tensor, rejected: torch.Tensor, chosen0: torch.Tensor, rejected0: torch.Tensor, beta: float = 0.1
) -> torch.Tensor:
    """Log-probabilities of answers, (P,) each -> loss, as reference.dpo."""
    return -F.logsigmoid(beta * ((chosen - chosen0) - (rejected - rejected0))).mean()  # F.softplus gives up at 20


def orpo(chosen: torch.Tensor, rejected: torch.Tensor, beta: float = 0.1) -> torch.Tensor:
    """Mean log-probabilities of a token of answers, (P,) each -> loss, as reference.orpo.

    What autograd makes of log(1 - e^a) is infinity times 0 where an answer is nearly sure, so its gradient is given, as
    the loss of a linear function that has this gradient, and the value beside it.
    """
    a, b = chosen.detach(), rejected.detach()
    qa, qb = ((-torch.expm1(x)).clamp(min=torch.finfo(x.dtype).tiny) for x in (a, b))
    r = torch.exp(a - b)
    value = -beta * F.logsigmoid((a - b) - (qa.log() - qb.log())) - a
    da, db = -1 - beta / (qa + r * qb), beta / (1 + r * (qb / qa)) / qb
    return (value + da * (chosen - a) + db * (rejected - b)).mean()


def _keep(x: torch.Tensor, rate: float, noise: Any) -> torch.Tensor:
    return torch.from_numpy(philox.keep_mask(noise, tuple(x.shape), rate)).to(x.device)


TORCH = Operators(
    name="torch",
    layer_norm=layer_norm,
    add_layer_norm=add_layer_norm,
    gelu=gelu,
    attention=attention,
    cached_attention=cached_attention,
    dropout=dropout,
    cross_entropy=cross_entropy,
    linear_cross_entropy=linear_cross_entropy,
    rms_norm=rms_norm,
    add_rms_norm=add_rms_norm,
    rope=rope,
    swiglu=swiglu,
)


def choose(name: str | Operators = "auto", device: str | torch.device | None = None) -> Operators:
    """The set of this name, "torch" or "triton", for a model on this device; "auto" is torch. A set is taken as it is.

    UserError for an unknown name, and where kernels cannot run.
    """
    if isinstance(name, Operators):
        return name
    if name in ("auto", "torch"):
        return TORCH
    if name != "triton":
        raise UserError(f"operators: {name!r} is not one of auto, torch, triton")
    require("triton", extra="torch")
    from kernels.numerics import INTERPRETED

    device = torch.device(device or "cpu")
    if device.type != "cuda" and not INTERPRETED.value:
        raise UserError(
            f"operators: the kernels need a CUDA GPU, the device is {device.type}; "
            "with TRITON_INTERPRET=1 in the environment they run on the CPU, slowly, to be checked"
        )
    return _triton()


def _triton() -> Operators:
    from kernels import (
        add_layer_norm,
        add_rms_norm,
        attention,
        cached_attention,
        cross_entropy,
        dropout,
        gelu,
        layer_norm,
        linear_cross_entropy,
        rms_norm,
        rope,
        swiglu,
    )

    return Operators(
        name="triton",
        layer_norm=layer_norm.operator,
        add_layer_norm=add_layer_norm.operator,
        gelu=gelu.operator,
        attention=partial(_with_counters, attention.operator),
        cached_attention=cached_attention.operator,
        dropout=partial(_with_counters, dropout.operator),
        cross_entropy=cross_entropy.operator,
        linear_cross_entropy=linear_cross_entropy.operator,
        rms_norm=rms_norm.operator,
        add_rms_norm=add_rms_norm.operator,
        rope=rope.operator,
        swiglu=swiglu.operator,
    )


def _with_counters(operator: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
    """An operator whose last argument is noise, which to a kernel is a counter, never a mask."""
    if isinstance(arguments[-1], np.ndarray):
        raise UserError("dropout: the kernels compute their masks from counters; choose dropout_source philox")
    return operator(*arguments)


def separate(operators: Operators) -> Operators:
    """The same set with what it fuses done one by one, so that every tensor and its gradient can be looked at."""

    def added(norm: Callable[..., torch.Tensor]) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
        def add_norm(x: torch.Tensor, residual: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
            total = x + residual
            return norm(total, *rest), total

        return add_norm

    return dataclasses.replace(
        operators, add_layer_norm=added(operators.layer_norm), add_rms_norm=added(operators.rms_norm)
    )
