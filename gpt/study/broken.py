"""The recorded pass with known mistakes in it, one at a time: which tensors go wrong, in the order of execution.

The mistakes are those that the checks are checked with (gpt/parity/defects.py). Each is planted in the source of the
reference, the model is run forward and backward on the same numbers, and every tensor of that pass is held against the
sound one. Beside it stands what looser tests would have said of the same mistake: one that compares shapes, one with an
absolute tolerance on this model as GPT-2 begins, with weights of 0.02, norms of 1 and biases of 0, and one of the layer
alone with inputs of 0.02 and all-ones upstream gradients.
"""

from __future__ import annotations

import difflib
from typing import Any

import numpy as np

from gpt.engine import Arrays, Noise
from gpt.parity import defects
from gpt.parity.defects import DEFECTS, Defect
from gpt.parity.gates import error_of
from gpt.parity.laws import EXACT
from gpt.parity.model import KEY_BIAS
from gpt.study.page import pack
from gpt.study.record import PLAIN, Recording, trace_model
from reference.init import initialize
from reference.torch_rng import Generator

__all__ = ["broken_of"]

BUDGET = 4e10  # multiplications: seconds
ROWS, COLUMNS = 24, 48  # of the map of a difference


def broken_of(recording: Recording, noise: Noise | None = None, budget: float = BUDGET) -> dict[str, Any]:
    """The tensors of a pass by name, and for each mistake that shows in this model their errors; and the others.

    `noise` is what the pass was recorded with. No mistakes, and why, for a model too large for `budget`.
    """
    config, tensors = recording.config, recording.tensors
    tokens, targets = tensors["tokens"], tensors["targets"]
    layers = {step.operation.layer for step in recording.steps} - set(PLAIN) | {"model"}
    chosen = [defect for defect in DEFECTS if defect.module in layers]
    others = [
        {"name": defect.name, "file": defect.file, "why": f"{defect.file} plays no part in this pass"}
        for defect in DEFECTS
        if defect.module not in layers and not defect.module.startswith("kernels.")
    ]
    if len(chosen) * 6 * config.n_parameters * tokens.size > budget:
        why = f"{len(chosen)} passes of a model with {config.n_parameters:,} parameters take minutes."
        return {"names": [], "defects": [], "others": others, "why": why}
    params = {name: tensors[name] for name in config.parameter_shapes()}
    small = {name: value.astype(np.float64) for name, value in initialize(config, Generator(0), "gpt2").items()}
    sound, sound_small = (trace_model(config, given, tokens, targets, noise) for given in (params, small))
    alone = {check: defects.loose_test(check) for check in dict.fromkeys(defect.check for defect in chosen)}
    shown = []
    for defect in chosen:
        with defect.seeded(), np.errstate(all="ignore"):
            try:
                wrong = trace_model(config, params, tokens, targets, noise)
                wrong_small = trace_model(config, small, tokens, targets, noise)
            except (ValueError, IndexError) as error:  # shapes that no longer fit
                others.append({"name": defect.name, "file": defect.file, "why": f"it stops the pass: {error}"})
                continue
            wrong_alone = defects.loose_test(defect.check)
        errors = [_error(wrong[name], sound[name], name, sound) for name in sound]
        first = next((i for i, error in enumerate(errors) if not error <= EXACT), None)
        if first is None:
            others.append(
                {
                    "name": defect.name,
                    "file": defect.file,
                    "why": f"it changes no number of this pass; it shows in {defect.check}",
                }
            )
            continue
        name = list(sound)[first]
        shown.append(
            {
                "name": defect.name,
                "file": defect.file,
                **_lines(defect),
                "first": name,
                "errors": [float(f"{error:.4g}") for error in errors],
                "loss": float(wrong["loss"]),
                "map": _map(wrong[name], sound[name]),
                "check": defect.check,
                "caught_at": defect.tensor,
                "noticed": {
                    "shapes": any(wrong[name].shape != sound[name].shape for name in sound),
                    "small": defects.differs_loosely(wrong_small, sound_small),
                    "alone": defects.differs_loosely(wrong_alone, alone[defect.check]),
                },
            }
        )
    return {"names": list(sound), "loss": recording.loss, "bound": EXACT, "defects": shown, "others": others, "why": ""}


def _error(wrong: np.ndarray, true: np.ndarray, name: str, sound: Arrays) -> float:
    """Relative to the tensor's largest entry; of the key's bias, whose true gradient is 0, to its weight's."""
    size = sound[name.replace("bias", "weight")] if name.endswith(KEY_BIAS) else true
    return error_of(wrong, true, size)


def _lines(defect: Defect) -> dict[str, Any]:
    """Where the source was altered: the first line's number, and the lines before and after, each with its sign."""
    altered = defect.altered_source().splitlines()
    sound = defect.source().splitlines()
    lines: list[list[str]] = []
    first = 0
    for tag, a, b, c, d in difflib.SequenceMatcher(None, sound, altered, autojunk=False).get_opcodes():
        if tag != "equal":
            first = first or a + 1
            lines += [["-", line] for line in sound[a:b]] + [["+", line] for line in altered[c:d]]
    return {"line": first, "diff": lines}


def _map(wrong: np.ndarray, sound: np.ndarray) -> dict[str, Any] | None:
    """The part of their difference around its largest entry: along the last two axes, at these places of the others.
    None of two of other shapes."""
    if wrong.shape != sound.shape:
        return None
    difference = wrong - sound
    magnitude = np.nan_to_num(np.abs(difference), nan=np.inf)
    at = [int(i) for i in np.unravel_index(np.argmax(magnitude), difference.shape)]
    table = np.atleast_2d(difference[tuple(at[:-2])])
    starts = [
        max(0, min(i - size // 2, n - size))
        for i, size, n in zip([0, 0, *at][-2:], (ROWS, COLUMNS), table.shape, strict=True)
    ]
    part = table[starts[0] : starts[0] + ROWS, starts[1] : starts[1] + COLUMNS]
    return {"index": at[:-2], "shape": difference.shape, "starts": starts, **pack(part)}
