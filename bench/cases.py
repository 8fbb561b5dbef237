"""What is timed on a GPU: operators at sizes, how much work each is at least, and how its arguments are drawn.

Work counts the operations that the mathematics asks for (half of the scores where attention is causal), or the fewest
bytes that can go to and from memory: each input read once, each result written once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from reference import rope

VOCABULARY = 50_257
LENGTHS = (512, 1024, 2048, 4096, 8192, 16_384)
WIDTHS = (1024, 2048, 4096, 8192, 16_384)


@dataclass(frozen=True)
class Normal:
    """Stands for a tensor of normal numbers."""

    shape: tuple[int, ...]
    std: float = 1.0


@dataclass(frozen=True)
class Heads:
    """Stands for normal numbers (B, H, T, D) that lie in memory as a projection writes them, (B, T, H, D)."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class Turns:
    """Stands for a table of angles' cosines or sines, (T, D / 2), in float32 whatever the case's type."""

    T: int
    D: int
    part: int  # 0: the cosines, 1: the sines


@dataclass(frozen=True)
class Ids:
    """Stands for n integers from 0 to below."""

    n: int
    below: int


@dataclass(frozen=True)
class Same:
    """Stands for n times the same integer."""

    n: int
    value: int


@dataclass(frozen=True)
class Case:
    """One operator at one size."""

    operator: str
    arguments: tuple[Any, ...]  # all of the twin's, in order; Normal, Heads, Turns, Ids and Same stand for tensors
    work: Mapping[str, float]  # direction -> operations or bytes: "forward" and "backward", or "both" in one call
    unit: str  # "TFLOP/s" or "GB/s"
    dtype: str = "bfloat16"
    setting: str = ""
    x: int = 0  # what varies, for plots: a sequence's length, a row's width
    x_name: str = ""

    def rate(self, direction: str, seconds: float) -> float:
        """In `unit`."""
        return self.work[direction] / seconds / {"TFLOP/s": 1e12, "GB/s": 1e9}[self.unit]

    def __str__(self) -> str:
        return " ".join(filter(None, (self.operator, self.setting, self.dtype, str(self.x or ""))))


def cases(tiny: bool) -> Iterator[Case]:
    """All cases; tiny ones try the benchmark itself."""
    for D in (64,) if tiny else (64, 128):
        for causal in (True, False):
            for T in (16, 32) if tiny else LENGTHS:
                yield attention(64 if tiny else 16_384, 128 if tiny else 2048, T, D, causal)
    for B, H, G, D in ((2, 4, 2, 64),) if tiny else ((1, 12, 12, 64), (16, 12, 12, 64), (16, 32, 8, 128)):
        for S in (16, 32) if tiny else LENGTHS[1::2]:
            yield cached_attention(B, H, G, S, D)
    for D in (64,) if tiny else (64, 128):
        for interleaved in (False, True):
            yield rotary(64 if tiny else 16_384, 128 if tiny else 4096, 16 if tiny else 2048, D, interleaved)
    for layer, settings in ROWWISE.items():
        for setting, more in settings.items():
            for dtype in ("bfloat16", "float32") if layer == "layer_norm" else ("bfloat16",):
                for width in (64, 128) if tiny else WIDTHS:
                    yield rowwise(layer, setting, more, 2**10 if tiny else 2**26, width, dtype)
    N, C, V = (16, 32, 300) if tiny else (8192, 768, VOCABULARY)
    read_and_write = 2 * N * V * 2  # logits, and their gradient: two bytes each
    logits = (Normal((N, V)), Ids(N, V), -100)
    yield Case("cross_entropy", logits, {"both": read_and_write}, "GB/s", setting=f"{N} x {V}")
    # Weights so small that logits are of size 1. Three products: logits, dx and dweight.
    projected = (Normal((N, C)), Normal((V, C), C**-0.5), None, Ids(N, V), -100)
    three = 3 * 2 * N * C * V
    yield Case("linear_cross_entropy", projected, {"both": three}, "TFLOP/s", setting=f"{N} x {C} x {V}")


def attention(tokens: int, width: int, T: int, D: int, causal: bool) -> Case:
    """So many tokens in sequences of T, `width` entries of all heads together. Backward: 5 products for forward's 2."""
    B, H = max(1, tokens // T), width // D
    forward = 4 * B * H * T * T * D * (0.5 if causal else 1.0)
    return Case(
        "attention",
        (*(Normal((B, H, T, D)),) * 3, causal, None, 0.0, None),
        {"forward": forward, "backward": 2.5 * forward},
        "TFLOP/s",
        setting=f"D {D} {'causal' if causal else 'full'}",
        x=T,
        x_name="sequence length",
    )


def cached_attention(B: int, H: int, G: int, S: int, D: int) -> Case:
    """A step of generation: one new token in each of B rows, all of them S long. Read are keys and values, once."""
    return Case(
        "cached_attention",
        (Normal((B, H, 1, D)), *(Normal((B, G, S, D)),) * 2, Same(B, S - 1), None),
        {"forward": 2 * (2 * B * G * S * D + 2 * B * H * D)},
        "GB/s",
        setting=f"B {B} H {H} G {G} D {D}",
        x=S,
        x_name="keys",
    )


def rotary(tokens: int, width: int, T: int, D: int, interleaved: bool) -> Case:
    """So many tokens in sequences of T, `width` entries of all heads together. Read: x and the tables; written: y."""
    tables = Turns(T, D, 0), Turns(T, D, 1)
    moved = 2 * 2 * tokens * width + 4 * T * D
    return Case(
        "rope",
        (Heads((tokens // T, width // D, T, D)), *tables, interleaved),
        {"forward": moved, "backward": moved},
        "GB/s",
        setting=f"D {D} {'interleaved' if interleaved else 'halves'}",
    )


# Layer -> setting -> what follows x among the arguments: "x" and "weight" stand for tensors.
ROWWISE: dict[str, dict[str, tuple[Any, ...]]] = {
    "layer_norm": {"": ("weight", "weight", 1e-5)},
    "add_layer_norm": {"": ("x", "weight", "weight", 1e-5)},
    "rms_norm": {"": ("weight", 1e-6)},
    "add_rms_norm": {"": ("x", "weight", 1e-6)},
    "swiglu": {"": ("x",)},
    "gelu": {"exact": ("none",), "tanh": ("tanh",)},
    "bias_gelu": {"tanh": ("weight", "tanh")},
    "dropout": {"": (0.1, (1234, 0))},
}
# How many tensors like x each direction reads and writes.
TENSORS = {
    "layer_norm": (2, 3),  # x; y      dy, x; dx
    "add_layer_norm": (4, 4),  # x, residual; y, total      dy, dtotal, total; dx, which is dresidual too
    "rms_norm": (2, 3),
    "add_rms_norm": (4, 4),
    "swiglu": (3, 5),  # gate, up; y      dy, gate, up; dgate, dup
    "gelu": (2, 3),
    "bias_gelu": (2, 3),
    "dropout": (2, 2),  # x; y      dy; dx
}


def rowwise(layer: str, setting: str, more: tuple[Any, ...], elements: int, width: int, dtype: str) -> Case:
    """So many elements in rows of `width`."""
    stands_for = {"x": Normal((elements // width, width)), "weight": Normal((width,))}
    arguments = (stands_for.get(each, each) if isinstance(each, str) else each for each in ("x", *more))
    size = elements * getattr(torch, dtype).itemsize
    work = {
        direction: tensors * size for direction, tensors in zip(("forward", "backward"), TENSORS[layer], strict=True)
    }
    return Case(layer, tuple(arguments), work, "GB/s", dtype, setting, width, "width of a row")


def build(case: Case, device: str, generator: torch.Generator) -> list[Any]:
    """The arguments of a case; floating-point tensors among them get gradients where those are timed."""
    arguments: list[Any] = []
    with_gradients = set(case.work) != {"forward"}
    for given in case.arguments:
        if isinstance(given, Ids):
            arguments.append(torch.randint(0, given.below, (given.n,), device=device, generator=generator))
        elif isinstance(given, Same):
            arguments.append(torch.full((given.n,), given.value, device=device))
        elif isinstance(given, Turns):
            table = rope.angles(np.arange(given.T), given.D)[given.part]
            arguments.append(torch.from_numpy(table).to(device))
        elif isinstance(given, (Normal, Heads)):
            tensor = torch.randn(given.shape, device=device, generator=generator)
            if isinstance(given, Normal):
                tensor.mul_(given.std)
            else:
                tensor = tensor.transpose(1, 2).contiguous().transpose(1, 2)
            arguments.append(tensor.to(getattr(torch, case.dtype)).requires_grad_(with_gradients))
        else:
            arguments.append(given)
    return arguments
