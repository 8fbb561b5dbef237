"""Operators from elsewhere in the place of PyTorch's: the reference's layers, differentiated by hand, and a user's own.

With them one model runs on operators of two origins, so that what an operator does to the model shows by itself.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from gpt import ops
from gpt.engine import Batch, Noise
from gpt.errors import UserError
from gpt.ops import Operators
from gpt.torch_engine import TorchEngine

# What a pass of training may use. `cached_attention`, which is for generation alone, has no gradient.
SWAPPABLE = tuple(
    field.name for field in dataclasses.fields(Operators) if field.name not in ("name", "cached_attention")
)


class Kernel:
    """Somebody's function as an operator of the model; `used` tells whether the model ever called it.

    It is given all of the operator's arguments in order, those included that the model leaves to their defaults. What
    it returns must be shaped like what PyTorch's own operator returns. If it cannot be differentiated, its gradient is
    PyTorch's own.
    """

    def __init__(self, name: str, function: Callable[..., Any], op: str) -> None:
        self.name, self.function, self.op = name, function, op
        self.peer = getattr(ops.TORCH, op)
        self.signature = inspect.signature(self.peer)
        self.used = False
        self.differentiable = True

    def __call__(self, *arguments: Any) -> Any:
        """Raises UserError where the function fails, or returns something else than the operator does."""
        self.used = True
        bound = self.signature.bind(*arguments)
        bound.apply_defaults()
        theirs = _as_tuple(self.peer(*bound.args))
        try:
            found = _as_tuple(self.function(*bound.args))
        except Exception as error:
            raise UserError(f"kernel: {self.name} as {self.op} raised {type(error).__name__}: {error}") from error
        expected, got = (", ".join(map(_described, tensors)) for tensors in (theirs, found))
        if expected != got:
            raise UserError(f"kernel: {self.name} as {self.op} must return {expected}, got {got}")
        if any(tensor.requires_grad for tensor in theirs) and not all(tensor.requires_grad for tensor in found):
            self.differentiable = False
            found = tuple(_Instead.apply(*both) for both in zip(theirs, found, strict=True))
        return found if len(found) > 1 else found[0]


class _Instead(torch.autograd.Function):
    """The values of one tensor, the gradient of another of its shape."""

    @staticmethod
    def forward(ctx: Any, differentiable: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *dy: torch.Tensor) -> Any:
        return dy[0], None


class _ByHand(torch.autograd.Function):
    """A layer of `reference` in PyTorch's graph: both of its passes are the reference's own."""

    @staticmethod
    def forward(ctx: Any, layer: ModuleType, differentiated: tuple[int, ...], *arguments: Any) -> Any:
        results, ctx.of_layer = layer.forward(*map(_to_numpy, arguments))
        ctx.layer, ctx.differentiated, ctx.count = layer, differentiated, len(arguments)
        ctx.device = next(a.device for a in arguments if isinstance(a, torch.Tensor))
        tensors = tuple(_to_torch(result, ctx.device) for result in _as_tuple(results))
        return tensors if len(tensors) > 1 else tensors[0]

    @staticmethod
    def backward(ctx: Any, *dy: torch.Tensor) -> Any:
        upstream = tuple(map(_to_numpy, dy))
        gradients = _as_tuple(ctx.layer.backward(upstream if len(upstream) > 1 else upstream[0], ctx.of_layer))
        found: list[torch.Tensor | None] = [None] * ctx.count
        for place, gradient in zip(ctx.differentiated, gradients, strict=True):
            if gradient is not None:
                found[place] = _to_torch(gradient, ctx.device)
        return (None, None, *found)


def by_hand(layer: str, differentiated: Mapping[str, tuple[str, ...]]) -> Callable[..., Any]:
    """The reference's layer of this name as a function of tensors, which autograd can go through.

    `differentiated`: for each layer, the arguments that its backward pass returns gradients of, in their order.
    """
    module = importlib.import_module(f"reference.{layer}")
    signature = inspect.signature(module.forward)
    places = tuple(list(signature.parameters).index(name) for name in differentiated[layer])

    def operator(*arguments: Any) -> Any:
        bound = signature.bind(*arguments)
        bound.apply_defaults()
        return _ByHand.apply(module, places, *bound.args)

    return operator


def reference_operators(differentiated: Mapping[str, tuple[str, ...]]) -> Operators:
    """The set of operators that are the reference's layers, for training; `differentiated` as in `by_hand`."""
    layers: dict[str, Any] = {op: by_hand(op, differentiated) for op in SWAPPABLE}
    return dataclasses.replace(ops.TORCH, name="reference", **layers)


def unfused(operators: Operators) -> Operators:
    """The same set with each fused operator made of its parts, so that a part is in one operator only."""

    def linear_cross_entropy(x: Any, weight: Any, bias: Any, targets: Any, ignore_index: int = -100) -> Any:
        return operators.cross_entropy(F.linear(x, weight, bias), targets, ignore_index)

    return dataclasses.replace(ops.separate(operators), linear_cross_entropy=linear_cross_entropy)


def fused_forward(engine: TorchEngine, batch: Batch, noise: Noise | None) -> list[tuple[str, np.ndarray]]:
    """Every tensor of the forward pass as training computes it, fused operators and all; `trace` takes them apart."""
    tensors: list[tuple[str, np.ndarray]] = []

    def note(name: str, tensor: torch.Tensor) -> None:
        tensors.append((name, tensor.cpu().numpy().copy()))

    with torch.no_grad():
        engine.model(torch.from_numpy(np.asarray(batch.inputs, np.int64)).to(engine.device), noise, note)
    return tensors


def counted(operators: Operators, used: set[str]) -> Operators:
    """The same set, which adds to `used` the name of every operator that is called."""

    def noted(name: str) -> Callable[..., Any]:
        operator = getattr(operators, name)

        def call(*arguments: Any) -> Any:
            used.add(name)
            return operator(*arguments)

        return call

    operators_noted: dict[str, Any] = {name: noted(name) for name in SWAPPABLE}
    return dataclasses.replace(operators, **operators_noted)


class Functions(TorchFunctionMode):
    """While it is entered, the layers among "linear" and "embedding" that are named compute as the reference does.

    These are no members of the set of operators, because there is one of each: PyTorch's own functions.
    """

    def __init__(self, layers: tuple[str, ...], differentiated: Mapping[str, tuple[str, ...]]) -> None:
        super().__init__()
        self.twins: dict[Any, Callable[..., Any]] = {
            getattr(F, layer): by_hand(layer, differentiated) for layer in layers
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.twins:
            return self.twins[func](*args)  # what the model says in keywords is PyTorch's defaults
        return func(*args, **(kwargs or {}))


def _to_numpy(value: Any) -> Any:
    """An array of a tensor, a number of one without axes, anything else as it is."""
    return value.detach().cpu().numpy()[()] if isinstance(value, torch.Tensor) else value


def _to_torch(array: Any, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.array(array)).to(device)  # a copy: a layer may hand on the array that it was given


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _described(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}"
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
