"""Laws that a layer obeys whatever its inputs are, so that no other implementation is needed to know.

A law takes a problem, in float64, and gives measures: what was measured, the error, the bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from reference import attention, rope

if TYPE_CHECKING:
    from gpt.parity.ops import Problem

Measure: TypeAlias = tuple[str, float, float]
Law: TypeAlias = "Callable[[Problem], Iterator[Measure]]"

EXACT = 1e-12  # of float64 identities, relative to the largest entry
DIFFERENCES = 1e-7  # of central differences in float64


def relative(error: np.ndarray | float, size: np.ndarray | float) -> float:
    """Largest absolute entry of `error` over that of `size`; where that is 0, nothing but an error of 0 is small."""
    error, size = (float(np.max(np.abs(array), initial=0.0)) for array in (error, size))
    return error / size if size else (0.0 if error == 0 else np.inf if error > 0 else np.nan)


def adjoint(problem: Problem) -> Iterator[Measure]:
    """<dy, J v> = <J^T dy, v>: a derivative along a random direction, J v, is what the gradients say it is."""
    rng = np.random.default_rng(1)
    inputs, gradients = problem.inputs(), problem.run()
    step = problem.step()
    direction = {name: rng.normal(size=x.shape) for name, x in inputs.items()}
    plus, minus = (
        problem.replace(**{name: x + sign * step * direction[name] for name, x in inputs.items()}).forward()
        for sign in (1, -1)
    )
    along = problem.weighed([up - down for up, down in zip(plus, minus, strict=True)]) / (2 * step)
    products = np.concatenate([(gradients[f"d{name}"] * direction[name]).ravel() for name in inputs])
    yield "<dy, J v>", relative(along - products.sum(), np.abs(products).sum()), DIFFERENCES


def key_shift(problem: Problem) -> Iterator[Measure]:
    """Rows of ds sum to 0, so that a vector added to all keys, such as a bias, receives no gradient."""
    dk = problem.run()["dk"]
    sums = np.abs(dk).sum(axis=2)
    yield "dk summed over keys", relative(dk.sum(axis=2), problem.size("dk", sums)), EXACT


def causality(problem: Problem) -> Iterator[Measure]:
    """Other keys and values at the last position change nothing for the queries before it, not one bit."""
    k, v = problem.arguments["k"].copy(), problem.arguments["v"].copy()
    k[:, :, -1] += 3.0
    v[:, :, -1] -= 2.0
    before, after = (given.forward()[0][:, :, :-1] for given in (problem, problem.replace(k=k, v=v)))
    yield "y of earlier queries", float(np.count_nonzero(before != after)), 0.0


def own_keys(problem: Problem) -> Iterator[Measure]:
    """What lies in a cache after a row's own keys changes nothing, not one bit."""
    arguments = problem.arguments
    q, k, v, starts = (arguments[name] for name in ("q", "k", "v", "starts"))
    after = (np.arange(k.shape[2]) >= starts[:, None] + q.shape[2])[:, None, :, None]
    size = np.abs(k).max() + np.abs(v).max()
    other = problem.replace(k=np.where(after, -1e3 * size, k), v=np.where(after, 1e3 * size, v))
    before, with_other = problem.forward()[0], other.forward()[0]
    yield "y with other keys after a row's own", float(np.count_nonzero(before != with_other)), 0.0


def rows_alone(problem: Problem) -> Iterator[Measure]:
    """Each row is attended to as if it were alone and there were no cache: by causal attention over its own keys."""
    arguments = problem.arguments
    q, k, v, starts = (arguments[name] for name in ("q", "k", "v", "starts"))
    alone = [
        attention.forward(q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n], True, arguments["scale"])[0]
        for b, n in enumerate((starts + q.shape[2]).tolist())
    ]
    y = np.concatenate(alone)
    yield "y of rows alone", relative(problem.forward()[0] - y, y), EXACT


def orthogonal_to_constants(problem: Problem) -> Iterator[Measure]:
    """The same number added to a whole row does not reach y: dx sums to 0 in each row."""
    dx = problem.run()["dx"]
    size = np.abs(problem.dy * problem.arguments["weight"]).sum() / _deviation(problem).min()
    yield "dx summed over a row", relative(dx.sum(axis=-1), size), EXACT


def orthogonal_to_normalized(problem: Problem) -> Iterator[Measure]:
    """Nor does a stretched row, if only eps is nothing beside its variance: dx is orthogonal to x-hat."""
    x = problem.arguments["x"]
    dx = problem.replace(eps=1e-30).run()["dx"]
    deviation = _deviation(problem)
    normalized = (x - x.mean(axis=-1, keepdims=True)) / deviation
    size = np.abs(problem.dy * problem.arguments["weight"]).sum() / deviation.min()
    yield "dx along x-hat", relative((dx * normalized).sum(axis=-1), size), EXACT


def _deviation(problem: Problem) -> np.ndarray:
    x = problem.arguments["x"]
    return np.sqrt(x.var(axis=-1, keepdims=True) + np.finfo(x.dtype).tiny)


def orthogonal_to_input(problem: Problem) -> Iterator[Measure]:
    """Without a mean, too, a stretched row does not reach y, if only eps is nothing beside its mean square: dx is
    orthogonal to x."""
    x = problem.arguments["x"]
    dx = problem.replace(eps=1e-30).run()["dx"]
    normalized = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True))
    size = np.abs(problem.dy * problem.arguments["weight"] * normalized).sum()
    yield "dx along x", relative((dx * x).sum(axis=-1), size), EXACT


def odd_part(problem: Problem) -> Iterator[Measure]:
    """y(x) - y(-x) = x, and so dx(x) + dx(-x) = dy."""
    x = problem.arguments["x"]
    here, there = problem.run(), problem.replace(x=-x).run()
    yield "y(x) - y(-x)", relative(here["y"] - there["y"] - x, x), EXACT
    yield "dx(x) + dx(-x)", relative(here["dx"] + there["dx"] - problem.upstream()[0], problem.upstream()[0]), EXACT


def odd_gate(problem: Problem) -> Iterator[Measure]:
    """silu(g) - silu(-g) = g: y(gate) - y(-gate) = gate up, and so dgate(gate) + dgate(-gate) = dy up."""
    gate, up, dy = problem.arguments["gate"], problem.arguments["up"], problem.upstream()[0]
    here, there = problem.run(), problem.replace(gate=-gate).run()
    yield "y(gate) - y(-gate)", relative(here["y"] - there["y"] - gate * up, gate * up), EXACT
    yield "dgate(gate) + dgate(-gate)", relative(here["dgate"] + there["dgate"] - dy * up, dy * up), EXACT


def pairs_turned(problem: Problem) -> Iterator[Measure]:
    """A rotation keeps the length of each pair: so it shows, too, which entries are one."""
    x, y = problem.arguments["x"], problem.forward()[0]
    before, after = (np.hypot(*_pairs(array, problem.arguments["interleaved"])) for array in (x, y))
    yield "length of each pair", relative(after - before, before), EXACT


def relative_positions(problem: Problem) -> Iterator[Measure]:
    """All positions moved on alike, the dot product of a query and a key stays: it knows their difference alone."""
    arguments = problem.arguments
    cos, sin, keys = arguments["cos"], arguments["sin"], arguments["x"][:, :, ::-1]
    moved = 5 * rope.frequencies(arguments["x"].shape[-1])
    on = {"cos": cos * np.cos(moved) - sin * np.sin(moved), "sin": sin * np.cos(moved) + cos * np.sin(moved)}
    here, there = (
        given.forward()[0] @ given.replace(x=keys).forward()[0].swapaxes(-1, -2)
        for given in (problem, problem.replace(**on))
    )
    yield "q k, moved on", relative(there - here, here), EXACT


def _pairs(x: np.ndarray, interleaved: bool) -> tuple[np.ndarray, np.ndarray]:
    half = x.shape[-1] // 2
    return (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])


def logit_shift(problem: Problem) -> Iterator[Measure]:
    """A number added to all logits of a row changes nothing: dlogits sums to 0 in each row."""
    dlogits = problem.run()["dlogits"]
    yield "dlogits summed over a row", relative(dlogits.sum(axis=-1), np.abs(dlogits).sum(axis=-1)), EXACT


def weight_shift(problem: Problem) -> Iterator[Measure]:
    """The same vector added to every row of the head adds a number to all logits: dweight sums to 0 over the rows."""
    dweight = problem.run()["dweight"]
    yield "dweight summed over the vocabulary", relative(dweight.sum(axis=0), np.abs(dweight).sum(axis=0)), EXACT
