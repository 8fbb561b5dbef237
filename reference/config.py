"""The architecture of a GPT, as data: one frozen dataclass for every model, and presets by name."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from reference.lora import LoRA
from reference.rope import Scaling

CHOICES = {
    "norm": ("layer_norm", "rms_norm"),
    "mlp": ("gelu_tanh", "gelu", "swiglu"),
    "position": ("learned", "rope"),
}
RATES = ("emb_dropout", "shortcut_dropout", "attn_dropout")


@dataclass(frozen=True)
class GPTConfig:
    """Sizes and choices of one model. An impossible combination raises ValueError with the field's name.

    `n_kv_heads`, `head_dim`, `mlp_dim` and `n_outputs` may be left 0: they become `n_heads`, `emb_dim // n_heads`,
    `4 * emb_dim` and `vocab_size`.
    """

    vocab_size: int
    context_length: int
    emb_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int = 0  # fewer than n_heads: grouped-query attention
    head_dim: int = 0  # n_heads * head_dim need not equal emb_dim
    mlp_dim: int = 0
    norm: str = "layer_norm"
    norm_eps: float = 1e-5
    mlp: str = "gelu_tanh"
    position: str = "learned"
    rope_theta: float = 10000.0
    rope_interleaved: bool = False  # which entries of a head are pairs, see rope.py
    rope_scaling: Scaling | None = None  # may be given as a mapping
    qkv_bias: bool = False
    bias: bool = True  # of the output projection, the MLP and layer norms
    head_bias: bool = False
    tie_embeddings: bool = False  # the output head is the token embedding
    n_outputs: int = 0  # of the head: fewer than tokens where it tells classes apart
    emb_dropout: float = 0.0
    shortcut_dropout: float = 0.0
    attn_dropout: float = 0.0
    lora: LoRA | None = None  # low-rank adapters beside the linear layers; may be given as a mapping

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "emb_dim", "n_layers", "n_heads"):
            self._require_int(name, at_least=1)
        for name in ("n_kv_heads", "head_dim", "mlp_dim", "n_outputs"):
            self._require_int(name, at_least=0)
        if not self.head_dim and self.emb_dim % self.n_heads:
            raise ValueError(
                f"n_heads: {self.n_heads} does not divide emb_dim {self.emb_dim}; choose one that does, or set head_dim"
            )
        for name, value in self._derived().items():
            if not getattr(self, name):
                object.__setattr__(self, name, value)
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads: {self.n_kv_heads} does not divide n_heads {self.n_heads}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(choices)}")
        for name in ("qkv_bias", "bias", "head_bias", "tie_embeddings", "rope_interleaved"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: {getattr(self, name)!r} is not true or false")
        for name in RATES:
            rate = getattr(self, name)
            if not isinstance(rate, (int, float)) or not 0 <= rate < 1:
                raise ValueError(f"{name}: {rate!r} is not a rate, 0 <= rate < 1")
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"{name}: {value!r} is not a positive number")
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(f"head_dim: {self.head_dim} is odd, and rope turns pairs of entries")
        self._nest("rope_scaling", Scaling)
        self._nest("lora", LoRA)
        if self.tie_embeddings and self.head_bias:
            raise ValueError("head_bias: a head tied to the token embedding has no bias")
        if self.tie_embeddings and self.n_outputs != self.vocab_size:
            raise ValueError(
                f"n_outputs: {self.n_outputs}, but a head tied to the token embedding has one for each of the "
                f"{self.vocab_size} tokens"
            )
        if self.lora and not set(self.lora.targets) & set(self._linear_layers()):
            raise ValueError(f"lora targets: this model has none of {', '.join(self.lora.targets)}")

    def _require_int(self, name: str, at_least: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
            raise ValueError(f"{name}: {value!r} is not a whole number of at least {at_least}")

    def _nest(self, name: str, kind: type) -> None:
        """Make the settings of a nested dataclass, given as a mapping, one of it."""
        value = getattr(self, name)
        if isinstance(value, dict):
            settings = {field.name: field.default for field in dataclasses.fields(kind)}
            if unknown := value.keys() - settings.keys():
                raise ValueError(f"{name}: no setting {min(unknown, key=str)}, expected some of {', '.join(settings)}")
            needed = [key for key, default in settings.items() if default is dataclasses.MISSING]
            if missing := [key for key in needed if key not in value]:
                raise ValueError(f"{name}: expected {' and '.join(missing)} too, got {', '.join(value) or 'nothing'}")
            object.__setattr__(self, name, kind(**value))
        if not isinstance(getattr(self, name), kind | None):
            raise ValueError(f"{name}: {value!r} is no mapping of its settings")

    def _linear_layers(self) -> tuple[str, ...]:
        """What linear layers a block has, and the head."""
        gate = ("gate",) if self.mlp == "swiglu" else ()
        return ("query", "key", "value", "out", *gate, "up", "down", "head")

    @property
    def drops(self) -> bool:
        """Whether there is a place with dropout."""
        return any(getattr(self, rate) for rate in RATES) or bool(self.lora and self.lora.dropout)

    def adapts(self, layer: str) -> bool:
        """Whether a linear layer, by its full name such as blocks.0.attn.query, has a low-rank adapter beside it."""
        return self.lora is not None and layer.rpartition(".")[2] in self.lora.targets

    def _derived(self) -> dict[str, int]:
        """What a size that was left 0 becomes."""
        return {
            "n_kv_heads": self.n_heads,
            "head_dim": self.emb_dim // self.n_heads,
            "mlp_dim": 4 * self.emb_dim,
            "n_outputs": self.vocab_size,
        }

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> GPTConfig:
        """The config with these fields. `drop_rate`, the book's single rate, stands in for each rate not given."""
        settings = dict(settings)
        if "drop_rate" in settings:
            rate = settings.pop("drop_rate")
            for name in RATES:
                settings.setdefault(name, rate)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name in settings:
            if name not in fields:
                close = get_close_matches(name, fields, n=1)
                raise ValueError(
                    f"{name}: no such field of a GPTConfig" + (f"; did you mean {close[0]}?" if close else "")
                )
        missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in settings]
        if missing:
            raise ValueError(f"{missing[0]}: not given, and it has no default")
        return cls(**settings)

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON can hold them."""
        return dataclasses.asdict(self)

    def replace(self, **changes: Any) -> GPTConfig:
        """This config with some fields changed. A size that was derived from a changed one follows it."""
        derived = {name: 0 for name, value in self._derived().items() if getattr(self, name) == value}
        if self.emb_dim % self.n_heads:
            derived.pop("head_dim", None)  # it was given: 7 heads in 384 dimensions derive none
        kept = {**self.to_dict(), **derived}
        if "drop_rate" in changes:
            kept = {name: value for name, value in kept.items() if name not in RATES}
        return GPTConfig.from_dict({**kept, **changes})

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every parameter, in the order the forward pass meets them. Weights are (out, in).

        A low-rank adapter's are NAME.lora_a (rank, in) and NAME.lora_b (out, rank), after its layer's.
        """
        emb, q_dim, kv_dim = self.emb_dim, self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "tok_emb.weight": (self.vocab_size, emb),
        }
        if self.position == "learned":
            shapes["pos_emb.weight"] = (self.context_length, emb)

        def linear(name: str, d_out: int, d_in: int, bias: bool, tied: bool = False) -> None:
            if not tied:
                shapes[f"{name}.weight"] = (d_out, d_in)
            if bias:
                shapes[f"{name}.bias"] = (d_out,)
            if self.lora and self.adapts(name):
                shapes[f"{name}.lora_a"] = (self.lora.rank, d_in)
                shapes[f"{name}.lora_b"] = (d_out, self.lora.rank)

        def norm(name: str) -> None:
            shapes[f"{name}.weight"] = (emb,)
            if self.bias and self.norm == "layer_norm":
                shapes[f"{name}.bias"] = (emb,)

        for i in range(self.n_layers):
            block = f"blocks.{i}"
            norm(f"{block}.norm1")
            linear(f"{block}.attn.query", q_dim, emb, self.qkv_bias)
            linear(f"{block}.attn.key", kv_dim, emb, self.qkv_bias)
            linear(f"{block}.attn.value", kv_dim, emb, self.qkv_bias)
            linear(f"{block}.attn.out", emb, q_dim, self.bias)
            norm(f"{block}.norm2")
            if self.mlp == "swiglu":
                linear(f"{block}.mlp.gate", self.mlp_dim, emb, self.bias)
            linear(f"{block}.mlp.up", self.mlp_dim, emb, self.bias)
            linear(f"{block}.mlp.down", emb, self.mlp_dim, self.bias)
        norm("final_norm")
        linear("head", self.n_outputs, emb, self.head_bias, tied=self.tie_embeddings)
        return shapes

    @property
    def n_parameters(self) -> int:
        """How many numbers the parameters hold. A tied head counts once."""
        return sum(math.prod(shape) for shape in self.parameter_shapes().values())


def _gpt2(emb_dim: int, n_layers: int, n_heads: int) -> GPTConfig:
    return GPTConfig(50257, 1024, emb_dim, n_layers, n_heads, qkv_bias=True, tie_embeddings=True)


def _llama(
    vocab_size: int, context_length: int, emb_dim: int, n_layers: int, n_heads: int, n_kv_heads: int, mlp_dim: int,
    **others: Any,
) -> GPTConfig:  # fmt: skip
    sizes = (vocab_size, context_length, emb_dim, n_layers, n_heads, n_kv_heads)
    llama: dict[str, Any] = {"norm": "rms_norm", "mlp": "swiglu", "position": "rope", "bias": False}
    return GPTConfig(*sizes, mlp_dim=mlp_dim, **{**llama, **others})


PRESETS: dict[str, GPTConfig] = {
    "gpt2-small": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    # The book's model before it loads GPT-2's weights: its head is not tied, its attention has no biases.
    "book-124m": GPTConfig(50257, 1024, 768, 12, 12, emb_dropout=0.1, shortcut_dropout=0.1, attn_dropout=0.1),
    # A course's model: 7 heads of 54 in 384 dimensions, a six-fold MLP, biases everywhere.
    "course-gpt": GPTConfig(
        4096,
        512,
        384,
        7,
        7,
        head_dim=54,
        mlp_dim=6 * 384,
        qkv_bias=True,
        head_bias=True,
        emb_dropout=0.05,
        shortcut_dropout=0.05,
        attn_dropout=0.05,
    ),
    "llama2-7b": _llama(32000, 4096, 4096, 32, 32, 32, 11008),
    "llama3.1-8b": _llama(128256, 131072, 4096, 32, 32, 8, 14336, rope_theta=5e5, rope_scaling=Scaling(8.0)),
    "llama3.2-1b": _llama(
        128256, 131072, 2048, 16, 32, 8, 8192, rope_theta=5e5, rope_scaling=Scaling(32.0), tie_embeddings=True
    ),
    # The same course's second model, with rope as in Meta's code.
    "course-llama": _llama(16384, 512, 768, 12, 12, 12, 3072, rope_interleaved=True),
    "bytes-small": GPTConfig(257, 256, 128, 4, 4, qkv_bias=True, tie_embeddings=True),
    "bytes-tiny": GPTConfig(257, 64, 48, 2, 3, qkv_bias=True, tie_embeddings=True),
    "bytes-llama": _llama(257, 256, 128, 4, 4, 2, 352, tie_embeddings=True),
}
