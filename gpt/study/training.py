"""What the page shows of training: the same text through the model as it was at each snapshot.

At each: the loss, every head's attention, the norm of every parameter's gradient, and for each position the token that
the model would have said next. All of it is recorded anew from the snapshot's parameters, without dropout, so that the
numbers of two steps differ by what was learnt between them alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from gpt.engine import Arrays
from gpt.errors import UserError
from gpt.study.heads import MOST_NUMBERS, layers_that_fit, shown_layers, weights
from gpt.study.page import pack
from gpt.study.record import Recording, record
from reference.config import GPTConfig
from reference.optim import global_norm

__all__ = ["gradient_norms", "predictions", "training"]


def training(
    config: GPTConfig,
    snapshots: Iterable[tuple[int, Arrays]],
    tokens: np.ndarray,
    targets: np.ndarray,
    labels: Sequence[str],
    spell: Callable[[int], str],
    curve: Sequence[tuple[int, float]] = (),
    most: int = MOST_NUMBERS,
) -> dict[str, Any]:
    """The section's data from (steps taken, parameters) in any order; tokens and targets are (1, T).

    `labels`: what the tokens of the text are called; `spell`: what any id of the vocabulary is. `curve`: the losses
    that the run logged, if it did. UserError where there is no snapshot.
    """
    models = sorted(snapshots, key=lambda pair: pair[0])
    if not models:
        raise UserError("snapshots: expected at least one, got none; train with --study-every N")
    T = tokens.shape[1]
    layers = layers_that_fit(config.n_layers, len(models) * config.n_heads * T * T, most)
    losses, attention, norms, said = [], [], [], []
    for _, params in models:
        recording = record(config, params, tokens, targets)
        losses.append(recording.loss)
        attention.append(weights(recording)[layers])
        norms.append(gradient_norms(recording))
        said.append(predictions(recording))
    names = list(norms[0])
    by_parameter = np.array([[norm[name] for name in names] for norm in norms])
    return {
        "steps": [step for step, _ in models],
        "losses": losses,
        "curve": [list(point) for point in curve],
        "labels": list(labels[:T]),
        "targets": [spell(int(target)) if target >= 0 else "" for target in targets[0]],
        "layers": layers,
        "note": shown_layers(layers, config.n_layers),
        "attention": pack(np.stack(attention)),
        "parameters": names,
        "norms": pack(by_parameter),
        "global_norms": [float(np.sqrt(np.sum(row**2))) for row in by_parameter],
        "said": [[spell(int(token)) for token in top] for top, _, _ in said],
        "probabilities": pack(np.stack([probability for _, probability, _ in said])),
        "target_probabilities": pack(np.stack([of_target for _, _, of_target in said])),
    }


def gradient_norms(recording: Recording) -> dict[str, float]:
    """The L2 norm of each parameter's gradient, by name."""
    return {name: global_norm({name: recording.gradients[name]}) for name in recording.config.parameter_shapes()}


def predictions(recording: Recording) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each position of the first text: the likeliest next token, its probability, the target's (nan where none
    counts); each (T,)."""
    logits, targets = recording.step("loss").arguments["logits"][0], recording.tensors["targets"][0]
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p = e / e.sum(axis=-1, keepdims=True)
    positions, top = np.arange(len(p)), p.argmax(axis=-1)
    return top, p[positions, top], np.where(targets >= 0, p[positions, np.maximum(targets, 0)], np.nan)
