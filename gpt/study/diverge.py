"""Where two engines part: the first tensor of a training step, in the order of execution, that they do not agree on.

What is compared, in this order:

    parameter    of two checkpoints, what they begin with
    forward      every tensor of the pass, down to the loss
    backward     the gradient of each of these, on the way back
    fused        forward once more, as training computes it: a kernel may do two steps in one, which are taken apart for
                 the tensors above, so that each has its gradient
    step         the loss of this
    gradient     the gradient of each parameter, in the order in which the backward pass finishes them

and by which measure. The truth t is the NumPy engine in float64 with the parameters of the first side.

    float64    max |a - b| / max |t|, at most 1e-12, or 1e-11 where a kernel takes part: rounding is far below, so that
               whatever is above is another formula.
    float32    With e(x) = ||x - t|| / ||t||, the larger of e(a) and e(b) over the smaller, at most 3. How rounding
               grows on its way depends on the model and on the batch, so that no fixed number says what is too much:
               the other side does, which went the same way.

The smaller one may be small by chance. It is taken to be no less than the rounding of one number, u = 2^-24: a side
may be exact, as in rows copied from an embedding, and any other is infinitely many times farther. And where few
numbers decide, as in a loss, in the gradient of a low rank, or behind a softmax with two keys nearly alike, one side's
luck says nothing: it is taken to be no less than what the NumPy engine errs by in float32 if each parameter is moved by
one unit in its last place, the largest of three draws. What float32 can tell of a tensor is what such a move leaves.

A key's bias has a true gradient of 0, unless keys are turned by their positions: its error is measured by the gradient
of its weight. Two checkpoints may differ in it without any effect: it is not compared, and keys are taken without it.
What is not a finite number never agrees with anything.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from gpt.engine import Arrays, Batch, Engine, Noise, NonFiniteError, OptimizerConfig, create_engine
from gpt.errors import UserError
from gpt.parity.gates import ALGEBRA, UNIT
from gpt.parity.laws import EXACT, relative
from gpt.parity.model import KEY_BIAS, measured_by, paired, traced
from reference.config import GPTConfig

if TYPE_CHECKING:
    from gpt.ops import Operators

__all__ = [
    "ROUNDING",
    "Divergence",
    "First",
    "Measure",
    "Pass",
    "Side",
    "TensorPair",
    "accumulated",
    "bound_of",
    "check_same_config",
    "cut",
    "diverge",
    "moved",
    "run_pass",
    "size_of",
    "step_pairs",
]

Kind = Literal["parameter", "forward", "backward", "fused", "step", "gradient"]
ROUNDING = 3.0  # in float32: times the other side's error
DRAWS = 3  # of parameters moved by one unit in their last place
AROUND = 3  # rows and columns on each side of the worst element, of which the values are shown
MAP = (64, 128)  # rows and columns that the map of a difference has at most


@dataclass(frozen=True)
class Side:
    """One of the two that are compared: an engine and what it computes with."""

    label: str
    engine: str  # numpy, torch, triton
    config: GPTConfig
    params: Arrays
    kernels: Mapping[str, Any] = field(default_factory=dict)  # operators of somebody else, by name (gpt/twins.py)

    def operators(self, device: str = "cpu") -> Operators:
        """The set that the PyTorch model runs on; the NumPy engine has none."""
        from gpt.ops import choose

        return dataclasses.replace(choose(self.engine, device), **self.kernels)

    def make(self, dtype: str, device: str = "cpu") -> Engine:
        """The engine, with a copy of the parameters."""
        if not self.kernels:
            on = "cpu" if self.engine == "numpy" else device
            return create_engine(self.engine, self.config, self.params, dtype=dtype, device=on)
        from gpt.torch_engine import TorchEngine

        return TorchEngine(self.config, self.params, OptimizerConfig(), dtype, device, self.operators(device))


class Pass(NamedTuple):
    """What one training step computes, up to the optimizer."""

    trace: list[tuple[str, np.ndarray]]  # forward, the loss, and backward ("d." before the name), in order
    loss: np.ndarray  # of the step, float64 scalar
    gradients: Arrays  # by parameter name, in the order in which the engine has them; none if the loss is not finite
    fused: Sequence[
        tuple[str, np.ndarray]
    ] = ()  # forward once more, where operators may be fused that are not PyTorch's


@dataclass(frozen=True)
class TensorPair:
    """What two sides made of one tensor."""

    kind: Kind
    name: str
    shape: tuple[int, ...]
    error: float  # in the measure that the bound is meant for: see above
    bound: float
    difference: float  # the largest, relative to the largest entry of the truth
    from_truth: tuple[float, float]  # ||x - truth|| / ||truth|| of each side
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # never true of NaN

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it: what is no finite number becomes null."""
        numbers = {"error": _plain(self.error), "difference": _plain(self.difference)}
        distances = [_plain(value) for value in self.from_truth]
        return {**vars(self), "shape": list(self.shape), **numbers, "from_truth": distances, "passed": self.passed}


@dataclass(frozen=True)
class First:
    """The first tensor on which two sides part, and where in it."""

    pair: TensorPair
    number: int  # of the tensor, counted from 0
    values: tuple[np.ndarray, np.ndarray]  # of each side, of one shape
    truth: np.ndarray | None  # None where the truth has no such tensor
    index: tuple[int, ...]  # of the worst element: not finite, or else with the largest difference

    @property
    def comparable(self) -> bool:
        """Whether both sides have this tensor, in one shape, so that there is a worst element."""
        return self.truth is not None and self.values[0].shape == self.values[1].shape == self.truth.shape

    def at(self) -> tuple[float, float, float]:
        """The worst element: both sides' value, and the truth."""
        a, b, true = (float(array[self.index]) for array in self._arrays())
        return a, b, true

    def differences(self) -> np.ndarray:
        """|a - b| where the worst element is: the tensor's last two axes, (rows, columns); NaN is not finite."""
        a, b = (self._plane(array) for array in self.values)
        with np.errstate(all="ignore"):
            difference = np.abs(a - b)
        return np.where(np.isfinite(difference), difference, np.nan)

    def within(self) -> float:
        """How large a difference of one entry is no more than the bound allows."""
        assert self.truth is not None
        finite = np.asarray(self.truth[np.isfinite(self.truth)], np.float64)
        if self.pair.bound < 1:
            return self.pair.bound * float(np.max(np.abs(finite), initial=0.0))
        nearer = max(self.pair.from_truth) / self.pair.error  # as it was taken to be
        nearer = nearer if math.isfinite(nearer) else UNIT["float32"]
        return self.pair.bound * nearer * float(np.linalg.norm(finite)) / math.sqrt(max(1, finite.size))

    def farther(self) -> int | None:
        """Which side is farther from the truth, 0 or 1; None if neither is."""
        a, b = (math.inf if math.isnan(value) else value for value in self.pair.from_truth)
        return None if a == b else int(b > a)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it: numbers that are not finite are null. `map` is cut to size, the largest of each part.

        Of sides that do not have the same tensors there is nothing but `number` and `tensor`.
        """
        told: dict[str, Any] = {"number": self.number, "tensor": self.pair.to_dict()}
        if not self.comparable:
            return told
        differences = self.differences()
        rows, columns = _window(self.index[-2:], differences.shape)
        named = zip(
            ("a", "b", "truth"), (_listed(self._plane(array)[rows, columns]) for array in self._arrays()), strict=True
        )
        return told | {
            "index": list(self.index),
            "worst": [_plain(value) for value in self.at()],
            "farther": self.farther(),
            "within": _plain(self.within()),
            "map": {
                "rows": differences.shape[0],
                "columns": differences.shape[1],
                "values": _listed(cut(differences, *MAP)),
            },
            "around": {"rows": [rows.start, rows.stop], "columns": [columns.start, columns.stop], **dict(named)},
        }

    def _arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        assert self.truth is not None
        return *self.values, self.truth

    def _plane(self, array: np.ndarray) -> np.ndarray:
        """The last two axes of a tensor where the worst element is, in float64."""
        plane = np.asarray(array[self.index[:-2]], np.float64)
        return plane.reshape((1,) * (2 - plane.ndim) + plane.shape)


@dataclass(frozen=True)
class Divergence:
    """Two sides on one batch."""

    sides: tuple[str, str]
    dtype: str
    one_model: bool  # whether the sides have the same parameters, so that the truth is that of both
    batch: tuple[int, int]  # rows and tokens
    pairs: list[TensorPair]
    first: First | None
    not_finite: tuple[str, str]  # the first tensor of each side with such a number, or ""

    @property
    def agree(self) -> bool:
        return bool(self.pairs) and all(pair.passed for pair in self.pairs)

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return {
            "sides": list(self.sides),
            "dtype": self.dtype,
            "one_model": self.one_model,
            "batch": list(self.batch),
            "agree": self.agree,
            "tensors": [pair.to_dict() for pair in self.pairs],
            "first": self.first and self.first.to_dict(),
            "not_finite": [name or None for name in self.not_finite],
        }


def diverge(
    sides: tuple[Side, Side], batch: Batch, dtype: str = "float64", noise: Noise | None = None, device: str = "cpu"
) -> Divergence:
    """Run both sides, and the truth, on one batch with the same noise, and hold every tensor against the other's.

    `device` is that of PyTorch's side or sides. Raises UserError where the configurations or the batch do not fit, or
    a kernel fails.
    """
    a, b = sides
    check_same_config(sides)
    true_side = Side("truth", "numpy", a.config, a.params)
    passes: list[Pass] = []
    for side in sides:
        same = next((i for i, other in enumerate(sides[: len(passes)]) if _same(side, other)), None)
        passes.append(run_pass(side, batch, dtype, noise, device) if same is None else passes[same])
    known = next((i for i, side in enumerate(sides) if dtype == "float64" and _same(side, true_side)), None)
    truth = run_pass(true_side, batch, "float64", noise) if known is None else passes[known]

    found: list[TensorPair] = []
    first = None
    measure = Measure(
        bound_of(sides, dtype), truth, moved(true_side, truth, batch, noise) if dtype == "float32" else {}
    )
    for pair, values, true in _all(sides, passes, measure):
        if not pair.passed and first is None:
            first = First(pair, len(found), values, true, _worst(*values))
        found.append(pair)
    not_finite = tuple(_first_not_finite(side, of_side) for side, of_side in zip(sides, passes, strict=True))
    rows, tokens = batch.inputs.shape
    return Divergence(
        (a.label, b.label), dtype, a.params is b.params, (rows, tokens), found, first, (not_finite[0], not_finite[1])
    )


def run_pass(side: Side, batch: Batch, dtype: str, noise: Noise | None, device: str = "cpu") -> Pass:
    """One step of a side. What fails in somebody's kernel is a UserError."""
    with np.errstate(all="ignore"):
        engine = side.make(dtype, device)
        try:
            trace = traced(engine, batch, noise)
            fused: Sequence[tuple[str, np.ndarray]] = ()
            if side.kernels or side.engine == "triton":
                from gpt.torch_engine import TorchEngine
                from gpt.twins import fused_forward

                assert isinstance(engine, TorchEngine)
                fused = fused_forward(engine, batch, noise)
            return Pass(trace, *accumulated(engine, batch, noise), fused)
        except UserError:
            raise
        except Exception as error:
            if not side.kernels:
                raise
            raise UserError(f"kernel: {side.label}: {type(error).__name__}: {error}") from error


def accumulated(engine: Engine, batch: Batch, noise: Noise | None) -> tuple[np.ndarray, Arrays]:
    """Loss and gradients of a step, copied; without gradients if the loss is not finite."""
    try:
        with np.errstate(all="ignore"):
            loss = engine.accumulate(batch, noise=noise)
    except NonFiniteError:
        return np.array(math.nan), {}
    return np.array(loss), {name: np.array(value) for name, value in engine.gradients().items()}


def bound_of(sides: Sequence[Side], dtype: str) -> float:
    """How far apart two sides may be, in the measure of this dtype."""
    if dtype == "float32":
        return ROUNDING
    return ALGEBRA if any(side.engine == "triton" or side.kernels for side in sides) else EXACT


def check_same_config(sides: tuple[Side, Side]) -> None:
    """Refuse two models that are not of one configuration, naming the first field that differs."""
    settings = [side.config.to_dict() for side in sides]
    for name in {**settings[0], **settings[1]}:
        values = [given.get(name) for given in settings]
        if values[0] != values[1]:
            raise UserError(
                f"{name}: the configurations differ, {values[0]} in {sides[0].label} and {values[1]} in "
                f"{sides[1].label}; only models of one configuration have the same tensors"
            )


def moved(side: Side, truth: Pass, batch: Batch, noise: Noise | None) -> dict[tuple[str, str], float]:
    """(kind, name) -> how far float32 is from the truth if each parameter moves by one unit in its last place.

    The largest of DRAWS, in which it is drawn anew which parameters become larger and which smaller. A loss is a single
    number, which may be near in all of them: it counts as no nearer than the logits that it is computed from.
    """
    largest: dict[tuple[str, str], float] = {}
    for draw in range(DRAWS):
        rng = np.random.default_rng(draw)
        params = {name: _nudged(rng, np.asarray(value, np.float32)) for name, value in side.params.items()}
        other = run_pass(Side(side.label, side.engine, side.config, params), batch, "float32", noise)
        for key, (x, true, size) in _beside(other, truth, side.config).items():
            distance = _distance(x, true, size)
            if math.isfinite(
                distance
            ):  # what is truly 0, as behind an adapter that has learnt nothing, has no multiple
                largest[key] = max(largest.get(key, 0.0), distance)
    largest |= {("fused", name): distance for (kind, name), distance in largest.items() if kind == "forward"}
    for key in (("forward", "loss"), ("step", "loss")):
        largest[key] = max(largest.get(key, 0.0), largest.get(("forward", "head"), 0.0))
    return largest


def _nudged(rng: np.random.Generator, array: np.ndarray) -> np.ndarray:
    """Every entry the next float32 above or below it."""
    return np.nextafter(array, np.where(rng.random(array.shape) < 0.5, np.inf, -np.inf).astype(np.float32))


def _beside(other: Pass, truth: Pass, config: GPTConfig) -> dict[tuple[str, str], tuple[np.ndarray, ...]]:
    """(kind, name) -> the tensor of a pass of the same model, the true one, and what an error is relative to."""
    trace = dict(truth.trace)
    found: dict[tuple[str, str], tuple[np.ndarray, ...]] = {}
    for name, x in other.trace:
        found[_kind(name), name] = x, trace[name], trace[name]
    found["step", "loss"] = other.loss, truth.loss, truth.loss
    for name, x in other.gradients.items():
        true = truth.gradients[name]
        found["gradient", name] = x, true, size_of(name, truth.gradients, config)
    return found


def size_of(name: str, gradients: Arrays, config: GPTConfig) -> np.ndarray:
    """What the error of a parameter's gradient is relative to: itself, but for a key's bias."""
    name = name if config.position == "rope" else measured_by(name)  # with positions that turn keys it has a gradient
    return gradients[name]


def _all(
    sides: tuple[Side, Side], passes: Sequence[Pass], measure: Measure
) -> Iterator[tuple[TensorPair, tuple[np.ndarray, np.ndarray], np.ndarray | None]]:
    """Every tensor in order, with both values and the true one."""
    a, b = sides
    truth = measure.truth
    if a.params is not b.params:
        # Of keys, which may differ without any effect.
        biases = {name for name in a.params if name.endswith(KEY_BIAS) and a.config.position != "rope"}
        for name, value in a.params.items():
            if name not in biases:
                both = (value, b.params[name])
                yield measure.pair("parameter", name, both, value), both, value
        passes = [_without(biases, of_side, side.params) for of_side, side in zip(passes, sides, strict=True)]
        truth = _without(biases, truth, a.params)
    true_trace = dict(truth.trace)
    for name, x, y, note in paired(passes[0].trace, passes[1].trace, b.label):
        true = None if note else true_trace.get(name)
        yield measure.pair(_kind(name), name, (x, y), true, note=note), (x, y), true
        if note:
            return
    ours, theirs = ({**dict(of_side.trace), **dict(of_side.fused)} for of_side in passes)
    for name in dict(passes[0].fused) | dict(passes[1].fused):
        both, true = (ours[name], theirs[name]), true_trace[name]
        yield measure.pair("fused", name, both, true), both, true
    yield from step_pairs(passes, measure, a.config)


def _without(biases: set[str], of_side: Pass, params: Arrays) -> Pass:
    """The same pass, with the tensors that these biases were added to as they were before."""

    def plain(tensors: Sequence[tuple[str, np.ndarray]]) -> list[tuple[str, np.ndarray]]:
        return [(name, x - params[bias] if (bias := f"{name}.bias") in biases else x) for name, x in tensors]

    return of_side._replace(trace=plain(of_side.trace), fused=plain(of_side.fused))


def step_pairs(
    passes: Sequence[Pass], measure: Measure, config: GPTConfig
) -> Iterator[tuple[TensorPair, tuple[np.ndarray, np.ndarray], np.ndarray | None]]:
    """The loss and the gradients of a step, with both values and the true one; no gradients of a loss not finite."""
    ours, theirs = passes
    truth = measure.truth
    yield measure.pair("step", "loss", (ours.loss, theirs.loss), truth.loss), (ours.loss, theirs.loss), truth.loss
    for name, true in truth.gradients.items():
        if name in ours.gradients and name in theirs.gradients:
            both = ours.gradients[name], theirs.gradients[name]
            yield measure.pair("gradient", name, both, true, size_of(name, truth.gradients, config)), both, true


def _kind(name: str) -> Kind:
    return "backward" if name.startswith("d.") else "forward"


@dataclass(frozen=True)
class Measure:
    """How the error of a tensor is measured, see the module's docstring. `moved`, in float32: what `moved` returns."""

    bound: float
    truth: Pass
    moved: Mapping[tuple[str, str], float]

    def pair(
        self,
        kind: Kind,
        name: str,
        both: tuple[np.ndarray, np.ndarray],
        true: np.ndarray | None,
        size: np.ndarray | None = None,
        note: str = "",
    ) -> TensorPair:
        """`size`: what errors are relative to, `true` unless given."""
        a, b = both
        if note or true is None or not a.shape == b.shape == true.shape:
            note = note or f"{a.shape} and {b.shape}"
            return TensorPair(kind, name, a.shape, math.inf, self.bound, math.inf, (math.inf, math.inf), note)
        size = true if size is None else size
        with np.errstate(all="ignore"):
            distances = _distance(a, true, size), _distance(b, true, size)
            difference = relative(np.asarray(a, np.float64) - np.asarray(b, np.float64), size)
        if not all(np.isfinite(array).all() for array in (a, b, true)):
            error, note = math.nan, "not finite"
        elif self.bound < 1:
            error = difference
        else:
            error = max(distances) / max(min(distances), UNIT["float32"], self.moved.get((kind, name), 0.0))
        return TensorPair(kind, name, a.shape, error, self.bound, difference, distances, note)


def _distance(x: np.ndarray, true: np.ndarray, size: np.ndarray) -> float:
    """||x - true|| / ||size||, computed in float64."""
    x, true, size = (np.asarray(array, np.float64) for array in (x, true, size))
    return relative(float(np.linalg.norm(x - true)), float(np.linalg.norm(size)))


def cut(array: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """array (R, C) -> at most (rows, columns): the largest of each part, NaN where a part has one."""
    for axis, most in enumerate((rows, columns)):
        if array.shape[axis] > most:
            starts = np.linspace(0, array.shape[axis], most, endpoint=False).astype(int)
            array = np.maximum.reduceat(array, starts, axis=axis)  # NaN wins
    return array


def _same(a: Side, b: Side) -> bool:
    return a.engine == b.engine and a.params is b.params and not a.kernels and not b.kernels


def _worst(a: np.ndarray, b: np.ndarray) -> tuple[int, ...]:
    """The index of the first element that is not finite, or else of the largest difference."""
    if a.shape != b.shape:
        return ()
    with np.errstate(all="ignore"):
        difference = np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))
    flat = np.argmax(np.where(np.isfinite(difference), difference, np.inf)) if difference.size else 0
    return tuple(map(int, np.unravel_index(flat, a.shape)))


def _first_not_finite(side: Side, of_side: Pass) -> str:
    """The name of the first tensor, in order, that is not finite; "" if all are."""
    named = (
        *((f"parameter {name}", array) for name, array in side.params.items()),
        *of_side.trace,
        *of_side.fused,
        ("the loss of the step", of_side.loss),
        *((f"gradient of {name}", array) for name, array in of_side.gradients.items()),
    )
    return next((name for name, array in named if not np.isfinite(array).all()), "")


def _window(index: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, slice]:
    """The rows and columns around an element of a plane, as many as there are."""
    places = (0,) * (2 - len(index)) + tuple(index)
    rows, columns = (
        slice(max(0, place - AROUND), min(n, place + AROUND + 1)) for place, n in zip(places, shape, strict=True)
    )
    return rows, columns


def _listed(array: np.ndarray) -> list[list[float | None]]:
    return [[_plain(value) for value in row] for row in array.tolist()]


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
