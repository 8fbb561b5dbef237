"""Generating with GPT-2 124M and a Llama of that size on this CPU, by both engines and by transformers' `generate`.

The NumPy engine also does without its cache. The weights are random, and the same for all: to speed, numbers are alike.
Each has a process of its own; they take turns, and ratios are taken round by round.
"""

from __future__ import annotations

from statistics import median, quantiles
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.process import Worker
from gpt.errors import require
from reference.config import PRESETS

CASES = {"generate": "gpt2-small", "generate-llama": "course-llama"}
ROUNDS, PROMPT, TOKENS = 7, 32, 200
WRITERS = ("numpy", "torch", "transformers", "numpy uncached")
# Of tokens a second: who is measured against whom, and how many times as many at least.
TARGETS = (
    ("numpy", "torch", 0.9),
    ("numpy", "transformers", 0.9),
    ("torch", "transformers", 0.9),
    ("numpy", "numpy uncached", 8.0),
)


def measure(preset: str, rounds: int, tokens: int = TOKENS) -> dict[str, Any]:
    """Tokens a second, ratios, peak memory in bytes; the slow one without a cache takes every third round."""
    require("transformers", extra="bench")
    settings = {"work": "generate", "prompt": PROMPT, "tokens": tokens}
    workers = {
        writer: Worker(PRESETS[preset], {**settings, "engine": writer, "warm_up": writer != WRITERS[-1]})
        for writer in WRITERS
    }
    rates: dict[str, list[float]] = {writer: [] for writer in WRITERS}
    ratios: dict[str, list[float]] = {f"{ours} / {theirs}": [] for ours, theirs, _ in TARGETS}
    for number in track(range(rounds), f"{preset}, {tokens} tokens after {PROMPT}", transient=True):
        now = {}
        for writer, worker in workers.items():
            if writer != WRITERS[-1] or number % 3 == 0:
                now[writer] = tokens / worker.ask("generate")["seconds"]
                rates[writer].append(now[writer])
        for ours, theirs, _ in TARGETS:
            if theirs in now:
                ratios[f"{ours} / {theirs}"].append(now[ours] / now[theirs])
    return {
        "preset": preset,
        "prompt": PROMPT,
        "tokens": tokens,
        "rounds": rounds,
        "writers": {
            writer: {"tokens_per_s": median(rates[writer]), "peak_bytes": worker.close()["peak_bytes"]}
            for writer, worker in workers.items()
        },
        "ratios": {
            name: {
                "median": median(ratios[name]),
                "quartiles": quantiles(ratios[name], n=4)[::2] if len(ratios[name]) > 1 else ratios[name] * 2,
                "target": target,
            }
            for name, (_, _, target) in zip(ratios, TARGETS, strict=True)
        },
    }


def show(measured: dict[str, Any]) -> None:
    """Print what `measure` found."""
    table = Table(measured["preset"], "tokens/s", "peak MiB")
    for writer, figures in measured["writers"].items():
        table.add_row(writer, f"{figures['tokens_per_s']:.1f}", f"{figures['peak_bytes'] / 2**20:.0f}")
    Console(width=100).print(table)
    table = Table("tokens/s of", "ratio", "quartiles", "target")
    for name, ratio in measured["ratios"].items():
        low, high = ratio["quartiles"]
        table.add_row(name, f"{ratio['median']:.2f}", f"{low:.2f} to {high:.2f}", f"{ratio['target']:.1f}")
    Console(width=100).print(table)
