"""Where the time of the NumPy engine's training step goes, layer by layer, against the machine's matrix products.

Every layer's forward and backward pass and the optimizer are timed in this process while steps are taken: in each
thread that computes a part of the batch (gpt/parts.py), and the times of the threads divided by their number. Where
parts are in processes (gpt/crew.py) it is the first one's, and the others' are alike. Beside them stands what the
step's matrix products would take at the rate of one large product, measured in the same run: no NumPy program that
multiplies these matrices takes less. What is of no layer (Python between them, threads and processes that wait for each
other) is the rest.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from rich.progress import Progress

from bench import ceilings, results
from bench.contest import show_table
from bench.sweep import AXES, Point
from bench.work import gradients
from gpt.engine import Batch, OptimizerConfig
from gpt.errors import UserError
from gpt.numpy_engine import NumpyEngine
from reference import attention, cross_entropy, embedding, gelu, layer_norm, linear
from reference.init import initialize
from reference.torch_rng import Generator

POINTS = {f"parameters {point.n}": point for point in AXES["parameters"].points}
LAYERS = {
    "linear": linear,
    "attention": attention,
    "layer norm": layer_norm,
    "GELU": gelu,
    "embedding": embedding,
    "loss": cross_entropy,
}
OPTIMIZER, REST = "clip and AdamW", "rest"
STEPS = 5


@contextlib.contextmanager
def timed() -> Iterator[tuple[Counter[str], set[int]]]:
    """Within it the layers of `reference` count their seconds, of all threads together, and say which these are."""
    seconds, threads, lock = Counter[str](), set[int](), threading.Lock()

    def counting(name: str, function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            start = perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                with lock:
                    seconds[name] += perf_counter() - start
                    threads.add(threading.get_ident())

        return call

    before = [(module, way, getattr(module, way)) for module in LAYERS.values() for way in ("forward", "backward")]
    names = {module: name for name, module in LAYERS.items()}
    try:
        for module, way, function in before:
            setattr(module, way, counting(names[module], function))
        yield seconds, threads
    finally:
        for module, way, function in before:
            setattr(module, way, function)


def measure(point: Point, steps: int = STEPS) -> dict[str, Any]:
    """Seconds of a step of this model, whole and by layer: medians."""
    config = point.config
    params = initialize(config, Generator(1), "gpt2")
    engine = NumpyEngine(config, params, OptimizerConfig())
    del params
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (point.batch, point.length + 1))
    batch = Batch(tokens[:, :-1], tokens[:, 1:])
    taken: list[dict[str, float]] = []
    with timed() as (seconds, threads):
        for _ in range(steps + 2):  # the first ones ask for memory
            seconds.clear()
            threads.clear()
            start = perf_counter()
            engine.accumulate(batch)
            computed = perf_counter()
            engine.step(1e-4, max_norm=1.0)
            end = perf_counter()
            layers = {name: seconds[name] / len(threads) for name in LAYERS}
            rest = computed - start - sum(layers.values())
            taken.append({"step": end - start, **layers, OPTIMIZER: end - computed, REST: rest})
    asked = {"work": "breakdown", "config": config.to_dict(), "batch": point.batch, "length": point.length}
    of = {name: median(step[name] for step in taken[2:]) for name in taken[0]}
    products = gradients(config, point.batch, point.length).operations
    return {"settings": asked, "n": point.n, "threads": len(threads), "operations": products, "seconds": of}


def main(steps: int | None, out: Path | None) -> int:
    """Measure every size, print a table, write JSON."""
    if steps is not None and steps < 1:
        raise UserError(f"steps: expected at least 1, got {steps}")
    limits, cases = ceilings.measure(), {}
    with Progress(transient=True) as progress:
        for name, point in progress.track(POINTS.items(), description="steps"):
            cases[name] = measure(point, steps or STEPS)
            if out:  # so that what ends it loses no more than one size
                results.write(out, "breakdown", cases, ceilings=limits)
    show_table(*rows_of(cases, limits))
    return 0


def rows_of(cases: Mapping[str, Any], limits: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A table: of each size the step's milliseconds, and in percent of them what its products would take at the rate of
    one large product, and what each layer takes."""
    columns = [*LAYERS, OPTIMIZER, REST]
    rows = []
    for case in cases.values():
        step = case["seconds"]["step"]
        least = case["operations"] / limits["operations_per_s"]
        shares = [least, *(case["seconds"][name] for name in columns)]
        rows.append([f"{case['n']:,}", f"{1e3 * step:,.1f}", *(f"{share / step:.0%}" for share in shares)])
    return ["parameters", "step, ms", "its products at the ceiling", *columns], rows


def summary(cases: Mapping[str, Any], limits: Mapping[str, Any]) -> str:
    """The table's gist, in a sentence."""
    steps = [case["seconds"]["step"] for case in cases.values()]
    products = [case["operations"] / limits["operations_per_s"] for case in cases.values()]
    shares = [least / step for least, step in zip(products, steps, strict=True)]
    elements = [
        1 - (case["seconds"]["linear"] + case["seconds"]["attention"] + case["seconds"][OPTIMIZER]) / step
        for case, step in zip(cases.values(), steps, strict=True)
    ]
    optimizer = [case["seconds"][OPTIMIZER] / step for case, step in zip(cases.values(), steps, strict=True)]
    return (
        f"Matrix products at the machine's best rate would take {min(shares):.0%} to {max(shares):.0%} of a step; "
        f"the optimizer takes {min(optimizer):.0%} to {max(optimizer):.0%}, and all that is neither a linear layer nor "
        f"attention, with Python itself, {min(elements):.0%} to {max(elements):.0%}."
    )
