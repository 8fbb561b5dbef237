"""What the page shows of attention: every head's matrices on a text, and the laws that hold in them.

scores       s = q k^T scale, of every query with every key, before anything is hidden
p            softmax(s) over the keys up to the query: each row divides 1, and above the diagonal stands 0
dropped      p as dropout leaves it: some weights 0, the others divided by 1 - rate
by distance  of a head, the mean of p[t, t - d] over the queries t that have a key d tokens back
influence    how far a layer's output at query t moves, at most, when key and value of token s turn into their
             negatives: with the mask exactly 0 where s comes after t, which is the causal law

The numbers are the layer's own, from one recorded pass; only what the layer never computes, attention of changed tokens
and without a mask, is computed by calling it again. Softmax(s) without the mask the page computes itself, from s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpt.study.page import pack
from gpt.study.record import Recording, Step
from reference import attention

__all__ = ["MOST_NUMBERS", "by_distance", "heads", "influence", "layers_that_fit", "matrices", "weights"]

MOST_NUMBERS = 60_000  # of the section's matrices: 0.6 MB of a page
ROWS_SUM_TO_1 = 1e-12


def heads(recording: Recording, labels: Sequence[str], most: int = MOST_NUMBERS) -> dict[str, Any]:
    """The section's data, of the first text of the batch. `labels`: what the T tokens are called.

    Where all matrices together have more than `most` entries, some layers are left out, and `note` says which are here.
    """
    config, T = recording.config, recording.tensors["tokens"].shape[1]
    dropout = _step(recording, 0).arguments["noise"] is not None
    layers = layers_that_fit(config.n_layers, config.n_heads * T * T * (3 if dropout else 2), most)
    parts = [matrices(recording, layer) for layer in layers]
    stacked = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
    p = weights(recording)
    moved = [np.stack([influence(_step(recording, layer), causal) for layer in layers]) for causal in (True, False)]
    ahead = [float(np.triu(part, 1).max()) for part in moved]
    return {
        "layers": layers,
        "note": shown_layers(layers, config.n_layers),
        "labels": list(labels[:T]),
        "rate": config.attn_dropout if dropout else 0.0,
        "matrices": {name: pack(array) for name, array in stacked.items()},
        "by_distance": pack(by_distance(p)),
        "uniform": pack(by_distance(np.tril(np.ones((1, 1, T, T))) / np.arange(1, T + 1)[:, None])[0, 0]),
        "laws": laws(p),
        "influence": {"masked": pack(moved[0]), "unmasked": pack(moved[1])},
        "ahead": {"masked": ahead[0], "unmasked": ahead[1]},  # the furthest that an output before the change moves
    }


def matrices(recording: Recording, layer: int) -> dict[str, np.ndarray]:
    """Of a layer "scores", "p" and, where dropout is on, "dropped", each (H, T, T)."""
    step = _step(recording, layer)
    found = {"scores": step.values["scores"][0], "p": attention.weights(step.saved)[0]}
    if step.arguments["noise"] is not None:
        found["dropped"] = attention.weights(step.saved, dropped=True)[0]
    return found


def weights(recording: Recording) -> np.ndarray:
    """The attention of every layer and head as the model computed with it, before dropout, (L, H, T, T)."""
    steps = [_step(recording, layer) for layer in range(recording.config.n_layers)]
    return np.stack([attention.weights(step.saved)[0] for step in steps])


def by_distance(p: np.ndarray) -> np.ndarray:
    """p (..., T, T) -> (..., T): the mean weight of the key d tokens back, over the queries that have one."""
    T = p.shape[-1]
    return np.stack([np.diagonal(p, -d, axis1=-2, axis2=-1).mean(axis=-1) for d in range(T)], axis=-1)


def influence(step: Step, causal: bool) -> np.ndarray:
    """(T, T), [t, s]: the most that an entry of the output at t changes when key and value of s become negative."""
    q, k, v = (step.arguments[name][:1] for name in ("q", "k", "v"))
    y, T = attention.forward(q, k, v, causal)[0], q.shape[2]
    moved = np.empty((T, T))
    for s in range(T):
        sign = np.where(np.arange(T) == s, -1.0, 1.0)[:, None]
        changed = attention.forward(q, k * sign, v * sign, causal)[0]
        moved[:, s] = np.abs(changed - y).max(axis=(0, 1, 3))
    return moved


def laws(p: np.ndarray) -> list[dict[str, Any]]:
    """What holds of every matrix of attention p (L, H, T, T), measured over all of them."""
    rows, ahead = np.abs(p.sum(axis=-1) - 1).max(), np.triu(p, 1).max()
    first = np.abs(p[..., 0, 0] - 1).max()
    return [
        {"name": "every row sums to 1", "error": float(rows), "passed": bool(rows <= ROWS_SUM_TO_1)},
        {"name": "nothing above the diagonal", "error": float(ahead), "passed": bool(ahead == 0)},
        {"name": "the first token sees itself alone", "error": float(first), "passed": bool(first == 0)},
    ]


def layers_that_fit(n_layers: int, numbers: int, most: int) -> list[int]:
    """The layers that there is room for when each takes so many numbers: all, or some from the first to the last."""
    room = max(1, min(n_layers, most // max(1, numbers)))
    return sorted({int(layer) for layer in np.linspace(0, n_layers - 1, room).round()})


def shown_layers(layers: Sequence[int], n_layers: int) -> str:
    """What a page says when some layers are left out; nothing where all are there."""
    if len(layers) == n_layers:
        return ""
    return f"Of {n_layers} layers, {', '.join(map(str, layers))} are shown here."


def _step(recording: Recording, layer: int) -> Step:
    return recording.step(f"blocks.{layer}.attn.heads")
