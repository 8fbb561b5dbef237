"""Chapter 4: layer normalization, GELU, sizes, and the seeded model of 124M parameters."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpt import tokenizers
from gpt.generate import Sampling, generate
from reference import PRESETS, GPTConfig
from reference.torch_rng import Generator, StreamNoise
from tests.figures.chapter2 import encode
from tests.figures.engines import BOOK, Layers, draw_linear, seeded, seeded_engine, seeded_model
from tests.figures.registry import figure

TOKENS = np.array([[6109, 3626, 6100, 345], [6109, 1110, 6622, 257]])
PRINTED = [0, 1, 2, -3, -2, -1]  # the logits that PyTorch prints of 50257
SIZES = {"small": (768, 12, 12), "medium": (1024, 24, 16), "large": (1280, 36, 20), "xl": (1600, 48, 25)}


def size(name: str, **changes: Any) -> GPTConfig:
    emb_dim, n_layers, n_heads = SIZES[name]
    return BOOK.replace(emb_dim=emb_dim, n_layers=n_layers, n_heads=n_heads, **changes)


def counts(name: str) -> dict[str, float]:
    total = size(name).n_parameters
    return {"total": total, "tied": size(name, tie_embeddings=True).n_parameters, "mb": round(total * 4 / 2**20, 2)}


def counts_with_biases(name: str) -> dict[str, float]:
    biased = size(name, qkv_bias=True), size(name, qkv_bias=True, tie_embeddings=True)
    return counts(name) | {"total_qkv_bias": biased[0].n_parameters, "tied_qkv_bias": biased[1].n_parameters}


def of_block(part: str, config: GPTConfig = BOOK) -> int:
    shapes = config.parameter_shapes()
    return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(f"blocks.0.{part}."))


def small_layer(layers: Layers) -> np.ndarray:
    """ReLU of a seeded linear layer: (2, 6)."""
    generator = Generator(123)
    x = generator.normal((2, 5))
    return np.maximum(layers.linear(x, *draw_linear(generator, 5, 6)), 0)


@figure("ch04.layernorm.layer_out")
def layer_output(layers: Layers) -> list:
    return small_layer(layers).tolist()


@figure("ch04.layernorm.mean_var")
def mean_and_variance(layers: Layers) -> dict[str, list]:
    y = small_layer(layers)
    return {"mean": y.mean(axis=-1, keepdims=True).tolist(), "var": y.var(axis=-1, ddof=1, keepdims=True).tolist()}


@figure("ch04.layernorm.normalized")
def normalized(layers: Layers) -> list:
    y = small_layer(layers)
    unbiased = np.full(6, math.sqrt(5 / 6), np.float32)  # the layer's variance is over n, the book's here over n - 1
    return layers.layer_norm(y, unbiased, np.zeros(6, np.float32), eps=0.0).tolist()


@figure("ch04.gelu.curve")
def gelu_curve(layers: Layers) -> dict[str, list]:
    x = np.linspace(-3, 3, 100, dtype=np.float32)
    return {"x": x[::9].tolist(), "y": layers.gelu(x)[::9].tolist()}


@figure("ch04.ffn.shape")
def feed_forward(layers: Layers) -> dict[str, Any]:
    generator = Generator(123)
    up, down = draw_linear(generator, 768, 3072), draw_linear(generator, 3072, 768)
    y = layers.linear(layers.gelu(layers.linear(generator.rand((2, 3, 768)), *up)), *down)
    return {"shape": list(y.shape), "params": sum(p.size for p in (*up, *down) if p is not None)}


@figure("ch04.ex4.1")
def parameters_of_a_block() -> dict[str, int]:
    return {"ff": of_block("mlp"), "att": of_block("attn")}


@figure("ch04.params.gpt2-large")
def parameters_of_large() -> dict[str, float]:
    return counts("large")


@figure("ch04.params.gpt2-xl")
def parameters_of_xl() -> dict[str, float]:
    return counts("xl")


@figure("ch04.params_inst.small")
def parameters_of_small_with_biases() -> dict[str, float]:
    return counts_with_biases("small")


@figure("ch04.params_inst.medium")
def parameters_of_medium_with_biases() -> dict[str, float]:
    return counts_with_biases("medium")


@figure("ch04.params_inst.large")
def parameters_of_large_with_biases() -> dict[str, float]:
    return counts_with_biases("large")


@figure("ch04.params_inst.xl")
def parameters_of_xl_with_biases() -> dict[str, float]:
    return counts_with_biases("xl")


@figure("course.gpt.nparams")
def parameters_of_the_course() -> float:
    return PRESETS["course-gpt"].n_parameters / 1e6


@figure("ch04.batch")
def batch() -> list:
    return [encode("Every effort moves you"), encode("Every day holds a")]


@figure("ch04.dummy_gpt.logits")
def model_without_blocks(layers: Layers) -> list:
    """Embeddings, dropout and head of the seeded model, nothing between them."""
    generator = Generator(123)
    tok_emb, pos_emb = generator.normal((50257, 768)), generator.normal((1024, 768))
    head, _ = draw_linear(generator, 768, 50257, bias=False)
    x = layers.embedding(TOKENS, tok_emb) + layers.embedding(np.arange(4), pos_emb)
    x = layers.dropout(x, 0.1, generator.keep_mask(x.shape, 0.1))
    return layers.linear(x, head)[..., PRINTED].tolist()


@figure("ch04.gpt124m.logits")
def logits_in_training_mode(layers: Layers) -> list:
    noise = StreamNoise(Generator.from_state(seeded(BOOK)[1]))
    return seeded_model(layers.name, BOOK)(TOKENS, noise)[..., PRINTED].tolist()


@figure("ch04.gpt124m.nparams")
def parameters_of_small() -> dict[str, float]:
    return counts("small")


@figure("ch04.generate.hello")
def greedy_continuation(layers: Layers) -> dict[str, Any]:
    ids = encode("Hello, I am")
    out = generate(seeded_engine(layers.name, BOOK), np.array([ids]), Sampling(max_new_tokens=6))[0]
    return {"enc": ids, "out": out.tolist(), "text": tokenizers.load("gpt2").decode(out)}
