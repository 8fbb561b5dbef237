"""What `twingrad diverge` found, as a page: the path of tensors, the first that differs, entry by entry, and the swaps.

The page's data are those of `--json`, and beside them the first tensor itself, as both sides and the truth have it:
every bit of a small one, of a large one the part around its worst element.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt.errors import UserError
from gpt.study.diverge import First
from gpt.study.page import pack, write
from reference.config import GPTConfig

__all__ = ["check_out", "entries_of", "write_page"]

SCRIPTS = ("bars", "diverge")
MOST_ENTRIES = 50_000  # of the first tensor: three times as many numbers, 1.6 MB of a page
MOST_ROWS, MOST_COLUMNS = 256, 1024  # of a plane: what a browser's canvas holds at three dots a pixel
BOUNDS = {
    "float64": "The error of a tensor is its largest difference, relative to the largest entry of the truth. Rounding "
    "is far below the bound of {bound:g}: what is above is another formula.",
    "float32": "The error of a tensor says how many times as far from the truth as the nearer side the other one is, "
    "by the norm of the difference; up to {bound:g} times is rounding. No side counts as nearer than float32 can be "
    "when each parameter moves by one unit in its last place.",
}


def check_out(out: str) -> Path:
    """The page's path. UserError where a folder stands."""
    path = Path(out)
    if path.is_dir():
        raise UserError(f"out: {path} is a folder, expected a file to write, such as page.html")
    return path


def write_page(
    path: Path,
    shown: Mapping[str, Any],
    first: First | None,
    config: GPTConfig,
    model: str,
    text: str | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Write the page of `shown`, what `page_data` returned. `model` says in words what both sides compute."""
    data = data_of(shown, first, config, model, text, notes)
    write(path, data["title"], data, SCRIPTS)


def data_of(
    shown: Mapping[str, Any],
    first: First | None,
    config: GPTConfig,
    model: str,
    text: str | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """The page's data; what was compared is in `diverge`."""
    names = _short(shown["sides"])
    rows, tokens = shown["batch"]
    bound = shown["tensors"][0]["bound"]
    truth = "The truth is the NumPy engine in float64" + (
        "." if shown["one_model"] else f", with the parameters of {names[0]}."
    )
    found = dict(shown)
    if first is not None:
        found["first"] = {**shown["first"], "entries": entries_of(first) if first.comparable else None}
    return {
        "title": f"{names[0]} and {names[1]}, tensor by tensor",
        "names": names,
        "text": text or "",
        "model": {
            "model": model,
            "parameters": f"{config.n_parameters:,}",
            "blocks": config.n_layers,
            "width": config.emb_dim,
            "batch": f"{rows} × {tokens} tokens",
            "dtype": shown["dtype"],
            "tensors": len(shown["tensors"]),
            "bound": f"{bound:g}" + (" times" if shown["dtype"] == "float32" else ""),
        },
        "notes": [truth, BOUNDS[shown["dtype"]].format(bound=bound), *notes],
        "diverge": found,
    }


def entries_of(first: First) -> dict[str, Any]:
    """The first tensor, (..., rows, columns): {"shape", "starts", "sizes", "a", "b", "truth"}, the last three packed.

    Of a tensor that is too large the part from `starts`, of `sizes`, with the worst element in it.
    """
    assert first.truth is not None
    lead = max(0, 2 - len(first.pair.shape))
    shape, index = (1,) * lead + first.pair.shape, (0,) * lead + first.index
    sizes = [*shape[:-2], min(shape[-2], MOST_ROWS), min(shape[-1], MOST_COLUMNS)]
    while math.prod(sizes) > MOST_ENTRIES:
        longest = sizes.index(max(sizes))
        sizes[longest] = (sizes[longest] + 1) // 2
    starts = [min(max(0, at - size // 2), n - size) for at, size, n in zip(index, sizes, shape, strict=True)]
    part = tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))
    packed = {
        name: pack(array.reshape(shape)[part])
        for name, array in (("a", first.values[0]), ("b", first.values[1]), ("truth", first.truth))
    }
    return {"shape": list(shape), "starts": starts, "sizes": sizes, **packed}


def _short(sides: Sequence[str]) -> list[str]:
    """What the sides are called on the page: paths without their folders, unless that makes them one."""
    names = [re.sub(r"\S*[/\\](?=[^/\\\s])", "", side) for side in sides]
    return names if names[0] != names[1] else list(sides)
