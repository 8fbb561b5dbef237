"""How much work a training step is at least: operations that the mathematics asks for, bytes that must be moved.

Of a product of (m, k) by (k, n): 2 m k n operations. Attention's two products of T queries with T keys count half,
being causal. A backward pass has two products for each of the forward's, the gradients of both factors, and attention's
five for its two. What nothing is learnt from has fewer: a frozen weight no gradient of its own, and what lies below the
first parameter that learns none at all. Activations that are computed again cost their blocks' forward pass once more.

Bytes count each number read once and each result written once, in float32.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Collection
from functools import lru_cache
from typing import NamedTuple

from reference.config import GPTConfig
from reference.model import first_trained

__all__ = ["FLOAT", "Work", "cost", "gradients", "spans", "update"]

FLOAT = 4
ATTENTION = 2.0  # what an operation takes there, softmax and small products included, in units of a linear layer's


class Work(NamedTuple):
    """Of one pass."""

    operations: float
    bytes: float

    def least_seconds(self, operations_per_s: float, bytes_per_s: float) -> float:
        """What a machine of these ceilings takes at least: its roofline."""
        return max(self.operations / operations_per_s, self.bytes / bytes_per_s)

    @property
    def intensity(self) -> float:
        """Operations for each byte."""
        return self.operations / self.bytes


def gradients(
    config: GPTConfig, batch: int, length: int, trained: Collection[str] | None = None, recomputed: bool = False
) -> Work:
    """Forward and backward pass of a whole model. Bytes: each parameter read twice, each gradient written once.

    `trained`: the names of the parameters that learn; None: all. `recomputed`: blocks' activations are not kept.
    """
    tokens, shapes = batch * length, config.parameter_shapes()
    learns = set(shapes if trained is None else trained)
    first = first_trained(config, None if trained is None else learns)
    attention = _attention(config, batch, length)
    operations = 0.0
    for name, shape in _matrices(config, shapes).items():
        product = 2 * tokens * math.prod(shape)
        block = int(name.split(".")[1]) if name.startswith("blocks.") else config.n_layers
        passes = 1 + recomputed * (first <= block < config.n_layers)
        if block >= first:
            passes += 1 + (name in learns)  # of its input, and its own
        operations += passes * product
    differentiated = config.n_layers - max(first, 0)
    operations += attention * (config.n_layers + (2.5 + recomputed) * differentiated)
    learning = sum(math.prod(shapes[name]) for name in learns)
    return Work(operations, FLOAT * (2 * config.n_parameters + learning))


def cost(config: GPTConfig, length: int) -> float:
    """Operations of a text's forward and backward pass in NumPy, those of attention as often as they take longer."""
    attention = 3.5 * config.n_layers * _attention(config, 1, length)
    return gradients(config, 1, length).operations + (ATTENTION - 1) * attention


@lru_cache
def spans(config: GPTConfig, length: int, number: int) -> list[slice]:
    """So many runs of a text's positions, fewer of a short text. Of the same cost: later ones see more and are shorter.

    The last ends with None.
    """
    whole = cost(config, length)
    borders = sorted(
        {bisect_left(range(length - 1), n / number * whole, key=lambda end: cost(config, end)) for n in range(number)}
    )
    return [slice(*border) for border in zip(borders, [*borders[1:], None], strict=True)]


def update(config: GPTConfig, trained: Collection[str] | None = None) -> Work:
    """Clipping and AdamW: the gradients are read for their norm, then parameters, gradients and two moments read, and
    all but the gradients written. 2 operations an entry for the norm, 14 for the step.
    """
    shapes = config.parameter_shapes()
    n = sum(math.prod(shapes[name]) for name in (shapes if trained is None else trained))
    return Work(16 * n, 8 * FLOAT * n)


def _attention(config: GPTConfig, batch: int, length: int) -> float:
    """Operations of q k^T and p v in one layer, (T, D) by (D, T) a head."""
    return 4 * batch * length**2 * config.n_heads * config.head_dim / 2


def _matrices(config: GPTConfig, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The weights that tokens are multiplied by; a tied head's by the embedding's name."""
    names = [name for name, shape in shapes.items() if len(shape) == 2 and not name.endswith("_emb.weight")]
    found = {name: shapes[name] for name in names}
    if config.tie_embeddings:
        found["tok_emb.weight"] = shapes["tok_emb.weight"]
    return found
