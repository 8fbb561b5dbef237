"""The sets of operators that the PyTorch model runs on: PyTorch's own, and the kernels. Model code never asks which.

The operators have the faces of `reference`'s layers: the same arguments in the same order, without what is saved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from gpt.errors import UserError, require
from reference import philox
from reference.config import GPTConfig
from reference.lora import SITES

FEW_ROWS = 8
# 256 MiB in float32. While gradients are computed there are three arrays of logits: beyond this, most of the memory.
LOGITS = 2**26


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
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling() or not 0 < rows <= FEW_ROWS:
        return F.linear(x, weight, bias)
    parts = torch.get_num_threads()
    if parts == 1:
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
    """x (..., C), weight (V, C), bias (V,) or None, targets (...) -> `cross_entropy` of the projection of x.

    Where there would be many logits (N, V), some rows at a time: what is kept of them all is dx (N, C) and dweight
    (V, C). While logits are few, or no more than dweight has numbers, the plain product takes less time and memory.
    """
    N, (V, C) = targets.numel(), weight.shape
    if N * V <= LOGITS or N <= C:
        return cross_entropy(F.linear(x, weight, bias), targets, ignore_index)
    return chunked_cross_entropy(x, weight, bias, targets, ignore_index)


def chunked_cross_entropy(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, ignore_index: int = -100
) -> torch.Tensor:
    """`linear_cross_entropy` some rows at a time, formulas in reference/linear_cross_entropy.py.

    The gradients that are wanted are computed in the forward pass, and multiplied by dloss / count in the backward
    pass. Under autocast the factors of products are of its type, and all sums float32. There is no second derivative.
    """
    device = x.device.type
    lower = device != "meta" and torch.is_autocast_enabled(device)  # meta: which has no autocast
    dtype = torch.get_autocast_dtype(device) if lower and x.dtype != torch.float64 else x.dtype  # as autocast itself
    graph = torch.is_grad_enabled()
    wanted = [graph and tensor is not None and tensor.requires_grad for tensor in (x, weight, bias)]
    return _chunked_cross_entropy(x, weight, bias, targets, ignore_index, dtype, wanted)[0]


@torch.library.custom_op("twingrad::chunked_cross_entropy", mutates_args=())
def _chunked_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    ignore_index: int,
    dtype: torch.dtype,
    wanted: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """loss, then dx (N, C), dweight, dbias, each empty if not `wanted`, and what they are to be divided by."""
    rows, target = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    wide = torch.promote_types(dtype, torch.float32)
    dx, dweight, dbias = _room(x, weight, wide, wanted)
    # A probability of one in 50,257 is less than float16 resolves; what is at most 1 has room above.
    lift = 2.0**15 if dtype == torch.float16 else 1.0
    loss, factors = x.new_zeros((), dtype=wide), weight.to(dtype)
    chunk = rows_at_a_time(len(rows), len(weight))
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, len(rows), chunk):
            part = slice(start, start + chunk)
            ignored = (target[part] == ignore_index)[:, None]  # (n, 1)
            here = rows[part].to(dtype).masked_fill(ignored, 0)
            logits = _product(here, factors.t())
            if bias is not None:
                logits += bias
            log_p = torch.log_softmax(logits, dim=-1)
            del logits
            own = target[part, None].masked_fill(ignored, 0)
            loss -= log_p.gather(1, own).masked_fill(ignored, 0).sum()
            if not any(wanted):
                continue
            dlogits = log_p.exp_().scatter_add_(1, own, log_p.new_full((), -1).expand(own.shape)).mul_(lift)
            del log_p
            if wanted[2]:
                dbias += dlogits.masked_fill_(ignored, 0).sum(dim=0)
            dlogits = dlogits.to(dtype)
            if wanted[0]:
                dx[part] = _product(dlogits, factors).masked_fill_(ignored, 0)
            if wanted[1]:  # nothing of a row that is ignored, for it is 0 in `here`
                _add_product(dweight, dlogits.t(), here)
            del dlogits
    count = (target != ignore_index).sum().clamp(min=1).to(wide)
    return loss / count, dx, dweight, dbias, count * lift


@_chunked_cross_entropy.register_fake
def _chunked_shapes(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    ignore_index: int,
    dtype: torch.dtype,
    wanted: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    wide = torch.promote_types(dtype, torch.float32)
    return x.new_empty((), dtype=wide), *_room(x, weight, wide, wanted), x.new_empty((), dtype=wide)


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weight, bias, *_, wanted = inputs
    ctx.save_for_backward(*output[1:])
    ctx.like = [(t.shape, t.dtype) if wants else None for t, wants in zip((x, weight, bias), wanted, strict=True)]


def _times_upstream(ctx: Any, dloss: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    *gradients, divisor = ctx.saved_tensors
    factor = dloss / divisor
    found = [like and (g * factor).to(like[1]).view(like[0]) for g, like in zip(gradients, ctx.like, strict=True)]
    return *found, None, None, None, None


_chunked_cross_entropy.register_autograd(_times_upstream, setup_context=_keep_gradients)


def rows_at_a_time(N: int, V: int) -> int:
    """About LOGITS // V, a quarter of the rows at most, rounded up to a multiple of 64."""
    return -(-max(1, min(LOGITS // V, -(-N // 4))) // 64) * 64


def _room(x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype, wanted: Sequence[bool]) -> list[torch.Tensor]:
    """Zeros for the gradients that are wanted of x, as rows, weight and bias."""
    V, C = weight.shape
    shapes: list[tuple[int, ...]] = [(x.numel() // C, C), (V, C), (V,)]
    return [x.new_zeros(shape if wants else (0,), dtype=dtype) for shape, wants in zip(shapes, wanted, strict=True)]


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b; of factors of 16 bits in float32, for a sum over many rows is more than float16 holds."""
    if a.dtype.itemsize > 2:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a b, where it can be without another array of that size."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += _product(a, b)


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
    if not isinstance(noise, torch.Tensor):
        return torch.from_numpy(philox.keep_mask(noise, tuple(x.shape), rate)).to(x.device)
    return noise.to(x.device) if noise.dtype == torch.bool else _mask(noise, x.shape, rate, x.device)


@torch.library.custom_op("twingrad::keep_mask", mutates_args=())
def _mask(words: torch.Tensor, shape: Sequence[int], rate: float, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(philox.keep_mask(counters(words), tuple(shape), rate)).to(device)


@_mask.register_fake
def _mask_shape(words: torch.Tensor, shape: Sequence[int], rate: float, device: torch.device) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bool, device=device)


class CompiledNoise:
    """Noise as a compiled model takes it, as tensors: numbers that change with each step would be compiled in.

    Counters (reference/philox.py) are computed before, their words signed. Any other noise is asked when it is its
    turn, outside of what is compiled.
    """

    def __init__(self, noise: Any, config: GPTConfig) -> None:
        self.noise = self.words = None
        if not isinstance(noise, philox.PhiloxNoise):
            self.noise = noise
            return
        rates = {philox.EMBEDDING: config.emb_dropout, philox.ATTENTION: config.attn_dropout}
        rates |= dict.fromkeys((philox.ATTENTION_SHORTCUT, philox.MLP_SHORTCUT), config.shortcut_dropout)
        rates |= dict.fromkeys(SITES.values(), config.lora.dropout if config.lora else 0.0)
        self.words = torch.zeros(config.n_layers, max(rates) + 1, 2, dtype=torch.int64)
        for site in (site for site, rate in rates.items() if rate):
            shape = (1, config.n_heads, 1, 1) if site == philox.ATTENTION else (1, 1, 1)  # which say where to begin
            for layer in range(config.n_layers):
                both = np.array(noise(layer, site, shape, rates[site]), np.uint64)
                self.words[layer, site] = torch.from_numpy(both.view(np.int64))

    def __call__(self, layer: int, site: int, shape: tuple[int, ...], rate: float) -> torch.Tensor:
        """The two words (2,) int64, or the mask, bool of `shape`."""
        return _asked(self.noise, layer, site, shape, rate) if self.words is None else self.words[layer, site]


@torch.compiler.disable
def _asked(noise: Any, layer: int, site: int, shape: tuple[int, ...], rate: float) -> torch.Tensor:
    found = noise(layer, site, shape, rate)
    return torch.from_numpy(
        np.asarray(found) if isinstance(found, np.ndarray) else np.array(found, np.uint64).view(np.int64)
    )


def counters(words: torch.Tensor) -> tuple[int, int]:
    """The key and the first index of a `CompiledNoise`."""
    key, first = words.cpu().numpy().view(np.uint64).tolist()
    return key, first


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
    noise = arguments[-1]
    if isinstance(noise, torch.Tensor) and noise.dtype != torch.bool:
        return _with_words(operator, *arguments)
    if isinstance(noise, np.ndarray | torch.Tensor):
        raise UserError("dropout: the kernels compute their masks from counters; choose dropout_source philox")
    return operator(*arguments)


@torch.compiler.disable
def _with_words(operator: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
    return operator(*arguments[:-1], counters(arguments[-1]))


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
