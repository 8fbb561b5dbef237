"""A training step (forward, backward, clip, AdamW) of the NumPy engine against PyTorch's eager step, on this CPU.

Each engine has a process of its own, so that their thread pools do not disturb each other, and they take their steps in
turns, so that a machine that slows down slows both. The ratio is taken round by round, and its median is what counts.
Generation is in generate.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import generate, results
from bench.process import Worker
from gpt.errors import UserError, require
from reference.config import PRESETS

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


CASES = {
    "gpt2-small": Case("gpt2-small", batch=2, length=256, rounds=11, time_target=1.0),
    "course-llama": Case("course-llama", batch=2, length=256, rounds=11, time_target=1.0),
    "bytes-small": Case("bytes-small", batch=16, length=128, rounds=51, time_target=0.9),
}

NAMES = (*CASES, *generate.CASES)


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Times in seconds, memory in bytes, ratios NumPy / PyTorch."""
    settings = {"work": "train", "batch": case.batch, "length": case.length}
    workers = {engine: Worker(PRESETS[case.preset], {**settings, "engine": engine}) for engine in ENGINES}
    times: dict[str, list[dict[str, float]]] = {engine: [] for engine in ENGINES}
    for _ in track(range(rounds), f"{case.preset}, {case.batch} x {case.length} tokens", transient=True):
        for engine, worker in workers.items():
            times[engine].append(worker.ask("step"))
    peaks = {engine: worker.close()["peak_bytes"] for engine, worker in workers.items()}
    pairs = [ours["step"] / theirs["step"] for ours, theirs in zip(times["numpy"], times["torch"], strict=True)]
    return {
        "preset": case.preset,
        "batch": case.batch,
        "length": case.length,
        "rounds": rounds,
        "engines": {
            engine: {part: median(t[part] for t in times[engine]) for part in times[engine][0]}
            | {"tokens_per_s": case.batch * case.length / median(t["step"] for t in times[engine])}
            | {"peak_bytes": peaks[engine]}
            for engine in ENGINES
        },
        "time_ratio": median(pairs),
        "time_ratio_quartiles": quantiles(pairs, n=4)[::2] if rounds > 1 else [pairs[0], pairs[0]],
        "time_target": case.time_target,
        "memory_ratio": peaks["numpy"] / peaks["torch"],
        "memory_target": case.memory_target,
    }


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
    measured = {name: measure(CASES[name], rounds or CASES[name].rounds) for name in training}
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
    Console(width=100).print(table)
