"""A training step (forward, backward, clip, AdamW) of the NumPy engine against PyTorch's eager step, on this CPU.

Each engine has a process of its own, so that their thread pools do not disturb each other, and they take their steps in
turns, so that a machine that slows down slows both. The ratio is taken round by round, and its median is what counts.
Steps that finetune are among the cases; with adapters, a step is held against one of the whole model too. Generation is
in generate.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import generate, results
from bench.process import Worker
from gpt.engine import optimizer_shapes, trained_names
from gpt.errors import UserError, require
from reference.config import PRESETS, GPTConfig

ENGINES = ("numpy", "torch")


@dataclass(frozen=True)
class Case:
    """One model and batch, and the most that the NumPy engine may take of PyTorch's time and memory."""

    preset: str
    batch: int
    length: int
    rounds: int
    time_target: float
    memory_target: float = 1.25
    changes: dict[str, Any] = field(default_factory=dict)  # of the preset
    trained: tuple[str, ...] = ()  # patterns of the parameters that learn; none: all, or the adapters
    examples: str = "text"  # see worker.examples

    @property
    def config(self) -> GPTConfig:
        return PRESETS[self.preset].replace(**self.changes)


ADAPTERS = {"lora": {"rank": 16, "alpha": 16.0}}  # in all linear layers
CLASSES = {"tie_embeddings": False, "n_outputs": 2, "head_bias": True}
LAST_BLOCK = ("blocks.11.*", "final_norm.*", "head.*")
CASES = {
    "gpt2-small": Case("gpt2-small", batch=2, length=256, rounds=11, time_target=1.0),
    "course-llama": Case("course-llama", batch=2, length=256, rounds=11, time_target=1.0),
    "bytes-small": Case("bytes-small", batch=16, length=128, rounds=51, time_target=0.9),
    "classify": Case("gpt2-small", 8, 120, 11, 1.15, changes=CLASSES, trained=LAST_BLOCK, examples="label"),
    "lora": Case("gpt2-small", 4, 128, 11, 1.15, changes=ADAPTERS),
    "dpo": Case("gpt2-small", 4, 128, 11, 1.15, changes=ADAPTERS, examples="dpo"),
    "orpo": Case("gpt2-small", 4, 128, 11, 1.15, changes=ADAPTERS, examples="orpo"),
}
WITH_FULL = "lora"  # the case whose steps are held against those of the whole model, which are to take no less

NAMES = (*CASES, *generate.CASES)


def measure(name: str, case: Case, rounds: int) -> dict[str, Any]:
    """Times in seconds, memory in bytes, ratios NumPy / PyTorch."""
    settings: dict[str, Any] = {"work": "train", "batch": case.batch, "length": case.length}
    own = {**settings, "trained": case.trained, "examples": case.examples}
    workers = {engine: Worker(case.config, {**own, "engine": engine}) for engine in ENGINES}
    if name == WITH_FULL:
        workers |= {f"{e} full": Worker(PRESETS[case.preset], {**settings, "engine": e}) for e in ENGINES}
    times: dict[str, list[dict[str, float]]] = {engine: [] for engine in workers}
    for _ in track(range(rounds), f"{name}, {case.batch} x {case.length} tokens", transient=True):
        for engine, worker in workers.items():
            times[engine].append(worker.ask("step"))
    peaks = {engine: worker.close()["peak_bytes"] for engine, worker in workers.items()}

    def ratios(ours: str, theirs: str) -> list[float]:
        return [a["step"] / b["step"] for a, b in zip(times[ours], times[theirs], strict=True)]

    pairs = ratios("numpy", "torch")
    full: dict[str, Any] = {}
    if name == WITH_FULL:
        full["of_full"] = {engine: median(ratios(engine, f"{engine} full")) for engine in ENGINES}
        full["of_full_optimizer"] = _moments(case.config) / _moments(PRESETS[case.preset])
    return {
        "preset": case.preset,
        "batch": case.batch,
        "length": case.length,
        "rounds": rounds,
        "engines": {
            engine: {part: median(t[part] for t in times[engine]) for part in times[engine][0]}
            | {"tokens_per_s": case.batch * case.length / median(t["step"] for t in times[engine])}
            | {"peak_bytes": peaks[engine]}
            for engine in workers
        },
        **full,
        "time_ratio": median(pairs),
        "time_ratio_quartiles": quantiles(pairs, n=4)[::2] if rounds > 1 else [pairs[0], pairs[0]],
        "time_target": case.time_target,
        "memory_ratio": peaks["numpy"] / peaks["torch"],
        "memory_target": case.memory_target,
    }


def _moments(config: GPTConfig) -> int:
    """How many numbers AdamW keeps."""
    return sum(map(math.prod, optimizer_shapes(config, trained_names(config)).values()))


def main(names: list[str], rounds: int | None, out: Path | None) -> int:
    """Measure these cases, or all, print the table, write JSON; 0 even if a target is missed: the table shows it."""
    require("torch", extra="torch")
    for name in names:
        if name not in NAMES:
            raise UserError(f"{name!r} is not one of {', '.join(NAMES)}")
    if rounds is not None and rounds < 1:
        raise UserError(f"rounds: expected at least 1, got {rounds}")
    chosen = names or NAMES
    training = [name for name in chosen if name in CASES]
    measured = {name: measure(name, CASES[name], rounds or CASES[name].rounds) for name in training}
    if measured:
        _print(measured)
    for name in (name for name in chosen if name in generate.CASES):
        measured[name] = generate.measure(generate.CASES[name], rounds or generate.ROUNDS)
        generate.show(measured[name])
    if out:
        results.write(out, "cpu", measured)
    return 0


def _print(measured: dict[str, Any]) -> None:
    table = Table("case", "numpy ms", "torch ms", "ratio", "target", "numpy MiB", "torch MiB", "ratio", "target")
    for name, case in measured.items():
        engines = [case["engines"][engine] for engine in ENGINES]
        table.add_row(
            name,
            *(f"{1e3 * figures['step']:.0f}" for figures in engines),
            f"{case['time_ratio']:.2f}",
            f"{case['time_target']:.2f}",
            *(f"{figures['peak_bytes'] / 2**20:.0f}" for figures in engines),
            f"{case['memory_ratio']:.2f}",
            f"{case['memory_target']:.2f}",
        )
    console = Console(width=100)
    console.print(table)
    for name, case in measured.items():
        if "of_full" in case:
            of = ", ".join(f"{engine} {ratio:.2f}" for engine, ratio in case["of_full"].items())
            console.print(f"{name}: a step takes of one of the whole model: {of}; target 1.00")
            console.print(f"{name}: the optimizer keeps {case['of_full_optimizer']:.2%} of its numbers; target 3%")
