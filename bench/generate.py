"""Generating with GPT-2 124M and a Llama of that size on this CPU, by both engines and by transformers' `generate`.

The NumPy engine also does without its cache. The weights are random, and the same for all: to speed, numbers are alike.
Each has a process of its own; they take turns, and ratios are of times, taken round by round.
"""

from __future__ import annotations

from typing import Any

from bench.contest import summary
from bench.process import model_settings, take_turns
from gpt.errors import check_installed
from reference.config import PRESETS

CASES = {"generate": "gpt2-small", "generate-llama": "course-llama"}
ROUNDS, PROMPT, TOKENS = 2, 32, 200
UNCACHED = "numpy uncached"
WRITERS = ("numpy", "torch", "transformers", UNCACHED)
TARGETS = {"torch": 1 / 0.9, "transformers": 1 / 0.9, UNCACHED: 1 / 8}  # the most of their time that NumPy may take


def measure(preset: str, sessions: int, rounds: int, tokens: int = TOKENS) -> dict[str, Any]:
    """Seconds, tokens a second, ratios, peak memory; the slow one without a cache takes one round of each session."""
    check_installed("transformers", extra="bench")
    asked = {"work": "generate", "preset": preset, "prompt": PROMPT, "tokens": tokens}
    settings = model_settings(PRESETS[preset], "generate", prompt=PROMPT, tokens=tokens)
    writers = {writer: {**settings, "warm_up": writer != UNCACHED} for writer in WRITERS}
    taken = take_turns(f"{preset}, {tokens} tokens after {PROMPT}", writers, sessions, rounds, once=(UNCACHED,))
    document = summary(asked, taken, TARGETS)
    for each in document["contestants"].values():
        each["tokens_per_s"] = tokens / each["seconds"]["median"]
    return document
