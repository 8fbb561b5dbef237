"""Families of models in Hugging Face's config.json: their settings as a GPTConfig, and back."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from gpt.errors import UserError
from gpt.weights.names import FORMATS, Format
from reference.config import GPTConfig
from reference.rope import Scaling

__all__ = ["FAMILIES", "Family", "family_of"]

Settings = dict[str, Any]


class Family(NamedTuple):
    """`prefix`: of names in some files. `no_parameters`: names in older files that are none."""

    architecture: str
    format: Format
    config: Callable[[Settings], GPTConfig]  # raises ValueError naming what no model here has
    settings: Callable[[GPTConfig], Settings]  # raises ValueError naming what this family does not have
    prefix: str = ""
    no_parameters: re.Pattern[str] | None = None


GELUS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


def _choice(settings: Settings, name: str, default: str, choices: dict[str, str]) -> str:
    value = settings.get(name, default)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} {value!r} is not one of {', '.join(choices)}")
    return choices[value]


def _refuse(settings: Settings, *names: str) -> None:
    for name in names:
        if settings.get(name):
            raise ValueError(f"{name} is set, which no model here has")


def _require(config: GPTConfig, architecture: str, **wanted: Any) -> None:
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{name}: {getattr(config, name)}, but Hugging Face's {architecture} has {value}: "
                "it cannot be this model"
            )


def _gpt2_config(settings: Settings) -> GPTConfig:
    _refuse(settings, "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention")
    if not settings.get("scale_attn_weights", True):
        raise ValueError("scale_attn_weights is off, which no model here has")
    return GPTConfig(
        vocab_size=settings.get("vocab_size", 50257),
        context_length=settings.get("n_positions", 1024),
        emb_dim=settings.get("n_embd", 768),
        n_layers=settings.get("n_layer", 12),
        n_heads=settings.get("n_head", 12),
        mlp_dim=settings.get("n_inner") or 0,
        norm_eps=settings.get("layer_norm_epsilon", 1e-5),
        mlp=_choice(settings, "activation_function", "gelu_new", GELUS),
        qkv_bias=True,
        tie_embeddings=settings.get("tie_word_embeddings", True),
        emb_dropout=settings.get("embd_pdrop", 0.1),
        shortcut_dropout=settings.get("resid_pdrop", 0.1),
        attn_dropout=settings.get("attn_pdrop", 0.1),
    )


def _gpt2_settings(config: GPTConfig) -> Settings:
    head_dim = config.emb_dim // config.n_heads
    _require(config, "GPT-2", head_dim=head_dim, n_kv_heads=config.n_heads, norm="layer_norm")
    _require(config, "GPT-2", n_outputs=config.vocab_size, head_bias=False)
    if config.mlp not in GELUS.values():
        raise ValueError(f"mlp: {config.mlp}, but Hugging Face's GPT-2 has a GELU: it cannot be this model")
    return {
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_embd": config.emb_dim,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": config.mlp_dim,
        "activation_function": {ours: theirs for theirs, ours in reversed(GELUS.items())}[config.mlp],
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "embd_pdrop": config.emb_dropout,
        "resid_pdrop": config.shortcut_dropout,
        "attn_pdrop": config.attn_dropout,
        "bos_token_id": config.vocab_size - 1,
        "eos_token_id": config.vocab_size - 1,
    }


SCALING = {  # theirs -> ours
    "factor": "factor",
    "low_freq_factor": "low",
    "high_freq_factor": "high",
    "original_max_position_embeddings": "context_length",
}


def _llama_config(settings: Settings) -> GPTConfig:
    _choice(settings, "hidden_act", "silu", {"silu": ""})
    attention_bias, mlp_bias = (settings.get(name, False) for name in ("attention_bias", "mlp_bias"))
    if attention_bias != mlp_bias:
        raise ValueError("attention_bias and mlp_bias: expected both or neither")
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}  # newer and older files
    if not isinstance(rope, dict):
        raise ValueError(f"rope_parameters: expected an object, got {type(rope).__name__}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"rope_type {kind!r} is not one of default, llama3")
    scaling = None
    if kind == "llama3":
        missing = [name for name in SCALING if not isinstance(rope.get(name), (int, float))]
        if missing:
            raise ValueError(f"rope_scaling: expected a number as {missing[0]}")
        scaling = Scaling(**{ours: rope[theirs] for theirs, ours in SCALING.items()})
    theta: Any = rope.get("rope_theta", settings.get("rope_theta", 10000.0))
    return GPTConfig(
        vocab_size=settings.get("vocab_size", 32000),
        context_length=settings.get("max_position_embeddings", 2048),
        emb_dim=settings.get("hidden_size", 4096),
        n_layers=settings.get("num_hidden_layers", 32),
        n_heads=settings.get("num_attention_heads", 32),
        n_kv_heads=settings.get("num_key_value_heads") or 0,
        head_dim=settings.get("head_dim") or 0,
        mlp_dim=settings.get("intermediate_size", 11008),
        norm="rms_norm",
        norm_eps=settings.get("rms_norm_eps", 1e-6),
        mlp="swiglu",
        position="rope",
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=attention_bias,
        bias=mlp_bias,
        tie_embeddings=settings.get("tie_word_embeddings", False),
        attn_dropout=settings.get("attention_dropout", 0.0),
    )


def _llama_settings(config: GPTConfig) -> Settings:
    _require(config, "Llama", norm="rms_norm", mlp="swiglu", position="rope", qkv_bias=config.bias)
    _require(config, "Llama", n_outputs=config.vocab_size, head_bias=False)
    rope: Settings = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if config.rope_scaling:
        rope["rope_type"] = "llama3"
        rope |= {theirs: getattr(config.rope_scaling, ours) for theirs, ours in SCALING.items()}
    return {
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "hidden_size": config.emb_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        "rope_theta": config.rope_theta,  # where older versions look
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.bias,
        "attention_dropout": config.attn_dropout,
        "tie_word_embeddings": config.tie_embeddings,
    }


FAMILIES = {
    "gpt2": Family(
        "GPT2LMHeadModel",
        FORMATS["huggingface-gpt2"],
        _gpt2_config,
        _gpt2_settings,
        prefix="transformer.",
        no_parameters=re.compile(r"h\.\d+\.attn\.(bias|masked_bias)"),  # the causal mask
    ),
    "llama": Family(
        "LlamaForCausalLM",
        FORMATS["huggingface-llama"],
        _llama_config,
        _llama_settings,
        no_parameters=re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),
    ),
}


def family_of(settings: Settings) -> Family:
    """The family of a config.json. Raises UserError for one that is not here."""
    kind = settings.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(f"model_type {kind!r}, expected one of {', '.join(FAMILIES)}")
    return FAMILIES[kind]
