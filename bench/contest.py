"""What a result keeps of contestants that took turns, and how it is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import stats
from bench.process import Taken

ENGINES = ("numpy", "torch")
OURS = (*ENGINES, "torch compiled", "numpy full", "torch full", "numpy uncached", "triton", "twingrad", "yours")
# Whose figures stand for the machine's mood where two results are compared: the first of these that took part.
CONTROLS = ("plain", "transformers", "torch", "torch cpu")


def summary(
    settings: Mapping[str, Any],
    taken: Mapping[str, Taken],
    targets: Mapping[str, float],
    memory_target: float | None = None,
) -> dict[str, Any]:
    """What a result keeps of a case: of each contestant, and of ours against each other one."""
    contestants: dict[str, Any] = {}
    for name, each in taken.items():
        parts = [part for part in each.rounds[0][0] if part in ("gradients", "update")]
        contestants[name] = {
            "seconds": stats.sample(each.sessions()),
            **{part: median(value for rounds in each.sessions(part) for value in rounds) for part in parts},
            "peak_bytes": each.bytes(),
        }
        if each.last[0].get("libraries_bytes"):
            beside = min(last["libraries_bytes"] for last in each.last)
            plan = each.bytes("planned_bytes")
            contestants[name]["of_plan"] = {"planned_bytes": plan, "ratio": (each.bytes() - beside) / plan}
    ratios = {}
    for ours in ENGINES:
        for theirs in taken:
            before = theirs in ENGINES and ours not in ENGINES[: ENGINES.index(theirs)]
            if ours not in taken or theirs == ours or before or theirs.endswith(" full"):
                continue
            pairs = stats.ratios(taken[ours].sessions(), taken[theirs].sessions())
            every = [ratio for session in pairs for ratio in session]
            target = targets.get(theirs) if ours == ENGINES[0] else None
            ratios[f"{ours} / {theirs}"] = {
                "median": median(every),
                "quartiles": stats.quartiles(every),
                "target": target,
            }
    document = {
        "settings": dict(settings),
        "control": next((name for name in CONTROLS if name in taken), None),
        "contestants": contestants,
        "ratios": ratios,
    }
    if memory_target and set(ENGINES) <= set(taken):
        numpy, torch = (contestants[engine]["peak_bytes"] for engine in ENGINES)
        document["memory_ratio"] = {"numpy / torch": numpy / torch, "target": memory_target}
    return document


def show_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table."""
    table = Table(*head)
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)


def show(name: str, measured: Mapping[str, Any]) -> None:
    """Print one case."""
    console = Console(width=100)
    table = Table(name, "ms", "quartiles", "tokens/s", "peak MiB")
    for contestant, figures in measured["contestants"].items():
        low, high = figures["seconds"]["quartiles"]
        table.add_row(
            contestant,
            f"{1e3 * figures['seconds']['median']:.4g}",
            f"{1e3 * low:.4g} to {1e3 * high:.4g}",
            f"{figures['tokens_per_s']:,.0f}" if "tokens_per_s" in figures else "",
            f"{figures['peak_bytes'] / 2**20:.0f}",
        )
    console.print(table)
    table = Table("time of", "ratio", "quartiles", "at most")
    for pair, ratio in measured["ratios"].items():
        low, high = ratio["quartiles"]
        target = f"{ratio['target']:.2f}" if ratio["target"] else ""
        table.add_row(pair, f"{ratio['median']:.2f}", f"{low:.2f} to {high:.2f}", target)
    console.print(table)
    if "memory_ratio" in measured:
        memory = measured["memory_ratio"]
        console.print(
            f"{name}: peak memory, numpy / torch: {memory['numpy / torch']:.2f}; at most {memory['target']:.2f}"
        )
    for engine, figures in measured["contestants"].items():
        if of_plan := figures.get("of_plan"):
            console.print(f"{name}: {engine}'s memory, libraries apart, of what was planned: {of_plan['ratio']:.2f}")
    if "of_full" in measured:
        of = ", ".join(f"{engine} {ratio:.2f}" for engine, ratio in measured["of_full"].items())
        console.print(f"{name}: a step takes of one of the whole model: {of}; at most 1.00")
        console.print(f"{name}: the optimizer keeps {measured['of_full_optimizer']:.2%} of its numbers; at most 3%")
