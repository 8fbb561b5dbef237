"""Turns a layer's forward and backward into one differentiable PyTorch operator: the only adapter, for all layers.

A layer module has `forward(*arguments) -> results, saved` and `backward(gradients, saved) -> gradients`; `saved` is a
NamedTuple `Saved`, whose fields are arguments and results by their names, and what else was computed. From these names
follow the two custom operators, their schemas, which tensors autograd keeps, and where gradients go. The layer itself
is also the fake implementation: it allocates what it returns, and launches nothing for tensors without data.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, get_type_hints

import torch

from kernels.philox import Noise, signed

_SCHEMA_TYPES = {
    torch.Tensor: "Tensor",
    torch.Tensor | None: "Tensor?",
    Noise | None: "int[]?",
    float | None: "float?",
    float: "float",
    bool: "bool",
    int: "int",
    str: "str",
}


def operator(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    saved: type,
    gradients: Sequence[str],
    results: Sequence[str] = ("y",),
    same: Mapping[str, str] = MappingProxyType({}),
    autocast: str = "",
) -> Callable[..., Any]:
    """A function with forward's arguments that returns its results, differentiable in the arguments `gradients`.

    `results` are the names of what forward returns, in order. `same` says whose gradient is another's, the same tensor,
    which a custom operator may not return twice. Under torch.autocast, floating-point tensors are first
    cast as PyTorch does for its own operator of this kind: "float32", "lower" (to autocast's type), or "" (left alone).
    """
    arguments = inspect.signature(forward).parameters
    fields = saved.__annotations__
    computed = [field for field in fields if field not in arguments and field not in results]
    kept = [field for field in fields if field not in arguments]

    def run_forward(*values: Any) -> tuple[torch.Tensor, ...]:
        outputs, state = forward(*values)
        return *_as_tuple(outputs), *(getattr(state, field) for field in computed)

    def run_backward(*values: Any) -> list[torch.Tensor]:
        """Gradients of the results, then the fields of `saved` -> the gradients that are not None."""
        upstream = values[: len(results)]
        state = saved(*values[len(results) :])
        found = zip(gradients, _as_tuple(backward(upstream if len(results) > 1 else upstream[0], state)), strict=True)
        return [gradient for argument, gradient in found if gradient is not None and argument not in same]

    gives = ", ".join(["Tensor"] * (len(results) + len(computed)))
    schema = f"({_takes(forward)}) -> {f'({gives})' if ',' in gives else gives}"
    state_hints = get_type_hints(saved)
    takes = ", ".join(
        [*(f"Tensor d_{result}" for result in results)]
        + [f"{_SCHEMA_TYPES[state_hints[field]]} {field}" for field in fields]
    )
    forward_op = _custom_op(f"twingrad::{name}", run_forward if "," in gives else _single(run_forward), schema)
    backward_op = _custom_op(f"twingrad::{name}_backward", run_backward, f"({takes}) -> Tensor[]")

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = dict(zip([*results, *computed], _as_tuple(output), strict=True))
        given = dict(zip(arguments, inputs, strict=True))
        values = [outputs[field] if field in kept else given[field] for field in fields]
        ctx.save_for_backward(*(value for value in values if isinstance(value, torch.Tensor)))
        ctx.others = [None if isinstance(value, torch.Tensor) else (value,) for value in values]
        ctx.present = [given[argument] is not None for argument in gradients]
        # Zeros where a result was not used. One alone was, and what was computed besides needs no zeros of its size.
        ctx.set_materialize_grads(len(results) > 1)

    def differentiate(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tensors = iter(ctx.saved_tensors)
        values = [next(tensors) if other is None else other[0] for other in ctx.others]
        found = iter(backward_op(*upstream[: len(results)], *values))
        by_name: dict[str, torch.Tensor | None] = {}
        for argument, present in zip(gradients, ctx.present, strict=True):
            by_name[argument] = by_name[same[argument]] if argument in same else next(found) if present else None
        return tuple(by_name.get(argument) for argument in arguments)

    forward_op.register_autograd(differentiate, setup_context=setup_context)
    return _function(name, forward, forward_op, len(results), autocast)


def forward_only(name: str, forward: Callable[..., Any], autocast: str = "") -> Callable[..., Any]:
    """A function with forward's arguments that returns its one result, and has no gradient: to ask for it is an error.

    `autocast` as in `operator`.
    """
    op = _custom_op(f"twingrad::{name}", lambda *values: forward(*values)[0], f"({_takes(forward)}) -> Tensor")

    def refuse(ctx: Any, *upstream: torch.Tensor) -> None:
        raise NotImplementedError(f"{name}: has no gradient")

    op.register_autograd(refuse)
    return _function(name, forward, op, 1, autocast)


def _takes(forward: Callable[..., Any]) -> str:
    """The arguments of a schema."""
    arguments, hints = inspect.signature(forward).parameters, get_type_hints(forward)
    return ", ".join(f"{_SCHEMA_TYPES[hints[argument]]} {argument}" for argument in arguments)


def _function(name: str, forward: Callable[..., Any], op: Any, results: int, autocast: str) -> Callable[..., Any]:
    """The operator as a function that takes arguments as `forward` does; the first `results` of what comes out."""
    signature = inspect.signature(forward)

    def apply(*positional: Any, **named: Any) -> Any:
        bound = signature.bind(*positional, **named)
        bound.apply_defaults()
        if isinstance(bound.arguments.get("noise"), tuple):
            bound.arguments["noise"] = signed(bound.arguments["noise"])
        values = _cast(bound.arguments.values(), autocast)
        output = _as_tuple(op(*values))[:results]
        return output if results > 1 else output[0]

    apply.__name__, apply.__doc__ = name, forward.__doc__
    return apply


def _custom_op(name: str, function: Callable[..., Any], schema: str) -> Any:
    op = torch.library.custom_op(name, function, mutates_args=(), schema=schema)
    op.register_fake(function)
    return op


def _single(function: Callable[..., tuple[torch.Tensor, ...]]) -> Callable[..., torch.Tensor]:
    """An operator of one result returns it, not a tuple of one."""
    return lambda *values: function(*values)[0]


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _cast(values: Iterable[Any], autocast: str) -> list[Any]:
    values = list(values)
    device = next(value.device.type for value in values if isinstance(value, torch.Tensor))
    if not autocast or device == "meta" or not torch.is_autocast_enabled(device):  # meta: which has no autocast
        return values
    dtype = torch.float32 if autocast == "float32" else torch.get_autocast_dtype(device)
    is_float = [isinstance(value, torch.Tensor) and value.dtype.is_floating_point for value in values]
    return [value.to(dtype) if cast else value for value, cast in zip(values, is_float, strict=True)]
