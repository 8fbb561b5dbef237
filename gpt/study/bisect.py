"""Which operator alone makes two engines part: each is swapped by itself into a model that else stays as it is.

Everything runs in the PyTorch model, which takes its operators as a set (gpt/ops.py). The base is the side that is not
the NumPy engine, or the first of two that are not. What is swapped in is the other side's operator of that name: a
kernel, or, for the NumPy engine, the layer of `reference` with its own backward pass, wrapped for autograd. So are
the functions `linear` and `embedding`, which are in no set because all engines on PyTorch have the same.

A swap is judged by what it changes of the whole model, as `diverge` judges: loss and gradients of a training step,
base against base with the swap, in the same measure with the same bound. Only the truth is PyTorch's own model in
float64: a wrong layer of the reference must not be what its twin is measured by. An operator may part by itself, or
only along with others; where none does alone, all are swapped but one: an operator without which the model agrees is
needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpt.engine import Batch, Noise, OptimizerConfig
from gpt.errors import UserError, require
from gpt.parity import ops as table
from gpt.study.diverge import Measure, Pass, Side, TensorPair, accumulated, bound_of, moved, run_pass, step_pairs

__all__ = ["Bisection", "Swap", "bisect"]

FUNCTIONS = ("linear", "embedding")


@dataclass(frozen=True)
class Swap:
    """What one swap changed of the whole model."""

    operator: str
    loss: float  # difference, relative to the true loss
    gradient: float  # the largest difference of a gradient, relative to its largest entry
    tensor: str  # the parameter whose gradient that is
    error: float  # the largest of all, in the measure that the bound is meant for; NaN where one is
    bound: float

    @property
    def parts(self) -> bool:
        """Whether the model with the swap parts from the model without it."""
        return not self.error <= self.bound

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it: what is no finite number becomes null."""
        numbers = {name: getattr(self, name) for name in ("loss", "gradient", "error")}
        return {**vars(self), **{k: v if np.isfinite(v) else None for k, v in numbers.items()}, "parts": self.parts}


@dataclass(frozen=True)
class Bisection:
    """All swaps of one pair of sides."""

    base: str
    other: str
    alone: list[Swap]  # one operator swapped, the rest as in the base
    together: Swap  # all of them
    all_but_one: list[Swap]  # `operator` is the one that was left; only where none parts alone but all together do

    @property
    def culprits(self) -> list[str]:
        """The operators that part alone; else those without which all others agree; none where there is no such one."""
        alone = [swap.operator for swap in self.alone if swap.parts]
        return alone or [swap.operator for swap in self.all_but_one if not swap.parts]

    def verdict(self) -> str:
        """What came out, in words."""
        names = ", ".join(self.culprits)
        if any(swap.parts for swap in self.alone):
            return f"alone enough to part: {names}"
        if self.culprits:
            return f"no operator parts alone; needed, together with others: {names}"
        if self.together.parts:
            return "no operator parts alone, and none is needed: more than one part, each beside others"
        return "no operator parts them, alone or with all others"

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return {
            "base": self.base,
            "other": self.other,
            "alone": [swap.to_dict() for swap in self.alone],
            "together": self.together.to_dict(),
            "all_but_one": [swap.to_dict() for swap in self.all_but_one],
            "culprits": self.culprits,
            "verdict": self.verdict(),
        }


def bisect(
    sides: tuple[Side, Side],
    batch: Batch,
    dtype: str = "float64",
    noise: Noise | None = None,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda what: None,
) -> Bisection:
    """Swap every operator that differs between the sides and that the model uses. UserError where none can be."""
    if sides[0].params is not sides[1].params:
        raise UserError("bisect: swaps operators between two engines of one model, and these are two models")
    if sides[0].engine == sides[1].engine and not (sides[0].kernels or sides[1].kernels):
        raise UserError(f"bisect: expected two engines that differ, got {sides[0].engine} twice")
    require("torch", extra="torch")
    base_side, other_side = sides if sides[0].engine != "numpy" else sides[::-1]
    swaps = _Swaps(base_side, other_side, batch, dtype, noise, device)
    true_side = Side("truth", "torch", base_side.config, base_side.params)
    truth = run_pass(true_side, batch, "float64", noise)
    scale = moved(true_side, truth, batch, noise) if dtype == "float32" else {}
    measure = Measure(bound_of(sides, dtype), truth, scale)
    base = swaps.run(())

    def judged(name: str, operators: Sequence[str]) -> Swap:
        progress(name)
        with np.errstate(all="ignore"):
            pairs = [pair for pair, _, _ in step_pairs((base, swaps.run(operators)), measure, base_side.config)]
        return _swap(name, pairs, measure.bound)

    names = swaps.names()
    alone = [judged(name, [name]) for name in names]
    together = judged("all of them", names)
    needed: list[Swap] = []
    if together.parts and not any(swap.parts for swap in alone) and len(names) > 1:
        needed = [judged(name, [other for other in names if other != name]) for name in names]
    return Bisection(base_side.label, other_side.label, alone, together, needed)


class _Swaps:
    """The base's model with some operators of the other side."""

    def __init__(self, base: Side, other: Side, batch: Batch, dtype: str, noise: Noise | None, device: str) -> None:
        from gpt import twins

        self.base, self.batch, self.dtype, self.noise, self.device = base, batch, dtype, noise, device
        self.gradients = {row.layer: row.gradients for row in table.ROWS.values()}
        self.operators = base.operators(device)
        if other.engine == "numpy":
            self.others = twins.reference_operators(self.gradients)
        else:
            self.others = other.operators(device)
        self.functions = FUNCTIONS if other.engine == "numpy" else ()
        # Nor does the NumPy model fuse anything, and so one layer is one swap. A kernel may be of a fused operator.
        self.unfused = other.engine == "numpy" and base.engine == "torch" and not base.kernels
        self.used: set[str] = set()

    def names(self) -> list[str]:
        """What can be swapped: used by the model, and not the same on both sides. Known once the base has been run."""
        from gpt import twins

        differ = [op for op in twins.SWAPPABLE if getattr(self.operators, op) is not getattr(self.others, op)]
        return [*(op for op in differ if op in self.used), *self.functions]

    def run(self, names: Sequence[str]) -> Pass:
        """A step of the base with these swapped in."""
        from gpt import twins
        from gpt.torch_engine import TorchEngine

        swapped: dict[str, Any] = {op: getattr(self.others, op) for op in names if op not in FUNCTIONS}
        operators = twins.counted(dataclasses.replace(self.operators, **swapped), self.used)
        if self.unfused:
            operators = twins.unfused(operators)
        functions = tuple(name for name in names if name in FUNCTIONS)
        side = self.base
        engine = TorchEngine(side.config, side.params, OptimizerConfig(), self.dtype, self.device, operators)
        with twins.Functions(functions, self.gradients) if functions else nullcontext():
            return Pass([], *accumulated(engine, self.batch, self.noise))


def _swap(name: str, pairs: Sequence[TensorPair], bound: float) -> Swap:
    """The worst of loss and gradients; an error that is not a number is worse than any."""
    loss, *gradients = pairs

    def size(value: float) -> float:
        return np.inf if np.isnan(value) else value

    worst = max(gradients, key=lambda pair: size(pair.difference), default=loss)
    error = max((pair.error for pair in pairs), key=size)
    return Swap(name, loss.difference, worst.difference, worst.name, error, bound)
