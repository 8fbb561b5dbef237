"""The report's data: every station of a pass, forward and backward, with its formulas, code, numbers and proofs.

A tensor has its own name as its key, its gradient "d." before it, and what lies inside a station the station's name and
">" before its name in the equations. A model that is too large for a page is cut: some of its blocks, and of each axis
the first entries; the page says so, and its sums say what they lack.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gpt.study.broken import broken_of
from gpt.study.equations import Equation
from gpt.study.flash import flash_of
from gpt.study.flow import flow
from gpt.study.heads import heads
from gpt.study.laboratory import laboratory_of
from gpt.study.laws import laws_of
from gpt.study.page import pack, write
from gpt.study.proofs import proofs_of
from gpt.study.record import Recording, Step, differences_to_model, record
from gpt.study.source import code_of, document_of
from gpt.study.subject import Subject
from gpt.study.training import training
from reference.config import GPTConfig

__all__ = ["build", "station", "write_report"]

Progress = Callable[[str], None]
MOST_NUMBERS = 220_000  # of the stations' tensors: 2.4 MB of a page
LIMITS = (64, 48, 32, 24, 16, 12, 8, 6, 4)  # of an axis that is cut
MOST_BLOCKS = 3
SCRIPTS = (
    "equations", "inspector", "path", "bars", "attention", "flash", "training", "flow", "laboratory", "defects",
)  # fmt: skip

TITLES = {
    "tok_emb": "Token embedding", "pos_emb": "Position embedding", "emb": "Tokens and positions", "head": "Output head",
    "final_norm": "Final norm", "loss": "Loss", "norm1": "Norm before attention", "norm2": "Norm before the MLP",
    "query": "Query projection", "key": "Key projection", "value": "Value projection", "out": "Output projection",
    "joined": "Heads joined", "up": "Up projection", "gate": "Gate projection", "down": "Down projection",
    "act": "Activation", "shortcut1": "Shortcut past attention", "shortcut2": "Shortcut past the MLP",
    "dropout": "Dropout", "rope": "Rotary position", "linear": "Frozen linear layer", "lora": "Low-rank adapter",
}  # fmt: skip


def write_report(path: Path, subject: Subject, progress: Progress = lambda what: None) -> dict[str, Any]:
    """Write the page; returns its data. `progress` is told what is being computed."""
    data = build(subject, progress)
    write(path, data["title"], data, SCRIPTS)
    return data


def build(subject: Subject, progress: Progress = lambda what: None) -> dict[str, Any]:
    """Everything that the page shows."""
    progress("both passes")
    recording = record(subject.config, subject.params, subject.tokens, subject.targets, subject.noise)
    compared, different = differences_to_model(recording, subject.noise)
    steps, notes = _shown(recording)
    limit, complete = _limit(steps)
    if not complete:
        notes.append(f"Of each tensor the first {limit} entries along each axis are on this page.")
    tensors: dict[str, dict[str, Any]] = {}
    progress("laws")
    laws = laws_of(recording, subject.noise, steps)
    progress("finite differences of the loss")
    proofs = proofs_of(recording)
    stations = [
        station(step, recording, tensors, limit)
        | {"laws": laws.get(step.name, []), "proofs": proofs.get(step.name, [])}
        for step in steps
    ]
    return {
        "title": f"Every gradient of {subject.name}",
        "text": "".join(subject.labels),
        "notes": notes,
        "model": _facts(subject),
        "tokens": subject.labels[:-1],
        "targets": subject.labels[1:],
        "vocabulary": subject.vocabulary,
        "loss": recording.loss,
        "checked": {"tensors": compared, "different": different},
        "complete": complete and len(steps) == len(recording.steps),
        "tensors": tensors,
        "stations": stations,
        "contributions": {
            f"d.{of}": [{"station": name, "local": f"d{a}", "key": f"{name}>d{a}"} for name, a, _ in parts]
            for of, parts in recording.contributions.items()
            if len(parts) > 1 and f"d.{of}" in tensors
        },
        "sections": _sections(subject, recording, progress),
    }


def _sections(subject: Subject, recording: Recording, progress: Progress) -> dict[str, Any]:
    """What follows the path, each from a module of its own."""
    labels, snapshots = subject.labels[:-1], subject.snapshots.items()
    batch = subject.tokens, subject.targets
    sections: dict[str, Callable[[], dict[str, Any]]] = {
        "attention": lambda: heads(recording, labels),
        "flash": lambda: flash_of(recording),
        "training": lambda: training(subject.config, snapshots, *batch, labels, subject.spell, subject.curve),
        "flow": lambda: flow(recording),
        "laboratory": lambda: laboratory_of(recording),
        "defects": lambda: broken_of(recording, subject.noise),
    }
    found = {}
    for name, section in sections.items():
        progress(name)
        found[name] = section()
    return found


def station(step: Step, recording: Recording, tensors: dict[str, dict[str, Any]], limit: int) -> dict[str, Any]:
    """One operation for the page; its tensors are added to `tensors`."""
    wires = {}
    for local, value in step.values.items():
        if isinstance(value, np.ndarray):
            key = _key(step, recording, local)
            wires[local] = key
            total = recording.gradients[key[2:]] if key.startswith("d.") else value
            tensors.setdefault(key, pack(total, tuple(min(n, limit) for n in total.shape)))
    for argument in step.gradients:  # the sum, where the station's own is a part of it
        of = step.operation.tensors[argument]
        gradient = recording.gradients[of]
        tensors.setdefault(f"d.{of}", pack(gradient, tuple(min(n, limit) for n in gradient.shape)))
    parts = step.name.split(".")
    return {
        "name": step.name,
        "title": title_of(step.name),
        "layer": step.operation.layer,
        "block": int(parts[1]) if parts[0] == "blocks" else None,
        "forward": [_equation(equation) for equation in step.derivation.forward],
        "backward": [_equation(equation) for equation in step.derivation.backward],
        "wires": wires,
        "constants": {name: float(v) for name, v in step.values.items() if isinstance(v, (int, float))},
        "code": code_of(step.operation),
        "doc": document_of(step.operation),
    }


def title_of(name: str) -> str:
    """An operation's name in words."""
    *before, last = name.split(".")
    if not before:  # a layer alone, too
        return TITLES.get(last) or last.replace("_", " ").capitalize()
    if last == "heads":
        return "Attention" if before[-1] == "attn" else f"{before[-1].capitalize()} in heads"
    if last == "rope":
        return f"Rotary position of the {before[-1]}"
    if last in ("linear", "lora"):
        return f"{TITLES[last]}: {before[-1]}"
    return TITLES[last]


def _key(step: Step, recording: Recording, local: str) -> str:
    operation = step.operation
    if local in operation.tensors:
        return operation.tensors[local]
    if local == step.result:
        return step.name
    if local == f"d{step.result}":
        return f"d.{step.name}"
    argument = local[1:]
    if local.startswith("d") and argument in step.gradients:
        of = operation.tensors[argument]
        if len(recording.contributions[of]) == 1:
            return f"d.{of}"
    return f"{step.name}>{local}"


def _equation(equation: Equation) -> dict[str, Any]:
    return {
        "tensor": equation.tensor,
        "indices": equation.indices,
        "mathml": equation.mathml,
        "tree": equation.tree,
        "text": equation.text,
    }


def _shown(recording: Recording) -> tuple[list[Step], list[str]]:
    """The steps that a page has room for, and what it says of the others."""
    layers = recording.config.n_layers
    if layers <= MOST_BLOCKS + 1:
        return recording.steps, []
    blocks = {*range(MOST_BLOCKS - 1), layers - 1}
    steps = [s for s in recording.steps if not s.name.startswith("blocks.") or int(s.name.split(".")[1]) in blocks]
    return steps, [f"Of {layers} blocks, {', '.join(map(str, sorted(blocks)))} are on this page; all were computed."]


def _limit(steps: list[Step]) -> tuple[int, bool]:
    """How many entries of an axis there is room for, and whether nothing is cut."""
    shapes = {id(v): v.shape for step in steps for v in step.values.values() if isinstance(v, np.ndarray)}.values()
    if sum(map(math.prod, shapes)) <= MOST_NUMBERS:
        return max(max(shape, default=1) for shape in shapes), True
    for limit in LIMITS:
        if sum(math.prod(min(n, limit) for n in shape) for shape in shapes) <= MOST_NUMBERS:
            break
    return limit, False


def _facts(subject: Subject) -> dict[str, Any]:
    config: GPTConfig = subject.config
    facts = {
        "parameters": f"{config.n_parameters:,}",
        "blocks": config.n_layers,
        "width": config.emb_dim,
        "heads": config.n_heads if config.n_kv_heads == config.n_heads else f"{config.n_heads} on {config.n_kv_heads}",
        "vocabulary": f"{config.vocab_size:,}",
        "steps trained": max(subject.snapshots) if len(subject.snapshots) > 1 else None,
        "dropout": config.attn_dropout if subject.noise else None,
    }
    return {name: value for name, value in facts.items() if value is not None}
