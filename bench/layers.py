"""The benchmarks of test_layers.py, each engine in a process of its own, side by side."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import results
from gpt.errors import require

ENGINES = ("numpy", "torch")


def main(out: Path | None) -> int:
    """Run the suite, print NumPy's and PyTorch's medians and their ratio, write JSON; pytest's status if it fails."""
    require("pytest_benchmark", extra="bench")
    require("torch", extra="torch")
    medians: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for engine in ENGINES:
            file = Path(folder, engine)
            status = subprocess.run(
                [
                    *(
                        sys.executable,
                        "-m",
                        "pytest",
                        "-q",
                        str(Path(__file__).with_name("test_layers.py")),
                        "-k",
                        engine,
                    ),
                    *("--benchmark-only", "--benchmark-quiet", f"--benchmark-json={file}"),
                    *("--benchmark-max-time=0.5", "--benchmark-warmup=on", "-p", "no:cacheprovider"),
                ]
            ).returncode
            if status:
                return status
            for benchmark in json.loads(file.read_text())["benchmarks"]:
                name = f"{benchmark['params']['name']} {benchmark['params']['direction']}"
                medians.setdefault(name, {})[engine] = benchmark["stats"]["median"]
    table = Table("layer", "numpy ms", "torch ms", "ratio", title="medians")
    for name, row in medians.items():
        table.add_row(name, *(f"{1e3 * row[engine]:.2f}" for engine in ENGINES), f"{row['numpy'] / row['torch']:.2f}")
    Console().print(table)
    if out:
        results.write(out, "layers", medians)
    return 0
