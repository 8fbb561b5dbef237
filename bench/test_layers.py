"""Every layer of the operator table, forward and backward, on either engine, at GPT-2 124M's sizes for 2 x 256 tokens.

`python -m bench layers` runs each engine's half in a process of its own; `pytest bench --benchmark-only` runs both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gpt.parity.ops import ROWS, Case, Problem
from gpt.parity.subjects import PyTorch, as_tuple, torch_operator

B, T, C, H, D, M, V = 2, 256, 768, 12, 64, 3072, 50257
SIZES = {
    "embedding": (V, C, B, T),
    "linear": (M, B, T, C),
    "layer_norm": (B, T, C),
    "add_layer_norm": (B, T, C),
    "rms_norm": (B, T, C),
    "add_rms_norm": (B, T, C),
    "rope": (B, H, T, D),
    "rope-interleaved": (B, H, T, D),
    "swiglu": (B, T, M),
    "gelu": (B, T, M),
    "gelu-tanh": (B, T, M),
    "bias_gelu-tanh": (B, T, M),
    "attention": (B, H, H, T, T, D),
    "attention-grouped": (B, H, H // 3, T, T, D),
    "attention-dropout": (B, H, H, T, T, D),
    "dropout": (B, T, C),
    "cross_entropy": (B, T, V),
    "linear_cross_entropy-no-bias": (V, B, T, C),
}


def of_numpy(problem: Problem, direction: str) -> Callable[[], Any]:
    layer, arguments = problem.row.twin(), problem.arguments
    if direction == "forward":
        return lambda: layer.forward(**arguments)
    saved = layer.forward(**arguments)[1]
    return lambda: layer.backward(problem.dy, saved)


def of_torch(problem: Problem, direction: str) -> Callable[[], Any]:
    torch = pytest.importorskip("torch")
    operator = torch_operator(problem.row)
    arguments, dy = PyTorch().prepare(problem)
    inputs = [arguments[name].requires_grad_() for name in problem.inputs()]
    if direction == "forward":
        return lambda: operator(*arguments.values())
    results = as_tuple(operator(*arguments.values()))
    return lambda: torch.autograd.grad(results, inputs, dy, retain_graph=True)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("engine", ["numpy", "torch"])
def test_layer(benchmark: Any, engine: str, name: str, direction: str) -> None:
    problem = ROWS[name].problem(Case(SIZES[name])).cast("float32")
    run = {"numpy": of_numpy, "torch": of_torch}[engine](problem, direction)
    benchmark.extra_info["size"] = SIZES[name]
    assert benchmark(run) is not None
