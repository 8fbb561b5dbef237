"""The laws that a pass obeys, held against its own numbers: no other implementation is needed to know.

What holds of a layer is measured as `twingrad check` measures it (gpt/parity/laws.py), only that the layer's arguments
and the gradient that arrived are those of this pass. What holds of the model, because of how its layers are put
together, is here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

from gpt.engine import Noise
from gpt.parity import laws, ops
from gpt.parity.laws import EXACT, Measure, relative
from gpt.parity.model import KEY_BIAS
from gpt.parity.subjects import Reference
from gpt.study.record import PLAIN, Recording, Step, layer_of
from reference import attention, cross_entropy, model

__all__ = ["laws_of"]

Entry: TypeAlias = dict[str, Any]


class _Recorded(Reference):
    """The reference's layers, and what lies between them, which is no module of its own."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def execute(self, row: ops.Row, arguments: Any, dy: Any) -> dict[str, np.ndarray]:
        layer = layer_of(self.step.operation)
        y, saved = layer.forward(**arguments)
        returned = layer.backward(dy[0], saved)
        returned = returned if isinstance(returned, tuple) else (returned,)
        found = {row.results[0]: np.asarray(y)}
        return found | {f"d{name}": gradient for name, gradient in zip(row.gradients, returned, strict=False)}

    def forward(self, row: ops.Row, arguments: Any) -> tuple[np.ndarray, ...]:
        return (np.asarray(layer_of(self.step.operation).forward(**arguments)[0]),)


class _Problem(ops.Problem):
    """A layer's arguments in a model differ in size, 0.02 and 1 say: the step is a small one to the smallest."""

    def step(self) -> float:
        sizes = [float(np.abs(x).max()) for x in self.inputs().values()]
        return 1e-5 * min([size for size in sizes if size], default=1.0)


def laws_of(
    recording: Recording, noise: Noise | None = None, steps: Sequence[Step] | None = None
) -> dict[str, list[Entry]]:
    """Of each operation by name: what was measured, the error, its bound, whether it is within, and why it must be.

    `noise` is what the pass was recorded with; `steps`, if given, are those that are measured. An error that is no
    number has not passed.
    """
    steps = recording.steps if steps is None else steps
    found: dict[str, list[Entry]] = {step.name: [] for step in steps}
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        for step in steps:
            problem = _problem(step)
            for law in problem.row.laws:
                found[step.name] += _entries(law(problem), law.__doc__)
        for name, law_doc, measures in _of_the_model(recording, noise):
            if name in found:
                found[name] += _entries(measures, law_doc)
    return found


def _entries(measures: Iterator[Measure], doc: str | None) -> list[Entry]:
    why = " ".join((doc or "").split())
    return [
        {
            "name": name,
            "error": error if math.isfinite(error) else None,
            "bound": bound,
            "passed": error <= bound,
            "doc": why,
        }
        for name, error, bound in measures
    ]


def _problem(step: Step) -> _Problem:
    """The step as the table of operators would have it: the first row of its layer says which laws it obeys."""
    operation = step.operation
    rows = (row for row in ops.ROWS.values() if row.layer == operation.layer)
    known = None if operation.layer in PLAIN else next(rows, None)
    gradients = operation.differentiable
    if known is not None:  # with what is None here: its place among the gradients is kept
        gradients = tuple(name for name in known.gradients if name in step.arguments)
    row = ops.Row(
        name=operation.layer,
        layer=operation.layer,
        draw=lambda rng, case: step.arguments,
        gradients=gradients,
        cases=(),
        rounding=(),
        laws=known.laws if known is not None else (laws.adjoint,),
        results=(step.result,),
        subject=_Recorded(step),
    )
    return _Problem(row, "rows", step.arguments, step.dy)


# What holds of the model.


def _of_the_model(recording: Recording, noise: Noise | None) -> Iterator[tuple[str, str | None, Iterator[Measure]]]:
    """Operation, why, measures."""
    config = recording.config
    logits = recording.steps[-1].operation.tensors["logits"]
    for step in recording.steps:
        layer = step.operation.layer
        if layer == "attention":
            yield step.name, softmax_rows.__doc__, softmax_rows(step)
            yield step.name, score_rows.__doc__, score_rows(step)
        if config.position == "learned" and step.operation.tensors.get("bias", "").endswith(KEY_BIAS):
            yield step.name, key_bias.__doc__, key_bias(step)
        if layer == "linear" and step.name in (logits, f"{logits}.linear"):
            yield step.name, laws.weight_shift.__doc__, laws.weight_shift(_problem(step))
        if layer == "dropout":
            yield step.name, dropped.__doc__, dropped(step)
    yield logits, future.__doc__, future(recording, noise)
    if len(recording.contributions["tok_emb.weight"]) > 1:
        yield "tok_emb", tied.__doc__, tied(recording, noise)


def softmax_rows(step: Step) -> Iterator[Measure]:
    """A query divides 1 over the keys up to its own: its weights sum to 1, and those of later keys are 0."""
    p = attention.weights(step.saved)
    T, S = p.shape[-2:]
    yield "rows of p sum to 1", relative(p.sum(axis=-1) - 1, 1.0), EXACT
    yield "p of later keys", float(np.count_nonzero(p[..., np.triu(np.ones((T, S), bool), 1 + S - T)])), 0.0


def score_rows(step: Step) -> Iterator[Measure]:
    """Softmax looks at differences alone, so that a number added to all scores of a row changes nothing: its gradients
    sum to 0."""
    values = step.values
    terms = np.abs(values["p"] * values["dp"]).sum(axis=-1)
    yield "rows of dscores sum to 0", relative(values["dscores"].sum(axis=-1), terms), EXACT


def key_bias(step: Step) -> Iterator[Measure]:
    """The key's bias adds the same number to all scores of a query, which softmax takes away again: its gradient is 0,
    and what is left is rounding, measured against its weight's gradient."""
    yield "gradient of the key's bias", relative(step.gradients["bias"], step.gradients["weight"]), EXACT


def dropped(step: Step) -> Iterator[Measure]:
    """What was dropped passes no gradient on."""
    yield "dx where y was dropped", float(np.count_nonzero(step.gradients["x"][~step.saved[0]])), 0.0


def future(recording: Recording, noise: Noise | None) -> Iterator[Measure]:
    """Attention is causal: the tokens from the middle on exchanged for others, no earlier position's logits change, not
    one bit."""
    config, tensors = recording.config, recording.tensors
    params = {name: tensors[name] for name in config.parameter_shapes()}
    tokens = tensors["tokens"]
    half = max(1, tokens.shape[1] // 2)
    other = tokens.copy()
    other[:, half:] = (other[:, half:] + 1) % config.vocab_size
    before, after = (model.forward(params, config, given, noise, keep=False)[0][:, :half] for given in (tokens, other))
    yield "logits before an exchanged token", float(np.count_nonzero(before != after)), 0.0


def tied(recording: Recording, noise: Noise | None) -> Iterator[Measure]:
    """The embedding is the head as well: the engine's gradient of it is the sum of what both uses ask for."""
    config, tensors = recording.config, recording.tensors
    params = {name: tensors[name] for name in config.parameter_shapes()}
    logits, saved = model.forward(params, config, tensors["tokens"], noise)
    _, saved_loss = cross_entropy.forward(logits, tensors["targets"])
    whole = model.backward(cross_entropy.backward(1.0, saved_loss), saved)["tok_emb.weight"]
    parts = [gradient for _, _, gradient in recording.contributions["tok_emb.weight"]]
    yield "gradients of head and embedding added up", relative(sum(parts) - whole, whole), EXACT
