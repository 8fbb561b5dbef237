"""A peer for training steps: GPT-2 and the loop around it in plain PyTorch, as people write them in one file.

No trainer, no configuration, no operators of ours: nn.Linear, nn.LayerNorm, scaled_dot_product_attention, AdamW. In
spirit it is nanoGPT's model and the PyTorch loop that llm.c is held against: one matrix for queries, keys and values,
a head tied to the embedding, gradients set to None, the norm clipped, weights of two axes decayed and others not.
"""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from reference.config import GPTConfig

BETAS, WEIGHT_DECAY = (0.9, 0.95), 0.1


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.heads, -1).transpose(1, 2) for part in self.qkv(x).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).contiguous().view(B, T, C))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, eps: float) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps), Attention(width, heads)
        self.norm2, self.up, self.down = (
            nn.LayerNorm(width, eps),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT2(nn.Module):
    """tokens (B, T) -> logits (B, T, V)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width = config.emb_dim
        self.tokens, self.positions = nn.Embedding(config.vocab_size, width), nn.Embedding(config.context_length, width)
        self.blocks = nn.ModuleList(Block(width, config.n_heads, config.norm_eps) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(width, config.norm_eps)
        self.head = nn.Linear(width, config.vocab_size, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def can(config: GPTConfig) -> bool:
    """Whether a model is a GPT-2, which is all that this file knows, and is trained without dropout and adapters."""
    rates = config.emb_dropout, config.shortcut_dropout, config.attn_dropout
    kind = (config.norm, config.mlp, config.position) == ("layer_norm", "gelu_tanh", "learned")
    sizes = config.n_kv_heads * config.head_dim == config.emb_dim and config.mlp_dim == 4 * config.emb_dim
    return (
        kind and sizes and config.bias and config.qkv_bias and config.tie_embeddings and not (any(rates) or config.lora)
    )


def create(config: GPTConfig, params: Mapping[str, np.ndarray]) -> GPT2:
    """The model with our parameters, copied."""
    model = GPT2(config)
    whole = {"tokens": "tok_emb", "positions": "pos_emb", "norm": "final_norm", "head": "tok_emb"}
    inside = {"norm1": "norm1", "norm2": "norm2", "attn.out": "attn.out", "up": "mlp.up", "down": "mlp.down"}
    state = {}
    for name in model.state_dict():
        layer, _, kind = name.rpartition(".")
        block, number, part = (*layer.split(".", 2), "")[:3] if layer.startswith("blocks.") else ("", "", layer)
        if part == "attn.qkv":
            parts = [params[f"blocks.{number}.attn.{one}.{kind}"] for one in ("query", "key", "value")]
            state[name] = torch.from_numpy(np.concatenate(parts))
        else:
            ours = f"{block}.{number}.{inside[part]}" if block else whole[part]
            state[name] = torch.from_numpy(params[f"{ours}.{kind}"])
    model.load_state_dict(state)
    return model


class Loop:
    """A model, of which `logits` tells the logits for tokens, and the loop that trains it."""

    def __init__(self, model: nn.Module, fused: bool = False) -> None:
        self.model, self.params = model, [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in self.params if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in self.params if p.ndim < 2], "weight_decay": 0.0},
        ]
        more: dict[str, Any] = {"fused": True} if fused else {}
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=1e-4, betas=BETAS, **more)

    def step(self, inputs: np.ndarray, targets: np.ndarray, max_norm: float) -> dict[str, float]:
        """Seconds of a step and of its two halves, and the loss before it. inputs and targets (B, T)."""
        start = perf_counter()
        logits = self.model(torch.from_numpy(inputs))
        logits = getattr(logits, "logits", logits)  # transformers' answer has more in it
        loss = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).flatten())
        loss.backward()
        value, computed = loss.item(), perf_counter()
        torch.nn.utils.clip_grad_norm_(self.params, max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        end = perf_counter()
        return {"seconds": end - start, "gradients": computed - start, "update": end - computed, "loss": value}
