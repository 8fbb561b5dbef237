"""A page in one file: the data and everything that shows it, opened from disk, with no server and no network."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from gpt.data.files import atomic_write

__all__ = ["pack", "write"]

ASSETS = resources.files("gpt.study") / "assets"


def pack(array: np.ndarray, shown: tuple[int, ...] | None = None) -> dict[str, Any]:
    """An array for a page, every bit of it, as float64; or the first so many of each axis."""
    array = np.asarray(array, np.float64)
    shown = array.shape if shown is None else shown
    part = array[tuple(slice(n) for n in shown)]
    data = base64.b64encode(np.ascontiguousarray(part, "<f8").tobytes()).decode()
    return {"shape": array.shape, "shown": shown, "data": data}


def write(path: Path, title: str, data: Mapping[str, Any], scripts: tuple[str, ...]) -> None:
    """Write a page that shows `data` by these scripts of the assets, run in this order."""
    from jinja2 import Environment

    names = ("base", *scripts)
    template = Environment(autoescape=True).from_string((ASSETS / "shell.html").read_text("utf-8"))
    text = template.render(
        title=title,
        styles="\n".join(style for name in names if (style := _asset(f"{name}.css"))),
        scripts="\n".join(_asset(f"{name}.js") for name in names),
        # "<" cannot end a script when it is written so; the browser reads the same text.
        data=json.dumps(_finite(data), ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
    )
    with atomic_write(path) as file:
        file.write(text.encode("utf-8", errors="replace"))


def _asset(name: str) -> str:
    file = ASSETS / name
    return file.read_text("utf-8") if file.is_file() else ""


def _finite(value: Any) -> Any:
    """The same data as JSON can hold it: a number that is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
