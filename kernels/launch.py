"""What stands between a layer's functions and its kernels: checks of the inputs, and the launch itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor

from kernels.numerics import INTERPRETED

MAX_INDEX = 2**31 - 1  # of a row, a column, a program: they are counted in 32 bits, offsets in 64
MAX_PROGRAMS = 2**16 - 1  # along the second and third axis of a grid

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check(**tensors: torch.Tensor | None) -> None:
    """Tensors by name that kernels will read, the first of them of a floating-point type. Raises one line that says
    what was expected and what came.

    ValueError: on different devices, or too large to index. TypeError: no floating-point type that kernels work in.
    RuntimeError: on the CPU, while triton does not interpret.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, *others = given
    device = given[first].device
    for name in others:
        if given[name].device != device:
            raise ValueError(f"{name}: expected on {device}, where {first} is, got {given[name].device}")
    if device.type == "cpu" and not INTERPRETED.value and not isinstance(given[first], FakeTensor):
        raise RuntimeError(
            f"{first}: on the CPU, where kernels run in Triton's interpreter only: set TRITON_INTERPRET=1 in the "
            "environment before triton is imported, or move the tensors to a GPU"
        )
    allowed = (*_FLOATS, torch.float64) if INTERPRETED.value else _FLOATS
    for name, tensor in given.items():
        if tensor.dtype not in allowed and (name == first or tensor.dtype.is_floating_point):
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
            raise TypeError(f"{name}: expected one of {names}, got {str(tensor.dtype).removeprefix('torch.')}")
        columns = tensor.shape[-1] if tensor.ndim else 1
        if columns > MAX_INDEX or tensor.numel() > MAX_INDEX * columns:
            raise ValueError(f"{name}: expected at most {MAX_INDEX} rows and columns, got shape {tuple(tensor.shape)}")


def check_size(name: str, size: int, limit: int) -> None:
    """Raises ValueError where a size, of an argument's axis say, is beyond what a kernel can hold."""
    if size > limit:
        raise ValueError(f"{name}: expected at most {limit}, got {size}")


def check_shape(name: str, tensor: torch.Tensor, shape: Sequence[int]) -> None:
    """Raises ValueError where a tensor has another shape than the others ask for."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded instead of made: what ahead-of-time compilation needs to know."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]  # constants by name, and num_warps, num_stages


_recordings: list[list[Launch]] = []


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collects the launches on tensors of device "meta", so that a layer tells how it would launch its kernels."""
    _recordings.append([])
    try:
        yield _recordings[-1]
    finally:
        _recordings.pop()


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a kernel on the device of its tensors. Tensors without data (meta, fake) have their shapes, that is all.

    So a layer's own function is its fake implementation under torch.compile, with nothing written a second time.
    """
    tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
    if any(tensor.device.type == "meta" or isinstance(tensor, FakeTensor) for tensor in tensors):
        if _recordings:
            _recordings[-1].append(Launch(kernel, arguments, options))
    elif grid[0] > MAX_INDEX or max(grid[1:], default=0) > MAX_PROGRAMS:
        raise ValueError(f"too large for one launch: a grid of {grid}, expected at most ({MAX_INDEX}, {MAX_PROGRAMS})")
    elif all(grid):  # a grid without programs is an error to CUDA
        with torch.cuda.device_of(tensors[0]):
            kernel[grid](*arguments, **options)


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n: tensors in a kernel have such sizes."""
    return triton.next_power_of_2(int(n))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type that kernels compute in where they load this one."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def programs(device: torch.device, each: int) -> int:
    """How many programs to start, `each` for a multiprocessor, where a fixed number of them takes rows in turns."""
    if INTERPRETED.value or device.type != "cuda" or not torch.cuda.is_available():
        return 4 * each
    return each * torch.cuda.get_device_properties(device).multi_processor_count


# Launch configurations. They depend on a row's width, on what is fixed in a model, never on a sequence's length.


def row_block(C: int) -> dict[str, int]:
    """BLOCK and num_warps for a program that holds a row of C entries: 8 to 16 of them a thread."""
    BLOCK = max(16, power_of_2(C))
    return {"BLOCK": BLOCK, "num_warps": min(32, max(1, BLOCK // 512))}


def tile(C: int) -> dict[str, int]:
    """ROWS, COLUMNS and num_warps for a program that works on a tile of a matrix with C columns, element by element."""
    COLUMNS = min(1024, max(16, power_of_2(C)))
    return {"ROWS": 2048 // COLUMNS, "COLUMNS": COLUMNS, "num_warps": 4}


def tiles(rows: torch.Tensor, tile: dict[str, int]) -> tuple[int, int]:
    """How many tiles cover a matrix, down and across."""
    return triton.cdiv(rows.shape[0], tile["ROWS"]), triton.cdiv(rows.shape[1], tile["COLUMNS"])
