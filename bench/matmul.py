"""One square matrix product: NumPy, PyTorch on the CPU, and PyTorch on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bench import results
from gpt.errors import require

SIZES = (256, 512, 1024, 2048)
COLUMNS = ("numpy", "torch cpu", "torch cuda")
SECONDS = 0.5  # for each size and column


def rate(run: Callable[[], Any], synchronize: Callable[[], Any], operations: float) -> float:
    """Operations in a second, from the median time of repeated runs."""
    run()
    times: list[float] = []
    while not times or sum(times) < SECONDS:
        synchronize()
        start = perf_counter()
        run()
        synchronize()
        times.append(perf_counter() - start)
    return operations / median(times)


def measure(n: int) -> dict[str, float | None]:
    """Rates of an (n, n) by (n, n) product in float32; None where there is no such device."""
    torch = require("torch", extra="torch")
    a, b = np.random.default_rng(0).normal(size=(2, n, n)).astype(np.float32)
    rates: dict[str, float | None] = {"numpy": rate(lambda: a @ b, lambda: None, 2 * n**3), "torch cuda": None}
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        x, y = (torch.from_numpy(array).to(device) for array in (a, b))
        synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
        rates[f"torch {device}"] = rate(lambda x=x, y=y: x @ y, synchronize, 2 * n**3)  # type: ignore[misc]
    return rates


def main(out: Path | None) -> int:
    """Measure, print the table, write JSON."""
    measured = {str(n): measure(n) for n in SIZES}
    table = Table("n", *COLUMNS, title="GFLOP/s of an (n, n) by (n, n) product, float32")
    for n, rates in measured.items():
        cells = (rates[column] for column in COLUMNS)
        table.add_row(n, *("no such device" if cell is None else f"{cell / 1e9:.0f}" for cell in cells))
    Console().print(table)
    if out:
        results.write(out, "matmul", measured)
    return 0
