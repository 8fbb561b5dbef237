"""A training step (forward, backward, clip, AdamW) of the NumPy engine against PyTorch's and its peers', on this CPU.

Each contestant has a process of its own, so that their thread pools do not disturb each other, and they take their
steps in turns (process.py). A ratio is taken round by round, and its median is what counts. Contestants are

    numpy           our engine
    torch           our PyTorch engine, eager
    torch compiled  the same with torch.compile
    plain           GPT-2 and its loop in plain PyTorch (plain.py), AdamW as it comes
    plain fused     the same with AdamW(fused=True)
    transformers    such a loop around transformers' model of the same sizes

Where `plain` cannot be (a Llama), it is left out. All have the same weights and learn the same tokens, and a
contestant whose first loss is another is an error: it would be no peer. Steps that finetune are among the cases; with
adapters, a step is held against one of the whole model too. Generation is in generate.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bench import ceilings, generate, results, stats
from bench.contest import ENGINES, show, summary
from bench.process import SESSIONS, model_settings, take_turns
from gpt.engine import optimizer_shapes, trained_names
from gpt.errors import UserError, check_installed, is_installed
from reference.config import PRESETS, GPTConfig

EVERY = (*ENGINES, "torch compiled", "plain", "plain fused", "transformers")
AGREEMENT = 1e-3  # of the loss before the first step: far more than rounding, far less than another model


@dataclass(frozen=True)
class Case:
    """One model and batch; the most of a peer's time, by its name, and of PyTorch's memory that NumPy may take."""

    preset: str
    batch: int
    length: int
    rounds: int  # of a session
    targets: Mapping[str, float]
    memory_target: float = 1.25
    changes: Mapping[str, Any] = field(default_factory=dict)  # of the preset
    trained: tuple[str, ...] = ()  # patterns of the parameters that learn; none: all, or the adapters
    examples: str = "text"  # see worker.examples
    contestants: tuple[str, ...] = ENGINES

    @property
    def config(self) -> GPTConfig:
        return PRESETS[self.preset].replace(**self.changes)

    @property
    def settings(self) -> dict[str, Any]:
        """What a result says that was asked for: two results of other settings are not compared."""
        return {
            "work": "train",
            "preset": self.preset,
            "changes": dict(self.changes),
            "batch": self.batch,
            "length": self.length,
            "trained": list(self.trained),
            "examples": self.examples,
        }


STEP = {"torch": 0.9, "plain": 0.9, "plain fused": 1.0}
FINETUNING = {"torch": 1.15}
LLAMA = (*ENGINES, "torch compiled", "transformers")
ADAPTERS = {"lora": {"rank": 16, "alpha": 16.0}}  # in all linear layers
CLASSES = {"tie_embeddings": False, "n_outputs": 2, "head_bias": True}
LAST_BLOCK = ("blocks.11.*", "final_norm.*", "head.*")
CASES = {
    "gpt2-small": Case("gpt2-small", 2, 256, 3, STEP, 1.1, contestants=EVERY),
    "course-llama": Case("course-llama", 2, 256, 3, STEP, 1.1, contestants=LLAMA),
    "bytes-small": Case("bytes-small", 16, 128, 10, STEP, 1.1, contestants=EVERY),
    "classify": Case("gpt2-small", 8, 120, 3, FINETUNING, changes=CLASSES, trained=LAST_BLOCK, examples="label"),
    "lora": Case("gpt2-small", 4, 128, 3, FINETUNING, changes=ADAPTERS),
    "dpo": Case("gpt2-small", 4, 128, 3, FINETUNING, changes=ADAPTERS, examples="dpo"),
    "orpo": Case("gpt2-small", 4, 128, 3, FINETUNING, changes=ADAPTERS, examples="orpo"),
}
WITH_FULL = "lora"  # the case whose steps are held against those of the whole model, which are to take no less

NAMES = (*CASES, *generate.CASES)


def measure(name: str, case: Case, sessions: int, rounds: int) -> dict[str, Any]:
    """Times in seconds, memory in bytes, ratios ours / theirs."""
    shared = {"batch": case.batch, "length": case.length}
    own = model_settings(case.config, "train", **shared, trained=case.trained, examples=case.examples)
    contestants = {each: own for each in case.contestants}
    if name == WITH_FULL:
        full = model_settings(PRESETS[case.preset], "train", **shared)
        contestants |= {f"{engine} full": full for engine in ENGINES}
    taken = take_turns(f"{name}, {case.batch} x {case.length} tokens", contestants, sessions, rounds)
    _agree(name, {each: taken[each].first[0]["loss"] for each in case.contestants})
    document = summary(case.settings, taken, case.targets, case.memory_target)
    for each in document["contestants"].values():
        each["tokens_per_s"] = case.batch * case.length / each["seconds"]["median"]
    if name == WITH_FULL:
        pairs = {e: stats.ratios(taken[e].sessions(), taken[f"{e} full"].sessions()) for e in ENGINES}
        document["of_full"] = {e: median(r for session in ratios for r in session) for e, ratios in pairs.items()}
        document["of_full_optimizer"] = _moments(case.config) / _moments(PRESETS[case.preset])
    return document


def _agree(name: str, losses: Mapping[str, float]) -> None:
    """UserError where contestants had another loss of the same tokens by the same weights than the first of them."""
    (first, wanted), *others = losses.items()
    for contestant, loss in others:
        if not abs(loss - wanted) <= AGREEMENT * abs(wanted):
            raise UserError(f"{name}: {contestant} computes another loss than {first}: {loss:.6g}, not {wanted:.6g}")


def _moments(config: GPTConfig) -> int:
    """How many numbers AdamW keeps."""
    return sum(map(math.prod, optimizer_shapes(config, trained_names(config)).values()))


def main(names: list[str], sessions: int | None, rounds: int | None, out: Path | None) -> int:
    """Measure these cases, or all, print the tables, write JSON; 0 even if a target is missed: the tables show it."""
    check_installed("torch", extra="torch")
    for name in names:
        if name not in NAMES:
            raise UserError(f"{name!r} is not one of {', '.join(NAMES)}")
    check_counts(sessions, rounds)
    if set(names or NAMES) & set(generate.CASES):
        check_installed("transformers", extra="bench")
    sessions = sessions or SESSIONS
    limits = ceilings.measure() if out else {}
    measured: dict[str, Any] = {}
    for name in names or NAMES:
        if name in CASES:
            measured[name] = measure(name, installed(CASES[name]), sessions, rounds or CASES[name].rounds)
        else:
            measured[name] = generate.measure(generate.CASES[name], sessions, rounds or generate.ROUNDS)
        show(name, measured[name])
        if out:  # so that what ends it loses no more than one case
            results.write(out, "cpu", measured, ceilings=limits)
    return 0


def check_counts(sessions: int | None, rounds: int | None) -> None:
    """UserError for less than one."""
    for name, count in (("sessions", sessions), ("rounds", rounds)):
        if count is not None and count < 1:
            raise UserError(f"{name}: expected at least 1, got {count}")


def installed(case: Case) -> Case:
    """The case without contestants that are not installed."""
    there = is_installed("transformers")
    return dataclasses.replace(
        case, contestants=tuple(name for name in case.contestants if there or name != "transformers")
    )
