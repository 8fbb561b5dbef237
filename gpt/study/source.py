"""The reference's own code of an operation, read from its source when it is asked for, so that it is never stale."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from gpt.study.record import PLAIN, Operation, layer_of
from reference import model

__all__ = ["code_of", "document_of"]

ROOT = Path(model.__file__).parents[1]
# What lies between the layers stands in the model itself: which of its lines do it, forward and backward.
IN_MODEL = {
    "split_heads": ((r"def heads", r"return x\.reshape\(B, T, -1, config\.head_dim\)"), (r"part\.transpose\(0, 2",)),
    "join_heads": ((r"y\.transpose\(0, 2, 1, 3\)",), (r"dy\.reshape\(B, T, -1, config\.head_dim\)",)),
    "emb": ((r'note\("emb"',), (r'note\("emb"', r'embed\("pos_emb"', r'embed\("tok_emb"')),
    "shortcut1": ((r"shortcut1",), (r"shortcut1", r"dx \+= norm\(f\"blocks\.\{i\}\.norm1")),
    "shortcut2": ((r"shortcut2",), (r"shortcut2", r"dx \+= norm\(f\"blocks\.\{i\}\.norm2")),
    "lora": ((r"y \+= run\(f\"\{name\}\.lora",), (r"dx \+= dx_lora",)),
}


def code_of(operation: Operation) -> dict[str, Any]:
    """The file, the line, and the text of the operation's forward and backward pass."""
    if operation.layer in PLAIN:
        last = operation.name.rpartition(".")[2]
        patterns = IN_MODEL.get(operation.layer) or IN_MODEL.get(last, IN_MODEL["lora"])
        (line, there), (_, back) = _lines(model.forward, patterns[0]), _lines(model.backward, patterns[1])
        return {"file": "reference/model.py", "line": line, "forward": there, "backward": back}
    layer = layer_of(operation)
    functions = [_with_helpers(layer, function, operation.constants) for function in (layer.forward, layer.backward)]
    line = inspect.getsourcelines(layer.forward)[1]
    file = Path(layer.__file__).relative_to(ROOT).as_posix()
    return {"file": file, "line": line, "forward": functions[0], "backward": functions[1]}


def document_of(operation: Operation) -> str:
    """The docstring of the layer's module, which has its formulas and their source."""
    return inspect.getdoc(layer_of(operation)) or ""


def _lines(function: Callable[..., Any], patterns: tuple[str, ...]) -> tuple[int, str]:
    """The first line's number, and all lines of a function that one of the patterns is found in."""
    source, start = inspect.getsourcelines(function)
    found = [(start + i, line) for i, line in enumerate(source) if any(re.search(p, line) for p in patterns)]
    return found[0][0], inspect.cleandoc("\n" + "".join(line for _, line in found))


def _with_helpers(module: ModuleType, function: Callable[..., Any], settings: dict[str, Any]) -> str:
    """A function's source, and that of the module's private functions that it calls, or chooses by a setting."""
    parts, names = [inspect.getsource(function)], [function.__name__]
    for text in parts:  # which grows
        for name in re.findall(r"\b_\w+\b", text):
            found = getattr(module, name, None)
            if isinstance(found, dict):
                found = next(
                    (found[value] for value in settings.values() if isinstance(value, str) and value in found), None
                )
            if inspect.isfunction(found) and found.__name__ not in names and found.__name__ != "_rows":
                names.append(found.__name__)
                parts.append(inspect.getsource(found))
    return "\n\n".join(part.rstrip() for part in parts) + "\n"
