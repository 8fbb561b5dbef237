"""How much work a layer is at least, as gpt/work.py counts that of a whole model: operations that the mathematics asks
for, and bytes that must go to and from memory.

Bytes count each input read once and each result written once, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from gpt.work import FLOAT, Work, gradients, update

__all__ = ["FLOAT", "LAYERS", "Work", "gradients", "update"]


def _linear(O: int, B: int, T: int, I: int) -> tuple[Work, Work]:  # noqa: E741
    product, x, w, y = 2 * B * T * I * O, B * T * I, O * I, B * T * O
    return Work(product, FLOAT * (x + w + y)), Work(2 * product, FLOAT * (2 * x + 2 * w + y))


def _attention(B: int, H: int, G: int, T: int, S: int, D: int) -> tuple[Work, Work]:
    forward, q, k = 4 * B * H * T * S * D / 2, B * H * T * D, B * G * S * D
    return Work(forward, FLOAT * (2 * q + 2 * k)), Work(2.5 * forward, FLOAT * (4 * q + 4 * k))


def _elements(operations: tuple[int, int], tensors: tuple[int, int]) -> Callable[..., tuple[Work, Work]]:
    """A layer of so many operations an entry and so many tensors like x read and written, forward and backward."""

    def work(*shape: int) -> tuple[Work, Work]:
        size = math.prod(shape)
        forward, backward = (Work(o * size, FLOAT * t * size) for o, t in zip(operations, tensors, strict=True))
        return forward, backward

    return work


# Operator -> sizes as in bench/test_layers.py -> work forward and backward.
LAYERS: dict[str, Callable[..., tuple[Work, Work]]] = {
    "linear": _linear,
    "attention": _attention,
    "attention-grouped": _attention,
    "layer_norm": _elements((7, 11), (2, 3)),  # x; y      dy, x; dx
    "add_layer_norm": _elements((8, 12), (4, 4)),  # x, residual; y, total      dy, dtotal, total; dx
    "rms_norm": _elements((4, 8), (2, 3)),
    "add_rms_norm": _elements((5, 9), (4, 4)),
    "swiglu": _elements((5, 10), (3, 5)),  # gate, up; y      dy, gate, up; dgate, dup
    "gelu": _elements((5, 9), (2, 3)),
    "gelu-tanh": _elements((9, 15), (2, 3)),
    "bias_gelu-tanh": _elements((10, 16), (2, 3)),
    "rope": _elements((3, 3), (2, 2)),
    "rope-interleaved": _elements((3, 3), (2, 2)),
    "dropout": _elements((1, 1), (2, 2)),
    "cross_entropy": _elements((4, 3), (1, 2)),  # logits      logits; dlogits
}
