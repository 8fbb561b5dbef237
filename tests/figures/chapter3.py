"""Chapter 3: attention, each teaching step with the engine's own layers.

Attention weights are what attention makes of the identity matrix as values; a class of the book is projections around
the one attention layer.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from reference.torch_rng import Generator
from tests.figures.engines import Layers, draw_linear
from tests.figures.registry import figure

INPUTS = np.array(
    [
        [0.43, 0.15, 0.89],
        [0.55, 0.87, 0.66],
        [0.57, 0.85, 0.64],
        [0.22, 0.58, 0.33],
        [0.77, 0.25, 0.10],
        [0.05, 0.80, 0.55],
    ],
    np.float32,
)  # "Your journey starts with one step"
BATCH = np.stack([INPUTS, INPUTS])
Projections = tuple[np.ndarray, np.ndarray, np.ndarray]  # query, key, value, each (out, in)


def random_projections() -> Projections:
    """The book's first trainable attention: torch.rand(3, 2) three times after seed 123, used as x @ W."""
    generator = Generator(123)
    return tuple(generator.rand((3, 2)).T for _ in range(3))  # type: ignore[return-value]


def linear_projections(seed: int = 789) -> Projections:
    """Three torch.nn.Linear(3, 2, bias=False) after a seed."""
    generator = Generator(seed)
    return tuple(draw_linear(generator, 3, 2, bias=False)[0] for _ in range(3))  # type: ignore[return-value]


def weights(layers: Layers, q: np.ndarray, k: np.ndarray, scale: float | None = None, **settings: Any) -> np.ndarray:
    """q (T, D) and k (S, D) -> attention weights (T, S)."""
    scale = q.shape[1] ** -0.5 if scale is None else scale
    wide = ((0, 0), (0, len(k) - k.shape[1]))  # zeros, which change no score, so that k is as wide as the identity
    q, k = np.pad(q, wide), np.pad(k, wide)
    identity = np.eye(len(k), dtype=np.float32)
    return layers.attention(q[None, None], k[None, None], identity[None, None], scale=scale, **settings)[0, 0]


def attend(layers: Layers, x: np.ndarray, projections: Projections, heads: int = 1, causal: bool = False) -> np.ndarray:
    """x (B, T, I), three weights (O, I) -> context vectors (B, T, O)."""

    def split(y: np.ndarray) -> np.ndarray:
        return y.reshape(*y.shape[:2], heads, -1).transpose(0, 2, 1, 3)  # (B, H, T, O / H)

    y = layers.attention(*(split(layers.linear(x, weight)) for weight in projections), causal=causal)
    return y.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1)


def projected(layers: Layers, projections: Projections) -> tuple[np.ndarray, ...]:
    return tuple(layers.linear(INPUTS, weight) for weight in projections)


@figure("ch03.inputs")
def inputs() -> list:
    return INPUTS.tolist()


@figure("ch03.simple.dot01")
def one_score(layers: Layers) -> float:
    return layers.linear(INPUTS[:1], INPUTS[1:2]).item()


@figure("ch03.simple.attn_weights_2_tmp")
def weights_by_sum(layers: Layers) -> list:
    scores = layers.linear(INPUTS, INPUTS[1:2])[:, 0]
    return (scores / scores.sum()).tolist()


@figure("ch03.simple.context_vec_2")
def context_without_projections(layers: Layers) -> list:
    x = INPUTS[None, None]
    return layers.attention(x, x, x, causal=False, scale=1.0)[0, 0, 1].tolist()


@figure("ch03.simple.attn_scores")
def all_scores(layers: Layers) -> list:
    return layers.linear(INPUTS, INPUTS).tolist()


@figure("ch03.simple.attn_weights")
def all_weights(layers: Layers) -> list:
    return weights(layers, INPUTS, INPUTS, causal=False, scale=1.0).tolist()


@figure("ch03.simple.row_sums")
def row_sums(layers: Layers) -> dict[str, Any]:
    rows = weights(layers, INPUTS, INPUTS, causal=False, scale=1.0)
    return {"row2": rows[1].round(4).sum().item(), "all": rows.sum(axis=-1).tolist()}


@figure("ch03.trainable.kv_shapes")
def shapes_of_keys_and_values(layers: Layers) -> dict[str, list[int]]:
    _, k, v = projected(layers, random_projections())
    return {"k": list(k.shape), "v": list(v.shape)}


@figure("ch03.trainable.query_2")
def query_of_the_second(layers: Layers) -> list:
    return projected(layers, random_projections())[0][1].tolist()


@figure("ch03.trainable.attn_score_22")
def score_of_the_second_with_itself(layers: Layers) -> float:
    q, k, _ = projected(layers, random_projections())
    return layers.linear(q[1:2], k[1:2]).item()


@figure("ch03.trainable.attn_weights_2")
def weights_of_the_second(layers: Layers) -> list:
    q, k, _ = projected(layers, random_projections())
    return weights(layers, q[1:2], k, causal=False)[0].tolist()


@figure("ch03.trainable.context_vec_2")
def context_of_the_second(layers: Layers) -> list:
    return attend(layers, INPUTS[None], random_projections())[0, 1].tolist()


@figure("ch03.self_attention_v1")
def self_attention(layers: Layers) -> list:
    return attend(layers, INPUTS[None], random_projections())[0].tolist()


@figure("ch03.self_attention_v2")
def self_attention_with_linear_layers(layers: Layers) -> list:
    return attend(layers, INPUTS[None], linear_projections())[0].tolist()


@figure("ch03.ex3.1")
def transposed_weights_give_the_same(layers: Layers) -> bool:
    as_parameters = [weight.T.copy() for weight in linear_projections()]  # (in, out), used as x @ W
    first = attend(layers, INPUTS[None], tuple(weight.T for weight in as_parameters))  # type: ignore[arg-type]
    return bool(np.array_equal(first, attend(layers, INPUTS[None], linear_projections())))


@figure("ch03.causal.mask_tril")
def what_a_causal_query_sees(layers: Layers) -> list:
    q, k, _ = projected(layers, linear_projections())
    return (weights(layers, q, k, causal=True) > 0).astype(float).tolist()


@figure("ch03.causal.masked_simple_norm")
def weights_masked_then_normalized(layers: Layers) -> list:
    q, k, _ = projected(layers, linear_projections())
    masked = np.tril(weights(layers, q, k, causal=False))
    return (masked / masked.sum(axis=-1, keepdims=True)).tolist()


@figure("ch03.causal.masked_scores")
def scores_below_the_diagonal(layers: Layers) -> list:
    q, k, _ = projected(layers, linear_projections())
    return [row[: i + 1].tolist() for i, row in enumerate(layers.linear(q, k))]


@figure("ch03.causal.attn_weights")
def causal_weights(layers: Layers) -> list:
    q, k, _ = projected(layers, linear_projections())
    return weights(layers, q, k, causal=True).tolist()


@figure("ch03.dropout.ones")
def dropout_of_ones(layers: Layers) -> list:
    return layers.dropout(np.ones((6, 6), np.float32), 0.5, Generator(123).keep_mask((6, 6), 0.5)).tolist()


@figure("ch03.dropout.attn_weights.given_mask")
def causal_weights_with_dropout(layers: Layers) -> list:
    q, k, _ = projected(layers, linear_projections())
    keep = Generator(123).keep_mask((1, 1, 6, 6), 0.5)
    return weights(layers, q, k, causal=True, rate=0.5, noise=keep).tolist()


@figure("ch03.batch.shape")
def shape_of_the_batch() -> list[int]:
    return list(BATCH.shape)


def side_by_side(layers: Layers, d_out: int) -> np.ndarray:
    """Two causal heads of d_out outputs each, with projections of their own: (2, 6, 2 d_out)."""
    generator = Generator(123)
    heads = [tuple(draw_linear(generator, 3, d_out, bias=False)[0] for _ in range(3)) for _ in range(2)]
    return np.concatenate([attend(layers, BATCH, head, causal=True) for head in heads], axis=-1)  # type: ignore[arg-type]


@figure("ch03.multi_head_wrapper")
def two_heads(layers: Layers) -> list:
    return side_by_side(layers, 2).tolist()


@figure("ch03.ex3.2")
def two_heads_of_size_one(layers: Layers) -> dict[str, Any]:
    y = side_by_side(layers, 1)
    return {"shape": list(y.shape), "out_seed123": y.tolist()}


@figure("ch03.mha.context_vecs")
def multi_head_attention(layers: Layers) -> list:
    generator = Generator(123)
    projections = tuple(draw_linear(generator, 3, 2, bias=False)[0] for _ in range(3))
    out = draw_linear(generator, 2, 2)
    return layers.linear(attend(layers, BATCH, projections, heads=2, causal=True), *out).tolist()  # type: ignore[arg-type]
