"""Who the kernels are timed against: for each operator, functions with its arguments, by name.

A peer that cannot run is not an error: it is listed with its reason.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from gpt import ops

OURS = "twingrad"


def peers(layer: str, kernel: Callable[..., Any] | None = None) -> dict[str, Callable[..., Any]]:
    """Ours first, then PyTorch's, then others'; `kernel`, somebody's own function, as "yours"."""
    found = {OURS: importlib.import_module(f"kernels.{layer}").operator}
    if kernel is not None:
        found["yours"] = kernel
    if layer == "attention":
        return found | {name: _sdpa(name) for name in BACKENDS}
    # Ours draw the bits that NumPy draws; PyTorch's own dropout draws others, which is as much work.
    eager = _dropout if layer == "dropout" else getattr(ops, layer)
    found |= {"torch": eager, "torch.compile": torch.compile(eager, dynamic=False)}
    if layer in _LIGER:
        found["liger"] = _LIGER[layer]
    return found


def _dropout(x: torch.Tensor, rate: float, noise: Any) -> torch.Tensor:
    return torch.nn.functional.dropout(x, rate)


# PyTorch's implementations of attention, asked for by name: by itself it takes the first that can.
BACKENDS = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}


def _sdpa(name: str) -> Callable[..., Any]:
    backend = getattr(torch.nn.attention.SDPBackend, BACKENDS[name])

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
        with torch.nn.attention.sdpa_kernel([backend]):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return attention


def _liger(name: str, *arguments: Any, **named: Any) -> Any:
    function = getattr(importlib.import_module("liger_kernel.transformers.functional"), name)
    found = function(*arguments, **named)
    return found[0] if isinstance(found, tuple) else found


_LIGER: dict[str, Callable[..., Any]] = {
    "layer_norm": lambda x, weight, bias, eps: _liger("liger_layer_norm", x, weight, bias, eps),
    "cross_entropy": lambda logits, targets: _liger("liger_cross_entropy", logits, targets),
    "linear_cross_entropy": lambda x, weight, bias, targets: _liger(
        "liger_fused_linear_cross_entropy", x, weight, targets, bias
    ),
}
