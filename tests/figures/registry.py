"""What reproduces which figure, and how close it comes."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def _read(name: str) -> dict[str, dict[str, Any]]:
    return {entry["id"]: entry for entry in json.loads(Path(__file__).with_name(name).read_text("utf-8"))}


PRETRAINED = _read("pretrained.json")  # those that need OpenAI's weights
FIGURES = _read("figures.json") | PRETRAINED


@dataclass(frozen=True)
class Reproduction:
    """`function(layers)` computes the figure with an engine's layers (engines.py); `function()` needs none."""

    function: Callable[..., Any]
    slow: bool

    @property
    def engines(self) -> tuple[str, ...]:
        return ("numpy", "torch") if inspect.signature(self.function).parameters else ("",)


REPRODUCTIONS: dict[str, Reproduction] = {}


def figure(name: str, slow: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as what reproduces the figure of this id. `slow`: it takes minutes."""
    if name not in FIGURES:
        raise KeyError(f"neither figures.json nor pretrained.json has a figure {name}")
    if name in REPRODUCTIONS:
        raise KeyError(f"figure {name} has two functions")

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        REPRODUCTIONS[name] = Reproduction(function, slow)
        return function

    return register


def difference(ours: Any, theirs: Any) -> float:
    """Largest absolute difference of two values of the same structure, inf where the structure or a text differs."""
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
        return max((difference(ours[key], theirs[key]) for key in ours), default=0.0)
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return max((difference(a, b) for a, b in zip(ours, theirs, strict=True)), default=0.0)
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (ours, theirs))
    if numbers and not math.isnan(ours):
        return abs(ours - theirs)
    return 0.0 if type(ours) is type(theirs) and ours == theirs else math.inf


def error(name: str, ours: Any) -> float:
    """How far a reproduction is from the figure: from what is printed and from what is recorded, whichever is more."""
    entry = FIGURES[name]
    targets = [entry[kind] for kind in ("value", "printed") if entry[kind] is not None]
    return max(difference(ours, target) for target in targets)


def load_all() -> dict[str, Reproduction]:
    """All reproductions, in the order of figures.json and pretrained.json. Raises KeyError if a figure has none."""
    from tests.figures import (  # noqa: F401
        appendices,
        chapter2,
        chapter3,
        chapter4,
        chapter5,
        chapter6,
        chapter7,
        pretrained,
        random_numbers,
    )

    return {name: REPRODUCTIONS[name] for name in FIGURES}
