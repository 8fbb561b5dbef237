"""The table of operators: a row a layer, from which the checks, the tests and the benchmarks know all they need.

Because the twins of a layer have the same face, `forward(**arguments)` and `backward(dy, saved)`, a row holds no code
that runs a layer: only how its arguments are drawn, at which sizes, and which laws it obeys. A new layer is a row.

What is drawn makes mistakes show: upstream gradients are random (gradients of layer norm and softmax vanish under
constant ones), axes have different sizes without a common factor (so that a missing transpose cannot fit), and weights
and biases are neither 0, nor 1, nor small (so that a term that they multiply cannot hide).
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np

from gpt.errors import UserError
from gpt.parity import laws
from gpt.parity.subjects import REFERENCE, Subject, as_tuple
from reference import rope as rotary

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """One set of inputs. What `size` means is up to the row; `scale` multiplies all inputs that are no parameters."""

    size: tuple[int, ...]
    layout: str = "rows"  # how arrays lie in memory: rows, transposed, or sliced from larger ones
    scale: float = 1.0

    def __str__(self) -> str:
        size = "x".join(map(str, self.size))
        more = [self.layout] * (self.layout != "rows") + [f"{self.scale:g}"] * (self.scale != 1)
        return " ".join([size, *more])


@dataclass(frozen=True)
class Row:
    """One operator: a layer with some of its settings, and the implementation of it that is looked at."""

    name: str
    layer: str  # the module, in reference and in every package of twins
    draw: Callable[[np.random.Generator, Case], dict[str, Any]]  # the arguments of forward, in order
    gradients: tuple[str, ...]  # the arguments whose gradients backward returns, in order; none: there is no backward
    cases: tuple[Case, ...]
    rounding: tuple[Case, ...]  # where rounding is measured: large enough for its average to mean something
    laws: tuple[laws.Law, ...]
    gradient_factor: float = 2.0  # how many times PyTorch's own rounding error a gradient may have
    results: tuple[str, ...] = ("y",)  # what forward returns, in order
    peer: str = ""  # PyTorch's own operator, where it has another name than the layer
    subject: Subject = REFERENCE

    @property
    def label(self) -> str:
        """The operator's name, after its implementation's where that is not the reference."""
        return f"{self.subject.name} {self.name}".strip()

    def twin(self, package: str = "reference") -> ModuleType:
        """The module that implements this layer in a package. Looked up anew, so that it may be swapped."""
        return importlib.import_module(f"{package}.{self.layer}")

    def has_twin(self, package: str) -> bool:
        return importlib.util.find_spec(f"{package}.{self.layer}") is not None

    def of(self, subject: Subject) -> Row:
        """The same operator, implemented by another subject."""
        return dataclasses.replace(self, subject=subject)

    def problem(self, case: Case, dtype: str = "float64", number: int = 0) -> Problem:
        """Arguments and an upstream gradient, the same ones each time; other ones for another `number`."""
        rng = np.random.default_rng([zlib.crc32(f"{self.name} {case}".encode()), number])
        arguments = self.draw(rng, case)
        results = [np.asarray(result) for result in REFERENCE.forward(self, arguments)]
        dy = tuple(rng.normal(size=result.shape) + 0.3 for result in results)
        return Problem(self, case.layout, arguments, dy if len(dy) > 1 else dy[0]).cast(dtype)


@dataclass(frozen=True)
class Problem:
    """What an operator is run on: arguments by name, and dy, the upstream gradient, or one for each result."""

    row: Row
    layout: str
    arguments: dict[str, Any]
    dy: np.ndarray | tuple[np.ndarray, ...]
    dtype: str = "float64"

    def cast(self, dtype: str) -> Problem:
        """The same values rounded to `dtype`, in the same layout. Those of bfloat16 are held in float32."""
        arguments = {
            name: _lay_out(_rounded(value, dtype), self.layout) if _is_float(value) else value
            for name, value in self.arguments.items()
        }
        dy = tuple(_lay_out(_rounded(dy, dtype), self.layout) for dy in self.upstream())
        return dataclasses.replace(self, arguments=arguments, dy=dy if len(dy) > 1 else dy[0], dtype=dtype)

    def replace(self, **arguments: Any) -> Problem:
        return dataclasses.replace(self, arguments={**self.arguments, **arguments})

    def on(self, subject: Subject) -> Problem:
        """The same problem for another implementation."""
        return dataclasses.replace(self, row=self.row.of(subject))

    def inputs(self) -> Arrays:
        """The arguments that are differentiated, without those that are None."""
        return {name: self.arguments[name] for name in self.row.gradients if self.arguments[name] is not None}

    def upstream(self) -> tuple[np.ndarray, ...]:
        """The upstream gradients, one for each result."""
        return as_tuple(self.dy)

    def step(self) -> float:
        """How far apart central differences are taken: for all inputs alike, the largest sets how y is rounded."""
        return 1e-5 * max(float(np.abs(x).max()) for x in self.inputs().values())

    def size(self, tensor: str, true: np.ndarray) -> float:
        """What an error of this tensor is relative to: the largest entry of the true one.

        A gradient may be a sum of terms that cancel altogether, as where softmax is saturated. Then all that is left of
        it is rounding, or nothing, and only the terms have a size: dy times all other inputs.
        """
        largest = float(np.max(np.abs(true), initial=0.0))
        if tensor in self.row.results:
            return largest
        others = [x for name, x in self.inputs().items() if f"d{name}" != tensor]
        terms = math.prod(float(np.max(np.abs(x), initial=0.0)) for x in (*self.upstream(), *others))
        return largest if largest > laws.EXACT * terms else terms

    def forward(self) -> tuple[np.ndarray, ...]:
        """The results alone."""
        subject = self.row.subject
        return tuple(subject.numpy(y) for y in subject.forward(self.row, subject.prepare(self)[0]))

    def weighed(self, results: Sequence[np.ndarray]) -> float:
        """The sum of results times upstream gradients: the number that the gradients are the gradients of."""
        return float(sum(np.sum(dy * y) for dy, y in zip(self.upstream(), results, strict=True)))

    def run(self) -> Arrays:
        """The results by name and the gradients: "dx" for each differentiated argument "x"."""
        subject = self.row.subject
        found = subject.execute(self.row, *subject.prepare(self))
        return {name: subject.numpy(tensor) for name, tensor in found.items()}


def _is_float(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "f"


def _rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    if dtype != "bfloat16":
        return array.astype(dtype)
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)  # half of them are kept, the nearest, ties to even
    bits = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return bits.view(np.float32).reshape(array.shape)


def _lay_out(array: np.ndarray, layout: str) -> np.ndarray:
    """A copy of the values: in rows, with reversed axes in memory, or with gaps of NaN, poison to who reads them."""
    array = np.asarray(array)
    if layout == "transposed":
        return array.copy(order="F")
    if layout == "sliced" and array.ndim:
        view = np.full([2 * n + 1 for n in array.shape], np.nan, array.dtype)[(slice(1, None, 2),) * array.ndim]
        view[...] = array
        return view
    return array.copy(order="C")


# How arguments are drawn.


def values(rng: np.random.Generator, shape: tuple[int, ...], case: Case) -> np.ndarray:
    """Activations: not centred, so that a mean is not 0."""
    return case.scale * (1.3 * rng.normal(size=shape) + 0.4)


def weights(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Parameters, of size 0.4 to 2 and either sign."""
    return rng.uniform(0.4, 2, shape) * rng.choice([-1, 1], shape)


def embedding(rng: np.random.Generator, case: Case) -> dict[str, Any]:
    V, C, *shape = case.size
    return {"ids": rng.integers(0, V, shape), "weight": case.scale * weights(rng, V, C)}


def linear(rng: np.random.Generator, case: Case, bias: bool = True) -> dict[str, Any]:
    O, *shape = case.size  # noqa: E741
    x = values(rng, tuple(shape), case)
    return {"x": x, "weight": weights(rng, O, shape[-1]), "bias": weights(rng, O) if bias else None}


def layer_norm(rng: np.random.Generator, case: Case, bias: bool = True) -> dict[str, Any]:
    C = case.size[-1]
    x = values(rng, case.size, case)
    return {"x": x, "weight": weights(rng, C), "bias": weights(rng, C) if bias else None, "eps": 1e-3}


def add_layer_norm(rng: np.random.Generator, case: Case, bias: bool = True) -> dict[str, Any]:
    arguments = layer_norm(rng, case, bias)
    return {"x": arguments.pop("x"), "residual": values(rng, case.size, case), **arguments}


def rms_norm(rng: np.random.Generator, case: Case) -> dict[str, Any]:
    """eps is large: y bends where the mean square is no more than that, and a row of one entry can be so small."""
    return {"x": values(rng, case.size, case), "weight": weights(rng, case.size[-1]), "eps": 0.1}


def add_rms_norm(rng: np.random.Generator, case: Case) -> dict[str, Any]:
    arguments = rms_norm(rng, case)
    return {"x": arguments.pop("x"), "residual": values(rng, case.size, case), **arguments}


def rope(rng: np.random.Generator, case: Case, interleaved: bool = False, per_row: bool = False) -> dict[str, Any]:
    """Positions that do not begin with 0; `per_row`: in each row at another place."""
    B, _, T, D = case.size
    starts = 3 + rng.choice(40, B, replace=False)
    positions = (starts[:, None] if per_row else starts[0]) + np.arange(T)
    cos, sin = rotary.angles(positions, D, dtype="float64")
    return {"x": values(rng, case.size, case), "cos": cos, "sin": sin, "interleaved": interleaved}


def swiglu(rng: np.random.Generator, case: Case) -> dict[str, Any]:
    return {"gate": values(rng, case.size, case), "up": values(rng, case.size, case)}


def gelu(rng: np.random.Generator, case: Case, approximate: str) -> dict[str, Any]:
    return {"x": values(rng, case.size, case), "approximate": approximate}


def bias_gelu(rng: np.random.Generator, case: Case, approximate: str) -> dict[str, Any]:
    return {"x": values(rng, case.size, case), "bias": weights(rng, case.size[-1]), "approximate": approximate}


def attention(rng: np.random.Generator, case: Case, causal: bool = True, rate: float = 0.0) -> dict[str, Any]:
    B, H, G, T, S, D = case.size
    q, k, v = (values(rng, shape, case) for shape in ((B, H, T, D), (B, G, S, D), (B, G, S, D)))
    noise = (int(rng.integers(1 << 62)), 3 * H) if rate else None
    return {"q": q, "k": k, "v": v, "causal": causal, "scale": None, "rate": rate, "noise": noise}


def cached_attention(rng: np.random.Generator, case: Case) -> dict[str, Any]:
    """Rows of all lengths from T to S; the last is the longest, and of two rows the first is the shortest."""
    B, _, _, T, S, _ = case.size
    starts = rng.integers(0, S - T + 1, B)
    starts[0], starts[-1] = 0, S - T
    arguments = attention(rng, case)
    return {**{name: arguments[name] for name in QKV}, "starts": starts, "scale": None}


def dropout(rng: np.random.Generator, case: Case, rate: float) -> dict[str, Any]:
    return {"x": values(rng, case.size, case), "rate": rate, "noise": (int(rng.integers(1 << 62)), 5)}


def cross_entropy(rng: np.random.Generator, case: Case, ignored: float = 0.0) -> dict[str, Any]:
    """`ignored`: the share of targets that do not count."""
    *shape, V = case.size
    targets = rng.integers(0, V, shape)
    targets.flat[: math.ceil(ignored * targets.size)] = -100
    return {"logits": values(rng, case.size, case), "targets": rng.permutation(targets), "ignore_index": -100}


def linear_cross_entropy(
    rng: np.random.Generator, case: Case, bias: bool = True, ignored: float = 0.4
) -> dict[str, Any]:
    """x is drawn so that logits are of size 1: beside weights of that size, times `scale`."""
    arguments = linear(rng, case, bias)
    arguments["x"] /= math.sqrt(arguments["x"].shape[-1])
    targets = rng.integers(0, case.size[0], case.size[1:-1])
    targets.flat[: math.ceil(ignored * targets.size)] = -100
    return {**arguments, "targets": rng.permutation(targets), "ignore_index": -100}


def token_logps(rng: np.random.Generator, case: Case) -> dict[str, Any]:
    return cross_entropy(rng, case, ignored=0.4)


def lora(rng: np.random.Generator, case: Case, rate: float = 0.0) -> dict[str, Any]:
    O, r, *shape = case.size  # noqa: E741
    noise = (int(rng.integers(1 << 62)), 5) if rate else None
    both = {"a": weights(rng, r, shape[-1]), "b": weights(rng, O, r)}
    return {"x": values(rng, tuple(shape), case), **both, "scale": 0.7, "rate": rate, "noise": noise}


def dpo(rng: np.random.Generator, case: Case) -> dict[str, Any]:
    names = "chosen", "rejected", "chosen0", "rejected0"
    return {**{name: -8 * case.scale * rng.exponential(size=case.size) for name in names}, "beta": 0.3}


def orpo(rng: np.random.Generator, case: Case) -> dict[str, Any]:
    """Mean log-probabilities below 0; not so near to it, beside the others, that a difference would cross it."""
    chosen, rejected = (-case.scale * rng.uniform(0.3, 3, case.size) for _ in range(2))
    return {"chosen": chosen, "rejected": rejected, "beta": 0.3}


# Sizes: one row, one column, ranks 1 to 4, no multiple of a block, other layouts, values of +-1e4.
SHAPES = (
    *map(Case, [(37,), (1, 19), (23, 1), (5, 7), (3, 5, 11), (2, 3, 5, 7), (67, 131)]),
    Case((13, 29), "transposed"),
    Case((3, 7, 10), "transposed"),
    Case((13, 29), "sliced"),
    Case((5, 7, 9), "sliced"),
    Case((7, 11), scale=1e4),
)
LARGE_SHAPES = (Case((67, 259)), Case((3, 65, 127)), Case((129, 64), scale=1e4))
LINEAR = (*(dataclasses.replace(case, size=(6, *case.size)) for case in SHAPES), Case((1, 5, 7)), Case((130, 67, 3)))
LARGE_LINEAR = (Case((131, 67, 259)), Case((77, 3, 65, 127)), Case((67, 129, 64), scale=1e4))
# A product of three inputs bends: a step of 1e-5 of x is no small one beside a and b where x is 1e4.
LORA = (
    *(dataclasses.replace(case, size=(6, 4, *case.size)) for case in SHAPES[:-1]),
    Case((6, 4, 7, 11), scale=100.0),
    Case((130, 16, 67, 3)),
)
LARGE_LORA = (Case((131, 16, 67, 259)), Case((77, 16, 3, 65, 127)), Case((67, 9, 129, 64), scale=1e4))
PAIRS = (
    *(Case((n,)) for n in (1, 2, 5, 37)),
    Case((11,), "sliced"),
    Case((11,), "transposed"),
    Case((7,), scale=10.0),
    Case((7,), scale=0.01),
)
LARGE_PAIRS = (Case((59,)), Case((31,), scale=10.0), Case((31,), scale=0.1))
EMBEDDING = (
    *map(Case, [(7, 5, 11), (1, 3, 4), (6, 1, 13), (11, 5, 2, 3), (5, 7, 2, 3, 4), (3, 2, 1), (131, 67, 3, 65)]),
    Case((13, 29, 31), "transposed"),
    Case((13, 29, 31), "sliced"),
    Case((7, 5, 11), scale=1e4),
)
LARGE_EMBEDDING = (Case((67, 129, 3, 127)),)
TARGETS = (*SHAPES[1:], Case((7, 9001)))  # PyTorch's operator wants a row at least
WIDE = (*SHAPES, Case((3, 8195)))  # wider than the registers beside which a kernel adds up dweight
LARGE_TARGETS = (Case((11, 259)), Case((2, 5, 127)), Case((7, 64), scale=1e4))  # drawn many times, for the loss
LARGE_LINEAR_TARGETS = (Case((131, 11, 59)), Case((77, 2, 5, 127)), Case((67, 7, 64), scale=1e4))
LINEAR_TARGETS = (*LINEAR[1:], Case((300, 67, 11)))
# A step of 1e-5 of the largest value is no small one beside the bend of GELU at 0: here no value comes so near to it.
BIASED = (*SHAPES[:-1], Case((5, 11), scale=1e4))


def _lengths(H: int, G: int, past: int = 0) -> tuple[Case, ...]:
    """Attention's cases: sequence lengths and head dimensions around block sizes; S = T + past."""
    sizes = [(1, 96), (2, 128), (63, 64), (64, 32), (65, 54), (127, 15), (11, 1), (7, 4)]
    cases = [Case((1 if T > 7 else 5, H, G, T, T + past, D)) for T, D in sizes]
    small = (2, H, G, 5, 5 + past, 7)
    return (*cases, Case(small, "transposed"), Case(small, "sliced"), Case(small, scale=1e4))


def _large(H: int, G: int, past: int = 0) -> tuple[Case, ...]:
    return (Case((5, H, G, 63, 63 + past, 54)), Case((2, H, G, 31, 31 + past, 128)))


def _cached(H: int, G: int) -> tuple[Case, ...]:
    """Few queries, and caches around the sizes of blocks and of splits."""
    sizes = [(1, 1, 32), (1, 63, 54), (3, 64, 64), (1, 65, 96), (17, 127, 128), (1, 127, 15), (1, 300, 32), (3, 300, 1)]
    cases = [Case((1 if S == 300 else 5, H, G, T, S, D)) for T, S, D in sizes]
    small = (2, H, G, 5, 70, 7)
    return (*cases, Case(small, "transposed"), Case(small, "sliced"), Case(small, scale=1e4))


def _large_cached(H: int, G: int) -> tuple[Case, ...]:
    """One query with few entries: a product of one row and many entries each library sums in an order of its own."""
    return (Case((3, H, G, 17, 300, 54)), Case((7, H, G, 1, 300, 32)), Case((1, H, G, 31, 257, 128)))


# Heads of queries or keys, (B, H, T, D): lengths and head dimensions around block sizes.
HEADS = (
    *map(Case, [(5, 3, 1, 96), (3, 2, 2, 128), (1, 3, 63, 64), (2, 3, 64, 32), (1, 2, 65, 54), (1, 3, 127, 2)]),
    *map(Case, [(3, 5, 7, 6), (2, 1, 3, 256)]),
    Case((2, 3, 5, 14), "transposed"),
    Case((2, 3, 5, 14), "sliced"),
    Case((2, 3, 5, 14), scale=1e4),
)
LARGE_HEADS = (Case((5, 3, 63, 54)), Case((2, 3, 31, 128)))
# More keys than queries, as when the past is kept; and more queries than keys, so that some see no key at all.
PAST = (*_lengths(3, 3, past=4), Case((2, 3, 3, 1, 65, 32)), Case((2, 3, 3, 7, 4, 5)), Case((2, 3, 3, 65, 63, 32)))

ADJOINT = (laws.adjoint,)
SHIFT, CAUSAL = (laws.adjoint, laws.key_shift), (laws.adjoint, laws.key_shift, laws.causality)
CACHED = (laws.own_keys, laws.rows_alone)
ORTHOGONAL = (laws.adjoint, laws.orthogonal_to_constants, laws.orthogonal_to_normalized)
TURNS = (laws.adjoint, laws.pairs_turned, laws.relative_positions)
QKV, XWB, XRWB = ("q", "k", "v"), ("x", "weight", "bias"), ("x", "residual", "weight", "bias")
PREFERENCE = (laws.adjoint,)
ODD, LOGITS = (laws.adjoint, laws.odd_part), (laws.adjoint, laws.logit_shift)

# name, layer, arguments, differentiated, cases, cases for rounding, laws, how many times PyTorch's rounding error,
# results, PyTorch's operator
_TABLE: tuple[tuple[Any, ...], ...] = (
    ("embedding", "embedding", embedding, ("weight",), EMBEDDING, LARGE_EMBEDDING, ADJOINT),
    ("linear", "linear", linear, XWB, LINEAR, LARGE_LINEAR, ADJOINT),
    ("linear-no-bias", "linear", partial(linear, bias=False), XWB, LINEAR, LARGE_LINEAR, ADJOINT),
    ("layer_norm", "layer_norm", layer_norm, XWB, WIDE, LARGE_SHAPES, ORTHOGONAL),
    ("layer_norm-no-bias", "layer_norm", partial(layer_norm, bias=False), XWB, WIDE, LARGE_SHAPES, ORTHOGONAL),
    *(
        (name, "add_layer_norm", draw, XRWB, SHAPES, LARGE_SHAPES, ADJOINT, 2.0, ("y", "total"))
        for name, draw in (
            ("add_layer_norm", add_layer_norm),
            ("add_layer_norm-no-bias", partial(add_layer_norm, bias=False)),
        )
    ),
    ("rms_norm", "rms_norm", rms_norm, ("x", "weight"), WIDE, LARGE_SHAPES, (laws.adjoint, laws.orthogonal_to_input)),
    (
        "add_rms_norm",
        "add_rms_norm",
        add_rms_norm,
        ("x", "residual", "weight"),
        SHAPES,
        LARGE_SHAPES,
        ADJOINT,
        2.0,
        ("y", "total"),
    ),
    *(
        (name, "rope", draw, ("x",), HEADS, LARGE_HEADS, TURNS)
        for name, draw in (
            ("rope", rope),
            ("rope-interleaved", partial(rope, interleaved=True)),
            ("rope-rows", partial(rope, per_row=True)),
            ("rope-interleaved-rows", partial(rope, interleaved=True, per_row=True)),
        )
    ),
    ("swiglu", "swiglu", swiglu, ("gate", "up"), SHAPES, LARGE_SHAPES, (laws.adjoint, laws.odd_gate)),
    ("gelu", "gelu", partial(gelu, approximate="none"), ("x",), SHAPES, LARGE_SHAPES, ODD),
    ("gelu-tanh", "gelu", partial(gelu, approximate="tanh"), ("x",), SHAPES, LARGE_SHAPES, ODD),
    ("bias_gelu", "bias_gelu", partial(bias_gelu, approximate="none"), ("x", "bias"), BIASED, LARGE_SHAPES, ADJOINT),
    (
        "bias_gelu-tanh",
        "bias_gelu",
        partial(bias_gelu, approximate="tanh"),
        ("x", "bias"),
        SHAPES,
        LARGE_SHAPES,
        ADJOINT,
    ),
    ("attention", "attention", attention, QKV, _lengths(3, 3), _large(3, 3), CAUSAL, 3.0),
    ("attention-full", "attention", partial(attention, causal=False), QKV, PAST, _large(3, 3, 7), SHIFT, 3.0),
    ("attention-grouped", "attention", attention, QKV, _lengths(6, 3) + _lengths(4, 1), _large(6, 2), CAUSAL, 3.0),
    ("attention-past", "attention", attention, QKV, PAST, _large(3, 3, 7), CAUSAL, 3.0),
    ("attention-dropout", "attention", partial(attention, rate=0.3), QKV, _lengths(6, 3, 2), _large(6, 3), CAUSAL, 3.0),
    *(
        (name, "cached_attention", cached_attention, (), _cached(H, G), _large_cached(H, G), CACHED)
        for name, H, G in (("cached_attention", 3, 3), ("cached_attention-grouped", 6, 2))
    ),
    *(
        (name, "flash_attention", draw, QKV, _lengths(6, 3, 2), _large(6, 3), CAUSAL, 3.0, ("y",), "attention")
        for name, draw in (("flash_attention", attention), ("flash_attention-dropout", partial(attention, rate=0.3)))
    ),
    ("dropout", "dropout", partial(dropout, rate=0.3), ("x",), SHAPES, LARGE_SHAPES, ADJOINT),
    ("cross_entropy", "cross_entropy", cross_entropy, ("logits",), TARGETS, LARGE_TARGETS, LOGITS, 2.0, ("loss",)),
    *(
        (
            name,
            "cross_entropy",
            partial(cross_entropy, ignored=share),
            ("logits",),
            TARGETS,
            LARGE_TARGETS,
            LOGITS,
            2.0,
            ("loss",),
        )
        for name, share in (("cross_entropy-ignored", 0.4), ("cross_entropy-all-ignored", 1.0))
    ),
    ("token_logps", "token_logps", token_logps, ("logits",), TARGETS, LARGE_TARGETS, LOGITS),
    ("lora", "lora", lora, ("x", "a", "b"), LORA, LARGE_LORA, ADJOINT),
    ("lora-dropout", "lora", partial(lora, rate=0.3), ("x", "a", "b"), LORA, LARGE_LORA, ADJOINT),
    *(
        (name, name, draw, ("chosen", "rejected"), PAIRS, LARGE_PAIRS, PREFERENCE, 2.0, ("loss",))
        for name, draw in (("dpo", dpo), ("orpo", orpo))
    ),
    *(
        (
            name,
            "linear_cross_entropy",
            draw,
            XWB,
            LINEAR_TARGETS,
            LARGE_LINEAR_TARGETS,
            (laws.weight_shift,),
            2.0,
            ("loss",),
        )
        for name, draw in (
            ("linear_cross_entropy", linear_cross_entropy),
            ("linear_cross_entropy-no-bias", partial(linear_cross_entropy, bias=False)),
        )
    ),
)
ROWS: dict[str, Row] = {row[0]: Row(*row) for row in _TABLE}


def select(names: list[str]) -> list[Row]:
    """The rows of these names, or of these layers; all rows where none is named. UserError for an unknown one."""
    known = {*ROWS, *(row.layer for row in ROWS.values())}
    for name in names:
        if name not in known:
            close = get_close_matches(name, sorted(known | {"kernels", "model"}), n=1)
            hint = f"did you mean {close[0]}?" if close else f"choose from kernels, model, {', '.join(sorted(known))}"
            raise UserError(f"{name}: no such operator; {hint}")
    return [row for row in ROWS.values() if not names or row.name in names or row.layer in names]
