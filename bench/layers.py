"""The benchmarks of test_layers.py, each engine in a process of its own, in turns, side by side.

pytest-benchmark calls a layer for a tenth of a second in each session. Of its calls, thousands for the quick layers, a
result keeps KEPT of each session at most, every n-th in the order of time.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import ceilings, results, stats
from bench.process import SESSIONS
from gpt.errors import check_installed

ENGINES = ("numpy", "torch")
KEPT = 25
SUITE = Path(__file__).with_name("test_layers.py")


def main(out: Path | None, sessions: int = SESSIONS) -> int:
    """Run the suite, print NumPy's and PyTorch's medians and their ratio, write JSON; pytest's status if it fails."""
    check_installed("pytest_benchmark", extra="bench")
    check_installed("torch", extra="torch")
    cases: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(sessions):
            for engine in ENGINES:
                file = Path(folder, engine)
                command = [sys.executable, "-m", "pytest", "-q", str(SUITE), "-k", engine, "-p", "no:cacheprovider"]
                options = ["--benchmark-only", "--benchmark-quiet", f"--benchmark-json={file}"]
                options += ["--benchmark-max-time=0.1", "--benchmark-warmup=on"]
                status = subprocess.run(command + options).returncode
                if status:
                    return status
                add(cases, json.loads(file.read_text()))
    finish(cases)
    table = Table("layer", "numpy ms", "torch ms", "ratio", title="medians")
    for name, case in cases.items():
        medians = [case["contestants"][engine]["seconds"]["median"] for engine in ENGINES]
        table.add_row(name, *(f"{1e3 * each:.3g}" for each in medians), f"{medians[0] / medians[1]:.2f}")
    Console().print(table)
    if out:
        results.write(out, "layers", cases, ceilings=ceilings.measure())
    return 0


def add(cases: dict[str, Any], report: dict[str, Any]) -> None:
    """Add a session's report of pytest-benchmark to the cases: the calls of each engine."""
    for benchmark in report["benchmarks"]:
        asked, calls = benchmark["params"], benchmark["stats"]["data"]
        settings = {"layer": asked["name"], "direction": asked["direction"], "size": benchmark["extra_info"]["size"]}
        # The engines' suites follow each other, so that neither tells of the moment in which the other was timed.
        empty = {"settings": settings, "control": None, "contestants": {}}
        case = cases.setdefault(f"{asked['name']} {asked['direction']}", empty)
        case["contestants"].setdefault(asked["engine"], []).append(calls[:: -(-len(calls) // KEPT)])


def finish(cases: dict[str, Any]) -> None:
    """Put in the place of each engine's sessions what a result keeps of them."""
    for case in cases.values():
        for engine, sessions in case["contestants"].items():
            case["contestants"][engine] = {"seconds": stats.sample(sessions)}
