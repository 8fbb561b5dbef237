"""One square matrix product: NumPy, PyTorch on the CPU, and PyTorch on a GPU where there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import results
from bench.contest import summary
from bench.process import SESSIONS, take_turns
from gpt.errors import require

SIZES = (256, 512, 1024, 2048)
COLUMNS = ("numpy", "torch cpu", "torch cuda")
ROUNDS = 10


def measure(n: int, sessions: int, rounds: int) -> dict[str, Any]:
    """Seconds of an (n, n) by (n, n) product in float32 on each device that there is."""
    torch = require("torch", extra="torch")
    settings = {"work": "product", "n": n}
    columns = COLUMNS if torch.cuda.is_available() else COLUMNS[:2]
    return summary(settings, take_turns(f"n = {n}", dict.fromkeys(columns, settings), sessions, rounds), {})


def main(out: Path | None, sessions: int = SESSIONS, rounds: int = ROUNDS) -> int:
    """Measure, print the table, write JSON."""
    measured = {str(n): measure(n, sessions, rounds) for n in SIZES}
    table = Table("n", *COLUMNS, title="GFLOP/s of an (n, n) by (n, n) product, float32")
    for n, case in measured.items():
        cells = (case["contestants"].get(column) for column in COLUMNS)
        rates = (cell and 2 * int(n) ** 3 / cell["seconds"]["median"] / 1e9 for cell in cells)
        table.add_row(n, *("no such device" if rate is None else f"{rate:.0f}" for rate in rates))
    Console().print(table)
    if out:
        results.write(out, "matmul", measured)
    return 0
