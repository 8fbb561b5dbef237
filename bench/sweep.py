"""What a training step costs as the work grows: more tokens, wider, deeper, longer sequences, whole larger models.

Along each axis one size grows and the others stay. Times are fitted by c n^p (stats.py); the exponent p says how cost
grows, 1 in proportion, 2 with the square. What a small size costs besides (a call's overhead, threads that wait for
each other) flattens it, so the exponent of the upper half of the sizes is given as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import ceilings, results, stats
from bench.contest import summary
from bench.cpu import STEP, check_counts
from bench.process import model_settings, take_turns
from gpt.errors import UserError, check_installed
from reference.config import PRESETS, GPTConfig

CONTESTANTS = ("numpy", "torch", "plain", "plain fused")
SESSIONS, ROUNDS = 3, 5


def _gpt(width: int, depth: int, length: int, vocabulary: int = 1024) -> GPTConfig:
    """A GPT-2 with heads of 64."""
    return GPTConfig(vocabulary, length, width, depth, width // 64, qkv_bias=True, tie_embeddings=True)


@dataclass(frozen=True)
class Point:
    """One size on an axis."""

    n: int
    config: GPTConfig
    batch: int
    length: int


@dataclass(frozen=True)
class Axis:
    """What grows, in what unit, and the sizes."""

    unit: str
    points: tuple[Point, ...]


NARROW = 256  # the width of what does not grow in width
AXES = {
    "tokens": Axis(
        "tokens in a step, 128 in a text",
        tuple(Point(128 * B, _gpt(NARROW, 4, 128), B, 128) for B in (1, 2, 4, 8, 16, 32)),
    ),
    "width": Axis("width", tuple(Point(C, _gpt(C, 4, 128), 4, 128) for C in (64, 128, 256, 512, 1024))),
    "depth": Axis("blocks", tuple(Point(L, _gpt(NARROW, L, 128), 4, 128) for L in (1, 2, 4, 8, 16))),
    "length": Axis(
        "tokens in one text", tuple(Point(T, _gpt(NARROW, 4, T), 1, T) for T in (64, 128, 256, 512, 1024, 2048))
    ),
    "parameters": Axis(
        "parameters, 2 x 256 tokens in a step",
        tuple(
            Point(config.n_parameters, config, 2, 256)
            for config in (
                _gpt(128, 4, 256, 1024),
                _gpt(256, 6, 256, 4096),
                _gpt(384, 8, 256, 8192),
                _gpt(512, 10, 256, 16_384),
                PRESETS["gpt2-small"],
            )
        ),
    ),
}


def measure(name: str, axis: Axis, sessions: int, rounds: int) -> dict[str, Any]:
    """A case for each size, and the exponents of each contestant."""
    cases = {}
    for point in axis.points:
        settings = model_settings(point.config, "train", batch=point.batch, length=point.length)
        contestants = {each: settings for each in CONTESTANTS}
        taken = take_turns(f"{name} {point.n:,}", contestants, sessions, rounds)
        asked = {"work": "train", "config": point.config.to_dict(), "batch": point.batch, "length": point.length}
        cases[f"{name} {point.n}"] = {**summary(asked, taken, STEP), "axis": name, "unit": axis.unit, "n": point.n}
    return cases


def fits(cases: Mapping[str, Any]) -> Iterator[tuple[str, str, stats.PowerLaw, stats.PowerLaw]]:
    """(axis, contestant, fit over all sizes, fit over the upper half of them), for axes of two sizes and more."""
    for axis in dict.fromkeys(case["axis"] for case in cases.values()):
        along = sorted((case for case in cases.values() if case["axis"] == axis), key=lambda case: case["n"])
        if len(along) < 2:
            continue
        for name in along[0]["contestants"]:
            n = [case["n"] for case in along]
            seconds = [case["contestants"][name]["seconds"]["median"] for case in along]
            upper = min(len(n) // 2, len(n) - 2)
            yield axis, name, stats.power_law(n, seconds), stats.power_law(n[upper:], seconds[upper:])


def main(names: Sequence[str], sessions: int | None, rounds: int | None, out: Path | None) -> int:
    """Measure along these axes, or all, print times and exponents, write JSON."""
    check_installed("torch", extra="torch")
    for name in names:
        if name not in AXES:
            raise UserError(f"{name!r} is not one of {', '.join(AXES)}")
    check_counts(sessions, rounds)
    limits = ceilings.measure() if out else {}
    cases: dict[str, Any] = {}
    for name in names or AXES:
        cases |= measure(name, AXES[name], sessions or SESSIONS, rounds or ROUNDS)
        if out:  # so that what ends it loses no more than one axis
            results.write(out, "sweep", cases, ceilings=limits)
    show(cases)
    return 0


def show(cases: Mapping[str, Any]) -> None:
    """Print times, and below them the exponents."""
    console = Console(width=100)
    contestants = list(next(iter(cases.values()))["contestants"])
    table = Table("size", *(f"{name} ms" for name in contestants), "numpy / torch")
    for name, case in cases.items():
        times = (f"{1e3 * case['contestants'][each]['seconds']['median']:.4g}" for each in contestants)
        table.add_row(name, *times, f"{case['ratios']['numpy / torch']['median']:.2f}")
    console.print(table)
    table = Table("axis", "contestant", "exponent", "of the upper half")
    for axis, name, every, upper in fits(cases):
        table.add_row(axis, name, str(every), str(upper))
    console.print(table)
