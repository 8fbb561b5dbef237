"""Who the kernels are timed against: for each operator, functions with all its twin's arguments, by name.

A peer that cannot run is not an error: it is listed with its reason.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch

from gpt import ops

OURS = "twingrad"
OWN_BITS = ("dropout",)  # operators whose peers draw random bits of their own, so that results cannot be compared

Function = Callable[..., Any]


def peers(layer: str, kernel: Function | None = None) -> dict[str, Function]:
    """Ours first, then `kernel`, somebody's own function, as "yours", then PyTorch's, then others'."""
    found: dict[str, Function] = {OURS: importlib.import_module(f"kernels.{layer}").operator}
    if kernel is not None:
        found["yours"] = kernel
    if layer == "attention":
        return found | {name: partial(_attention, backend) for name, backend in BACKENDS.items()}
    eager = PLAIN.get(layer) or getattr(ops, layer)
    # Compiled afresh for each size: a function that has met eight of them is run eagerly, without an error.
    torch.compiler.reset()
    found |= {"torch": eager, "torch.compile": torch.compile(eager, dynamic=False, fullgraph=True)}
    if layer in LIGER and importlib.util.find_spec("liger_kernel"):
        found["liger"] = LIGER[layer]
    return found


def missing() -> dict[str, str]:
    """Peers that are not installed, and what is needed."""
    return {} if importlib.util.find_spec("liger_kernel") else {"liger": "liger-kernel is not installed"}


def _dropout(x: torch.Tensor, rate: float, noise: Any) -> torch.Tensor:
    """PyTorch's own, which draws other bits than `noise` says, and as many."""
    return torch.nn.functional.dropout(x, rate)


def _head_and_loss(x: torch.Tensor, weight: torch.Tensor, bias: Any, targets: torch.Tensor, ignore: int) -> Any:
    """All logits at once, as people write it; ours on PyTorch goes on in chunks where there are many."""
    return ops.cross_entropy(torch.nn.functional.linear(x, weight, bias), targets, ignore)


# Operators whose peer is not what gpt/ops.py has.
PLAIN: dict[str, Function] = {"dropout": _dropout, "linear_cross_entropy": _head_and_loss}

# PyTorch's implementations of attention, asked for by name: left alone, it takes the first that can.
BACKENDS = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}


def _attention(
    backend: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float | None, *without: Any
) -> torch.Tensor:
    with torch.nn.attention.sdpa_kernel([getattr(torch.nn.attention.SDPBackend, backend)]):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)


def _liger(name: str, *arguments: Any) -> Any:
    return getattr(importlib.import_module("liger_kernel.transformers.functional"), name)(*arguments)


def _liger_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """It turns queries and keys at once, in place: of keys there is one head here."""
    if interleaved:
        raise NotImplementedError("Liger turns pairs of halves alone")
    return _liger("liger_rope", x, x[:, :1].detach(), _twice(cos), _twice(sin))[0]


@lru_cache(maxsize=4)
def _twice(table: torch.Tensor) -> torch.Tensor:
    """(T, D / 2) -> (1, T, D), as Liger has its tables. Made once, being no part of what is timed."""
    return torch.cat([table, table], dim=-1)[None]


LIGER: dict[str, Function] = {
    "layer_norm": partial(_liger, "liger_layer_norm"),
    "rms_norm": partial(_liger, "liger_rms_norm"),
    "add_rms_norm": partial(_liger, "liger_fused_add_rms_norm"),
    "rope": _liger_rope,
    "swiglu": partial(_liger, "liger_swiglu"),
    "cross_entropy": lambda logits, targets, ignore_index: _liger(
        "liger_cross_entropy", logits, targets, None, None, ignore_index
    ),
    "linear_cross_entropy": lambda x, weight, bias, targets, ignore_index: _liger(
        "liger_fused_linear_cross_entropy", x, weight, targets, bias, None, ignore_index
    ),
}
