"""The GPT of `reference/model.py` as a PyTorch module: the same parameters by name, the same operations in order.

Its operators come as a set (gpt/ops.py); which one is not asked here.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gpt.cache import Cache
from gpt.ops import TORCH, Operators, linear, lora, token_logps
from reference import philox, rope
from reference.config import GPTConfig
from reference.lora import SITES

GELU = {"gelu": "none", "gelu_tanh": "tanh"}


def _no_trace(name: str, tensor: torch.Tensor) -> None:
    pass


class Linear(nn.Module):
    """A linear layer, and the low-rank adapter beside it where the config says so. `tied`: its weight is another's."""

    def __init__(
        self, config: GPTConfig, name: str, d_in: int, d_out: int, bias: bool, layer: int = 0, tied: bool = False
    ) -> None:
        super().__init__()
        own = None if tied else nn.Linear(d_in, d_out, bias)  # which draws its first values
        self.weight: torch.Tensor | None = own.weight if own else None
        self.bias: torch.Tensor | None = own.bias if own else None
        self.lora = config.lora if config.adapts(name) else None
        if self.lora:
            self.lora_a = nn.Linear(d_in, self.lora.rank, bias=False).weight
            self.lora_b = nn.Parameter(torch.zeros(d_out, self.lora.rank))
        self.name, self.layer = name, layer

    def forward(
        self, x: torch.Tensor, noise: Any = None, trace: Any = _no_trace, weight: torch.Tensor | None = None
    ) -> torch.Tensor:
        weight = self.weight if weight is None else weight
        assert weight is not None
        y = linear(x, weight, self.bias)
        if self.lora:
            rate, site = self.lora.dropout, SITES[self.name.rpartition(".")[2]]
            here = noise(self.layer, site, tuple(x.shape), rate) if rate and noise else None
            low = lora(x, self.lora_a, self.lora_b, self.lora.scale, rate, here)
            trace(f"{self.name}.lora", low)
            y = y + low
        trace(self.name, y)
        return y


class LayerNorm(nn.Module):
    def __init__(self, config: GPTConfig, operators: Operators) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.emb_dim))
        self.bias = nn.Parameter(torch.zeros(config.emb_dim)) if config.bias else None
        self.operators, self.eps = operators, config.norm_eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.operators.layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalized x + residual, and x + residual."""
        return self.operators.add_layer_norm(x, residual, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    def __init__(self, config: GPTConfig, operators: Operators) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.emb_dim))
        self.operators, self.eps = operators, config.norm_eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.operators.rms_norm(x, self.weight, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalized x + residual, and x + residual."""
        return self.operators.add_rms_norm(x, residual, self.weight, self.eps)


NORMS: dict[str, type[LayerNorm | RMSNorm]] = {"layer_norm": LayerNorm, "rms_norm": RMSNorm}


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, operators: Operators, layer: int) -> None:
        super().__init__()
        emb, q_dim, kv_dim = config.emb_dim, config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        name = f"blocks.{layer}.attn"
        self.query = Linear(config, f"{name}.query", emb, q_dim, config.qkv_bias, layer)
        self.key = Linear(config, f"{name}.key", emb, kv_dim, config.qkv_bias, layer)
        self.value = Linear(config, f"{name}.value", emb, kv_dim, config.qkv_bias, layer)
        self.out = Linear(config, f"{name}.out", q_dim, emb, config.bias, layer)
        self.config, self.operators, self.layer, self.name = config, operators, layer, name

    def forward(
        self, x: torch.Tensor, noise: Any = None, trace: Any = _no_trace, cache: Cache | None = None, turns: Any = None
    ) -> torch.Tensor:
        B, T, _ = x.shape
        rate, name = self.config.attn_dropout, self.name
        heads = []
        for part in (self.query, self.key, self.value):
            y = part(x, noise, trace)
            heads.append(y.view(B, T, -1, self.config.head_dim).transpose(1, 2))  # (B, H, T, D)
        q, k, v = heads
        if turns is not None:
            q = self.operators.rope(q, *turns, self.config.rope_interleaved)
            trace(f"{name}.query.rope", q)
            k = self.operators.rope(k, *turns, self.config.rope_interleaved)
            trace(f"{name}.key.rope", k)
        if cache is None:
            here = noise(self.layer, philox.ATTENTION, (B, self.config.n_heads, T, T), rate) if rate and noise else None
            y = self.operators.attention(q, k, v, True, None, rate, here)
        else:
            keys, values = cache.store(self.layer, k, v)
            if cache.end == T:  # nothing was there before: the usual attention, and no mask for it
                y = self.operators.attention(q, k, v, True, None, 0.0, None)
            else:
                y = self.operators.cached_attention(q, keys, values, cache.starts)
        trace(f"{name}.heads", y)
        return self.out(y.transpose(1, 2).reshape(B, T, -1), noise, trace)


class MLP(nn.Module):
    gate: Linear | None

    def __init__(self, config: GPTConfig, operators: Operators, layer: int) -> None:
        super().__init__()
        gated, emb, mlp, name = config.mlp == "swiglu", config.emb_dim, config.mlp_dim, f"blocks.{layer}.mlp"
        self.gate = Linear(config, f"{name}.gate", emb, mlp, config.bias, layer) if gated else None
        self.up = Linear(config, f"{name}.up", emb, mlp, config.bias, layer)
        self.down = Linear(config, f"{name}.down", mlp, emb, config.bias, layer)
        self.activation, self.operators, self.name = config.mlp, operators, name

    def forward(self, x: torch.Tensor, noise: Any = None, trace: Any = _no_trace) -> torch.Tensor:
        if self.gate is not None:
            gate = self.gate(x, noise, trace)
            x = self.operators.swiglu(gate, self.up(x, noise, trace))
        else:
            x = self.operators.gelu(self.up(x, noise, trace), GELU[self.activation])
        trace(f"{self.name}.act", x)
        return self.down(x, noise, trace)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, operators: Operators, layer: int) -> None:
        super().__init__()
        self.norm1 = NORMS[config.norm](config, operators)
        self.attn = Attention(config, operators, layer)
        self.norm2 = NORMS[config.norm](config, operators)
        self.mlp = MLP(config, operators, layer)
        self.rate, self.operators, self.layer, self.name = config.shortcut_dropout, operators, layer, f"blocks.{layer}"

    def forward(
        self, x: torch.Tensor, noise: Any = None, trace: Any = _no_trace, cache: Cache | None = None, turns: Any = None
    ) -> torch.Tensor:
        name = self.name  # not made of the number here: of several blocks torch.compile keeps that as a symbol
        y = self.norm1(x)
        trace(f"{name}.norm1", y)
        y = self.attn(y, noise, trace, cache, turns)
        y = self.drop(f"{name}.attn.dropout", philox.ATTENTION_SHORTCUT, y, noise, trace)
        y, x = self.norm2.add(x, y)
        trace(f"{name}.shortcut1", x)
        trace(f"{name}.norm2", y)
        y = self.drop(f"{name}.mlp.dropout", philox.MLP_SHORTCUT, self.mlp(y, noise, trace), noise, trace)
        x = x + y
        trace(f"{name}.shortcut2", x)
        return x

    def drop(self, name: str, site: int, x: torch.Tensor, noise: Any, trace: Any) -> torch.Tensor:
        if not self.rate or noise is None:
            return x
        x = self.operators.dropout(x, self.rate, noise(self.layer, site, tuple(x.shape), self.rate))
        trace(name, x)
        return x


def angles(config: GPTConfig, places: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """rope.angles of positions (..., T) on their device: cos and sin (..., T, D / 2), float32 at least."""
    f = torch.from_numpy(rope.frequencies(config.head_dim, config.rope_theta, config.rope_scaling)).to(places.device)
    turns = places[..., None] * f
    wide = torch.promote_types(dtype, torch.float32)
    return turns.cos().to(wide), turns.sin().to(wide)


class GPT(nn.Module):
    """`GPTConfig.parameter_shapes` are this module's `state_dict`, in the same order.

    `checkpoint_activations`: of a block its input alone is kept, and the rest computed again in the backward pass. Its
    noise must then be a function of its arguments.
    """

    def __init__(self, config: GPTConfig, operators: Operators = TORCH, checkpoint_activations: bool = False) -> None:
        super().__init__()
        self.config, self.operators, self.checkpoint_activations = config, operators, checkpoint_activations
        self.tok_emb = nn.Embedding(config.vocab_size, config.emb_dim)
        if config.position == "learned":
            self.pos_emb = nn.Embedding(config.context_length, config.emb_dim)
        self.blocks = nn.ModuleList(Block(config, self.operators, i) for i in range(config.n_layers))
        self.final_norm = NORMS[config.norm](config, self.operators)
        tied = config.tie_embeddings
        self.head = Linear(config, "head", config.emb_dim, config.n_outputs, config.head_bias, tied=tied)

    def forward(
        self,
        tokens: torch.Tensor,
        noise: Any = None,
        trace: Any = _no_trace,
        positions: slice | torch.Tensor = slice(None),
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """tokens (B, T) int64 -> logits (B, T, V), or those of `positions`, a slice or integers (B, P); V is n_outputs.

        `noise(layer, site, shape, rate)` gives the noise of a dropout site (reference/philox.py), None: no dropout.
        `trace(name, tensor)` is called with each tensor in execution order. `cache`: of the tokens before these, to
        which these are added; without dropout.
        """
        x = self.hidden(tokens, noise, trace, positions, cache)
        return self.head(x, noise, trace, self.tok_emb.weight if self.config.tie_embeddings else None)

    def hidden(
        self,
        tokens: torch.Tensor,
        noise: Any = None,
        trace: Any = _no_trace,
        positions: slice | torch.Tensor = slice(None),
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """What the head projects to logits, (B, T, C), or that of `positions`; arguments as above."""
        if cache is None:
            places = torch.arange(tokens.shape[1], device=tokens.device)
        else:
            cache.begin(tokens.shape[1])
            places = cache.columns
        x, turns = self.tok_emb(tokens), None
        trace("tok_emb", x)
        if self.config.position == "learned":
            pos = self.pos_emb(places)
            trace("pos_emb", pos)
            x = x + pos
            trace("emb", x)
        else:
            turns = angles(self.config, places, x.dtype)
        rate = self.config.emb_dropout
        if rate and noise is not None:
            x = self.operators.dropout(x, rate, noise(0, philox.EMBEDDING, tuple(x.shape), rate))
            trace("emb.dropout", x)
        again = self.checkpoint_activations and torch.is_grad_enabled() and cache is None
        for block in self.blocks:
            if again:  # of blocks before the first that learns nothing is kept anyway
                compute = partial(block, noise=noise, trace=trace, turns=turns)
                x = checkpoint(compute, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, noise, trace, cache, turns)
        chosen = x[:, positions] if isinstance(positions, slice) else x.take_along_dim(positions[..., None], dim=1)
        x = self.final_norm(chosen)
        trace("final_norm", x)
        return x

    def loss(self, tokens: torch.Tensor, targets: torch.Tensor, noise: Any = None) -> torch.Tensor:
        """tokens and targets (B, T) -> mean cross entropy of the targets that are not -100."""
        if self.config.adapts("head"):
            return self.operators.cross_entropy(self(tokens, noise), targets)
        weight = self.tok_emb.weight if self.config.tie_embeddings else self.head.weight
        return self.operators.linear_cross_entropy(self.hidden(tokens, noise), weight, self.head.bias, targets)

    def token_logps(self, tokens: torch.Tensor, targets: torch.Tensor, noise: Any = None) -> torch.Tensor:
        """tokens and targets (B, T) -> log-probability of each target (B, T), 0 where it is -100."""
        return token_logps(self(tokens, noise), targets)
