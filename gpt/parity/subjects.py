"""What the gates hold to account: a layer of the reference, its twin in `kernels`, or anybody's function.

A subject takes a problem in its own kind of arrays and gives results and gradients by name. To the gates everything is
NumPy; as that has no bfloat16, such values travel in float32.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gpt.errors import UserError, require

if TYPE_CHECKING:
    from gpt.parity.ops import Problem, Row

Native = Any  # an array or a tensor


class Subject(Protocol):
    """One implementation of operators."""

    name: str  # "" for the reference, else what stands before an operator's name
    gates: tuple[str, ...]  # which gates it has to pass
    dtypes: tuple[str, ...]  # in which its rounding is measured
    every_case: bool  # whether its rounding is measured on every case rather than on large ones

    def prepare(self, problem: Problem) -> tuple[dict[str, Any], tuple[Native, ...]]:
        """Its own arguments by name, and upstream gradients, one for each result."""
        ...

    def execute(self, row: Row, arguments: Mapping[str, Any], dy: tuple[Native, ...]) -> dict[str, Native]:
        """Results by name, and gradients: "dx" for an argument "x"."""
        ...

    def forward(self, row: Row, arguments: Mapping[str, Any]) -> tuple[Native, ...]:
        """The results alone."""
        ...

    def numpy(self, native: Native) -> np.ndarray: ...

    def copy(self, native: Native) -> Native: ...

    def share_memory(self, a: Native, b: Native) -> bool: ...


class Reference:
    """The layers of `reference`, in NumPy."""

    name = ""
    gates: tuple[str, ...] = ("differences", "laws", "autograd", "rounding", "conduct")
    dtypes: tuple[str, ...] = ("float32",)
    every_case = False

    def prepare(self, problem: Problem) -> tuple[dict[str, Any], tuple[Native, ...]]:
        return problem.arguments, problem.upstream()

    def execute(self, row: Row, arguments: Mapping[str, Any], dy: tuple[Native, ...]) -> dict[str, Native]:
        return _both_passes(row, row.twin(), arguments, dy)

    def forward(self, row: Row, arguments: Mapping[str, Any]) -> tuple[Native, ...]:
        return as_tuple(row.twin().forward(**arguments)[0])

    def numpy(self, native: Native) -> np.ndarray:
        return np.asarray(native)

    def copy(self, native: Native) -> Native:
        return native.copy()

    def share_memory(self, a: Native, b: Native) -> bool:
        return np.shares_memory(a, b)


class Tensors:
    """What subjects that compute with PyTorch's tensors have in common."""

    def __init__(self, device: str) -> None:
        self.device = device

    def prepare(self, problem: Problem) -> tuple[dict[str, Any], tuple[Native, ...]]:
        arguments = {
            name: to_tensor(value, problem.dtype, self.device) if isinstance(value, np.ndarray) else value
            for name, value in problem.arguments.items()
        }
        return arguments, tuple(to_tensor(dy, problem.dtype, self.device) for dy in problem.upstream())

    def numpy(self, native: Native) -> np.ndarray:
        native = native.detach().cpu()
        return (native.float() if native.dtype.itemsize == 2 and "bfloat" in str(native.dtype) else native).numpy()

    def copy(self, native: Native) -> Native:
        return native.clone()

    def share_memory(self, a: Native, b: Native) -> bool:
        return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() and a.numel() > 0


class Kernels(Tensors):
    """The twins in `kernels`: on a GPU, or in Triton's interpreter, which alone computes in float64."""

    name = "triton"
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")
    every_case = False

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self.gates: tuple[str, ...] = ("algebra", "rounding", "conduct")[device != "cpu" :]

    def execute(self, row: Row, arguments: Mapping[str, Any], dy: tuple[Native, ...]) -> dict[str, Native]:
        return _both_passes(row, row.twin("kernels"), arguments, dy)

    def forward(self, row: Row, arguments: Mapping[str, Any]) -> tuple[Native, ...]:
        return as_tuple(row.twin("kernels").forward(**arguments)[0])


class Differentiable(Tensors):
    """A function of tensors that PyTorch differentiates: its own operators, or somebody's kernel."""

    every_case = True

    def __init__(
        self, name: str, function: Callable[..., Any] | None, device: str, dtypes: tuple[str, ...] = ("float32",)
    ) -> None:
        super().__init__(device)
        self.name, self.function = name, function
        self.dtypes = tuple(dtype for dtype in dtypes if dtype != "float64")
        wanted = {"algebra": "float64" in dtypes, "rounding": bool(self.dtypes), "conduct": True}
        self.gates: tuple[str, ...] = tuple(gate for gate, is_wanted in wanted.items() if is_wanted)
        self.forward_only: set[str] = set()  # operators whose results could not be differentiated

    def execute(self, row: Row, arguments: Mapping[str, Any], dy: tuple[Native, ...]) -> dict[str, Native]:
        torch = require("torch", extra="torch")
        inputs = {name: arguments[name] for name in row.gradients if arguments[name] is not None}
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
        results = self.forward(row, {**arguments, **leaves})
        named = dict(zip(row.results, results, strict=True))
        if not leaves:
            return named
        if not all(result.requires_grad for result in results):
            self.forward_only.add(row.name)
            return named
        gradients = torch.autograd.grad(results, list(leaves.values()), dy)
        # Autograd may hand on dy itself as a gradient, which is its own affair.
        return named | {f"d{name}": gradient.clone() for name, gradient in zip(leaves, gradients, strict=True)}

    def forward(self, row: Row, arguments: Mapping[str, Any]) -> tuple[Native, ...]:
        assert self.function is not None
        return as_tuple(self.function(*arguments.values()))


class PyTorch(Differentiable):
    """PyTorch's own operators: what every rounding error is measured by."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__("torch", None, device)

    def forward(self, row: Row, arguments: Mapping[str, Any]) -> tuple[Native, ...]:
        return as_tuple(torch_operator(row)(*arguments.values()))

    def execute(self, row: Row, arguments: Mapping[str, Any], dy: tuple[Native, ...]) -> dict[str, Native]:
        torch = require("torch", extra="torch")
        # In float64, the truth: fused attention leaves rounding where a gradient is exactly 0.
        backends = torch.nn.attention.SDPBackend
        choice = [backends.MATH] if dy[0].dtype == torch.float64 else [backends.FLASH_ATTENTION, backends.MATH]
        with torch.nn.attention.sdpa_kernel(choice):
            return super().execute(row, arguments, dy)


def torch_operator(row: Row) -> Callable[..., Any]:
    """PyTorch's own operator for a row, with the arguments of the row's layer."""
    torch, ops = require("torch", extra="torch"), importlib.import_module("gpt.ops")
    name = row.peer or row.layer
    return getattr(ops, name, None) or getattr(torch.nn.functional, name)


def on_gpu() -> bool:
    """Whether kernels run on a GPU: there is one, and Triton was not told to interpret."""
    torch = require("torch", extra="torch")
    return torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"


def kernels() -> Kernels:
    """The kernels where they can run here: on the GPU, or else interpreted. UserError where neither goes."""
    require("triton", extra="torch")
    from kernels.numerics import INTERPRETED

    if not INTERPRETED.value and not on_gpu():
        raise UserError("kernels: no CUDA GPU is here; TRITON_INTERPRET=1 in the environment has them interpreted")
    return Kernels("cpu" if INTERPRETED.value else "cuda")


def function(place: str, dtypes: tuple[str, ...]) -> Differentiable:
    """The function at FILE.py:FUNCTION. UserError where there is none."""
    file, _, name = place.rpartition(":")
    if not file or Path(file).suffix != ".py" or not name.isidentifier():
        raise UserError(f"kernel: expected FILE.py:FUNCTION, got {place!r}")
    found = getattr(load_module("kernel", file), name, None)
    if not callable(found):
        raise UserError(f"kernel: {file} has no function {name}")
    return Differentiable(name, found, "cuda" if on_gpu() else "cpu", dtypes)


def load_module(option: str, file: str) -> ModuleType:
    """The module that a file of Python is, for the `option` that named it. UserError where it is none."""
    path = Path(file)
    if path.suffix != ".py":
        raise UserError(f"{option}: expected a file of Python, FILE.py, got {file!r}")
    if not path.is_file():
        raise UserError(f"{option}: there is no file {file}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        line = line_in(file, error)
        at = f" (line {line})" if line and not isinstance(error, SyntaxError) else ""  # which says so itself
        raise UserError(f"{option}: {file} does not import: {type(error).__name__}: {error}{at}") from error
    return module


def line_in(file: str, error: BaseException) -> int:
    """The last line of a file that an error came from; 0 where it came from elsewhere."""
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame.lineno or 0 for frame in reversed(frames) if Path(frame.filename) == Path(file)), 0)


def to_tensor(array: np.ndarray, dtype: str, device: str) -> Any:
    """A tensor of its own memory that lies in it as the array does; floats in `dtype`, gaps between them NaN."""
    torch = require("torch", extra="torch")
    source = torch.from_numpy(np.asarray(array))
    kind = getattr(torch, dtype) if source.dtype.is_floating_point else source.dtype
    extent = 1 + sum((n - 1) * stride for n, stride in zip(source.shape, source.stride(), strict=True))
    memory = torch.full((max(extent, 1),), float("nan") if kind.is_floating_point else 0, dtype=kind, device=device)
    tensor = (
        memory.as_strided(source.shape, source.stride()) if source.numel() else torch.empty_like(source, dtype=kind)
    )
    tensor.copy_(source)
    return tensor


def as_tuple(value: Any) -> tuple[Any, ...]:
    """Several results as they are, one as a tuple of one."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _both_passes(
    row: Row, layer: ModuleType, arguments: Mapping[str, Any], dy: tuple[Native, ...]
) -> dict[str, Native]:
    """What a layer's forward and backward return, by name; a layer without gradients has no backward."""
    results, saved = layer.forward(**arguments)
    gradients = layer.backward(dy if len(dy) > 1 else dy[0], saved) if row.gradients else ()
    named = zip(row.gradients, as_tuple(gradients), strict=True)
    found = {f"d{name}": gradient for name, gradient in named if gradient is not None}
    return dict(zip(row.results, as_tuple(results), strict=True)) | found


REFERENCE = Reference()
