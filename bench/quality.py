"""Does a model learn the same on every engine? The same small model, data and seed, trained to a fixed validation loss.

Each engine trains by `twingrad train`, in a process of its own. The step at whose evaluation the validation loss is
first at most the target must be the same on all, and the loss there the same to the case's bound. The set `triton` runs
on a GPU, or else in Triton's interpreter, which is slow: with it goes a case of a tiny model.

In float32 rounding grows a thousandfold in some hundred steps, at the learning rates of small models, and two right
engines part in the fourth digit; so the longer training is in float64, where it grows as much and is nothing still.

The text is the catalogue's python-stdlib, the source of the Python that runs this: another version is another text.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bench import results
from gpt.errors import UserError, check_installed, is_installed
from gpt.train.log import read_log


@dataclass(frozen=True)
class Case:
    """One model, how it is trained, and when that is enough."""

    engines: tuple[str, ...]
    preset: str
    batch: int
    length: int
    lr: float
    steps: int  # at most
    every: int  # steps from one evaluation to the next
    target: float  # nats a token
    dtype: str
    bound: float  # of the losses at the target, relative: rounding, grown by all the steps to it
    changes: Mapping[str, int] | None = None
    data: str = "python-stdlib"
    seed: int = 123

    def command(self, engine: str, out: Path) -> list[str]:
        """twingrad train."""
        options = {
            "engine": engine, "out": out, "data": self.data, "tokenizer": "bytes", "preset": self.preset,
            "sampling": "random", "batch_size": self.batch, "max_length": self.length, "lr": self.lr,
            "dtype": self.dtype, "warmup_steps": self.steps // 10, "steps": self.steps, "seed": self.seed,
            "eval_every": self.every, "eval_batches": 2, "sample_every": 0, "save_every": 0, "save_best": False,
            **{f"model.{name}": value for name, value in (self.changes or {}).items()},
        }  # fmt: skip
        flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        return [sys.executable, "-m", "gpt", "train", *flags]


SMALLEST = {"n_layers": 1, "emb_dim": 32, "n_heads": 2}
CASES = {
    "small": Case(("numpy", "torch"), "bytes-small", 16, 128, 3e-3, 250, 10, 2.0, "float64", 1e-9),
    "tiny": Case(("numpy", "torch", "triton"), "bytes-tiny", 4, 16, 1e-2, 20, 2, 3.6, "float32", 1e-5, SMALLEST),
}


def measure(name: str, case: Case) -> dict[str, Any]:
    """What each engine took to the target, how its losses went, and whether all coincide."""
    engines = {}
    with tempfile.TemporaryDirectory() as folder:
        for engine in case.engines:
            if engine == "triton" and not is_installed("triton"):
                continue
            print(f"{name}: training on the {engine} engine", flush=True)
            out = Path(folder, engine)
            environment = {**os.environ, "TRITON_INTERPRET": "1"} if engine == "triton" and not _on_gpu() else None
            done = subprocess.run(case.command(engine, out), env=environment, capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"{name}, {engine}: {(done.stderr.strip().splitlines() or ['training failed'])[-1]}")
            engines[engine] = reached(read_log(out / "log.csv"), case.target)
    return {"settings": {**asdict(case), "work": "quality"}, "engines": engines, **coincide(engines, case.bound)}


def reached(log: Mapping[str, np.ndarray], target: float) -> dict[str, Any]:
    """Steps and seconds to the first evaluation whose loss was at most the target, None where none was; and all."""
    evaluated = np.flatnonzero(~np.isnan(log["val_loss"]))
    losses = log["val_loss"][evaluated]
    below = np.flatnonzero(losses <= target)
    at = int(evaluated[below[0]]) if below.size else None
    return {
        "steps": None if at is None else int(log["step"][at]) + 1,
        "seconds": None if at is None else float(log["seconds"][at]),
        "val_loss": float(losses[-1] if at is None else log["val_loss"][at]),
        "evaluated_steps": [int(step) + 1 for step in log["step"][evaluated]],
        "evaluated_losses": [float(loss) for loss in losses],
    }


def coincide(engines: Mapping[str, Mapping[str, Any]], bound: float) -> dict[str, Any]:
    """`coincides`: all reached the target after as many steps with the same loss; `difference`: by how much that is
    off, at most, of the loss; `difference_anywhere`: the same of any evaluation."""
    first, *others = engines.values()
    differences = [abs(each["val_loss"] / first["val_loss"] - 1) for each in others]
    curves = [np.array(each["evaluated_losses"]) for each in engines.values()]
    anywhere = max((float(np.abs(curve / curves[0] - 1).max()) for curve in curves[1:]), default=0.0)
    steps = {each["steps"] for each in engines.values()}
    difference = max(differences, default=0.0)
    good = len(steps) == 1 and None not in steps and difference <= bound
    return {"coincides": good, "difference": difference, "difference_anywhere": anywhere}


def main(names: Sequence[str], out: Path | None) -> int:
    """Train these cases, or all, on each of their engines, print and write JSON; 1 where they do not coincide."""
    check_installed("torch", extra="torch")
    for name in names:
        if name not in CASES:
            raise UserError(f"{name!r} is not one of {', '.join(CASES)}")
    measured: dict[str, Any] = {}
    for name in names or CASES:
        measured[name] = measure(name, CASES[name])
        if out:  # so that what ends it loses no more than one case
            results.write(out, "quality", measured)
    show(measured)
    return 0 if all(case["coincides"] for case in measured.values()) else 1


def show(measured: Mapping[str, Any]) -> None:
    """A row for each engine of each case, and what came of it."""
    table = Table("case", "engine", "target", "steps", "validation loss", "seconds")
    for name, case in measured.items():
        for engine, found in case["engines"].items():
            steps = "not reached" if found["steps"] is None else str(found["steps"])
            seconds = "" if found["seconds"] is None else f"{found['seconds']:.1f}"
            table.add_row(name, engine, f"{case['settings']['target']}", steps, f"{found['val_loss']:.7f}", seconds)
    console = Console(width=100)
    console.print(table)
    for name, case in measured.items():
        verdict = "coincide" if case["coincides"] else "DO NOT COINCIDE"
        console.print(
            f"{name}: steps and loss {verdict}; the losses differ by {case['difference']:.1e} at the target, by "
            f"{case['difference_anywhere']:.1e} at most; bound {case['settings']['bound']:.0e}"
        )


def _on_gpu() -> bool:
    """Whether PyTorch sees one, asked in a process that ends: this one shall not load it."""
    code = "import torch, sys; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code]).returncode == 0
