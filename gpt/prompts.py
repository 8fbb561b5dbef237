"""Prompt styles: how an instruction is put to a model, in the words that it was finetuned with.

An entry is a mapping with "instruction", and perhaps "input" and "output", as in the Alpaca data. Phi-3's style marks
turns with <|user|> and <|assistant|>.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gpt.errors import UserError
from gpt.options import did_you_mean

__all__ = ["STYLES", "alpaca", "format_prompt", "phi3", "plain"]

Entry = Mapping[str, Any]


def plain(entry: Entry) -> str:
    """The instruction and its input, nothing else."""
    return "\n".join(filter(None, (entry["instruction"], entry.get("input"))))


def alpaca(entry: Entry) -> str:
    """Alpaca's template (Taori et al. 2023), up to the response."""
    text = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        f"\n\n### Instruction:\n{entry['instruction']}"
    )
    if entry.get("input"):
        text += f"\n\n### Input:\n{entry['input']}"
    return text + "\n\n### Response:\n"


def phi3(entry: Entry) -> str:
    """Phi-3's template (Abdin et al. 2024), up to the answer."""
    return f"<|user|>\n{plain(entry)}\n\n<|assistant|>\n"


STYLES: dict[str, Callable[[Entry], str]] = {"plain": plain, "alpaca": alpaca, "phi3": phi3}


def format_prompt(entry: Entry, style: str = "alpaca") -> str:
    """The prompt of an entry in a style of that name. UserError for an unknown style, or no instruction in it."""
    if style not in STYLES:
        raise UserError(f"style: {style!r} is not one of {', '.join(STYLES)}{did_you_mean(style, STYLES)}")
    if not isinstance(entry.get("instruction"), str) or not isinstance(entry.get("input"), str | None):
        raise UserError(f'prompt: expected an entry with the text "instruction", got one with {sorted(entry)}')
    return STYLES[style](entry)
