"""Print the table of figures: `python -m tests.figures [--quick] [--engine numpy|torch] [ID ...]`."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gpt.errors import UserError
from gpt.options import Parser
from tests.figures import engines, registry

WIDTH = 34  # characters of a value that are shown


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m tests.figures", description="Reproduce the figures that the sources print.")
    parser.add_argument("ids", nargs="*", metavar="ID", help="a figure or the beginning of its id; none: all")
    parser.add_argument("--quick", action="store_true", help="leave out the training runs, which take minutes each")
    parser.add_argument("--pretrained", action="store_true", help="those of OpenAI's GPT-2, which is then downloaded")
    parser.add_argument("--engine", choices=("numpy", "torch"), help="with this engine only")
    options = parser.parse_args(argv)
    chosen = {
        name: reproduction
        for name, reproduction in registry.load_all().items()
        if (not options.ids or name.startswith(tuple(options.ids)))
        and not (options.quick and reproduction.slow)
        and (name in registry.PRETRAINED) == options.pretrained
    }
    if not chosen:
        raise UserError(f"no figure begins with {' or '.join(options.ids)}")
    table = Table("figure", "printed", "numpy", "torch", "difference", "", title="Figures of the sources")
    failed = missed = 0
    started = time.perf_counter()
    for number, (name, reproduction) in enumerate(chosen.items(), 1):
        print(f"\r{number}/{len(chosen)} {name:<40}", end="", file=sys.stderr, flush=True)
        shown, errors, verdict = reproduce(name, reproduction, options.engine)
        failed += verdict == "differs"
        missed += verdict == "not run"
        entry = registry.FIGURES[name]
        printed = short(entry["printed"]) if entry["printed"] is not None else f"({short(entry['value'])})"
        cells = name, printed, *shown, " ".join(f"{error:.1e}" for error in errors), verdict
        table.add_row(*map(escape, cells))
    print("\r" + " " * 60 + "\r", end="", file=sys.stderr)
    Console(width=None if sys.stdout.isatty() else 180).print(table)
    print("In brackets: not printed by the source, recorded from a run of PyTorch's. The difference is that from the")
    print(
        f"printed and the recorded number, the larger one. {len(chosen)} figures, {failed} differ, {missed} not run, "
        f"{time.perf_counter() - started:.0f} s."
    )
    return 1 if failed or missed == len(chosen) else 0


def reproduce(name: str, reproduction: registry.Reproduction, engine: str | None) -> tuple[list[str], list[float], str]:
    """What each engine's column shows, the differences, and the verdict."""
    shown, errors, verdict = {}, [], "agrees"
    for column in reproduction.engines:
        if column and engine not in (None, column):
            continue
        try:
            ours = reproduction.function(*([engines.layers(column)] if column else []))
        except UserError as problem:
            shown[column], verdict = str(problem), "not run"
            continue
        shown[column] = short(ours)
        errors.append(registry.error(name, ours))
        if errors[-1] > registry.FIGURES[name]["atol"]:
            verdict = "differs"
    return [shown.get(column, shown.get("", "")) for column in ("numpy", "torch")], errors, verdict


def short(value: Any) -> str:
    """A value in a few characters, numbers rounded as the sources round them."""
    text = json.dumps(rounded(value), ensure_ascii=False)
    return text if len(text) <= WIDTH else text[: WIDTH - 1] + "…"


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
