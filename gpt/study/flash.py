"""Flash attention on the heads of a recorded pass, tile by tile, as reference/flash_attention.py goes through them.

What the page replays is what that module's loops yield, and nothing is computed in another way: the scores of a tile,
the largest score, the sum and the result so far; on the way back ds, made again from one number a query. At the end
stands how far it all is from ordinary attention on the same numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np

from gpt.parity.laws import relative
from gpt.study.page import pack
from gpt.study.record import Recording, Step
from reference import attention, flash_attention

__all__ = ["flash_of"]

TILE = 4
MOST_TOKENS = 32
MOST_NUMBERS = 50_000  # of all heads' states: 0.5 MB of a page
FORWARD, QUERIES, KEYS = ("s", "p", "shrink", "m", "l", "o"), ("kept", "ds", "dq"), ("kept", "ds", "dk", "dv")


def flash_of(
    recording: Recording, tile: int = TILE, tokens: int = MOST_TOKENS, numbers: int = MOST_NUMBERS
) -> dict[str, Any]:
    """The states of as many heads as there is room for, of the first example and its first `tokens`."""
    steps = [step for step in recording.steps if step.operation.layer == "attention"]
    heads = [(block, head) for block in range(len(steps)) for head in range(recording.config.n_heads)]
    shown = min(tokens, recording.tensors["tokens"].shape[1])
    size = _numbers(recording, tile, shown)
    most = max(1, min(len(heads), numbers // size))
    chosen = [heads[i] for i in sorted(set(np.linspace(0, len(heads) - 1, most).round().astype(int).tolist()))]
    replays = []
    for block, group in itertools.groupby(chosen, key=lambda pair: pair[0]):
        replays += [{"block": block, **replay} for replay in _replay(steps[block], [h for _, h in group], tile, shown)]
    return {"tile": tile, "tokens": shown, "of_heads": len(heads), "heads": replays}


def _numbers(recording: Recording, tile: int, tokens: int) -> int:
    """About how many numbers the states of a head are."""
    config, tiles = recording.config, -(-tokens // tile)
    keys = config.n_heads // config.n_kv_heads * 2 + 2
    return tiles * (tiles + 1) // 2 * tile * (2 * tile * (1 + keys // 2) + (keys + 2) * config.head_dim)


def _replay(step: Step, heads: list[int], tile: int, tokens: int) -> list[dict[str, Any]]:
    """All loops of some heads of one layer."""
    arguments = dict(step.arguments)
    q, k, v = (arguments.pop(name)[:1, :, :tokens] for name in "qkv")
    if isinstance(arguments["noise"], np.ndarray):  # a mask, of which the corner is needed
        arguments["noise"] = arguments["noise"][:1, :, :tokens, :tokens]
    dy = step.dy[:1, :, :tokens]
    y, saved = flash_attention.forward(q, k, v, **arguments, block_q=tile, block_k=tile)
    launch, _, lse = saved
    grads = dict(zip(("dq", "dk", "dv"), flash_attention.backward(dy, saved), strict=True))
    delta = (y * dy).sum(axis=-1)
    true_y, true_saved = attention.forward(q, k, v, **arguments)
    true = dict(zip(("dq", "dk", "dv"), attention.backward(dy, true_saved), strict=True))
    tiles = [np.arange(first, min(first + tile, tokens)) for first in range(0, tokens, tile)]
    replays = []
    for h in heads:
        g = h // launch.group
        forward = [
            (h, rows, state.columns, state)
            for rows in tiles
            for state in flash_attention.forward_steps(launch, 0, h, rows)
        ]
        queries = [
            (h, rows, state.columns, state)
            for rows in tiles
            for state in flash_attention.backward_queries_steps(launch, dy, lse, delta, 0, h, rows)
        ]
        keys = [
            (state.h, state.rows, columns, state)
            for columns in tiles
            for state in flash_attention.backward_keys_steps(launch, dy, lse, delta, 0, g, columns)
        ]
        own = {"dq": h, "dk": g, "dv": g}
        # Where a query sees one key alone, dq and dk are 0 but for rounding, which has no size of its own.
        largest = max(np.abs(true[name][0, i]).max() for name, i in own.items())
        replays.append(
            {
                "head": h,
                "key_head": g,
                "scale": launch.scale,
                "factor": launch.factor,
                "forward": _states(forward, FORWARD, tile),
                "queries": _states(queries, QUERIES, tile),
                "keys": _states(keys, KEYS, tile),
                "y": pack(y[0, h]),
                "lse": pack(lse[0, h]),
                "delta": pack(delta[0, h]),
                "ordinary": pack(true_y[0, h]),
                "errors": {"y": relative(y[0, h] - true_y[0, h], true_y[0, h])}
                | {name: relative(grads[name][0, i] - true[name][0, i], largest) for name, i in own.items()},
            }
        )
    return replays


def _states(
    states: Iterable[tuple[int, np.ndarray, np.ndarray, Any]], names: tuple[str, ...], tile: int
) -> dict[str, Any]:
    """Which tile each step is at, and its values, (steps, ...): where a tile is cut by the edge, NaN."""
    states = list(states)
    found: dict[str, Any] = {
        "heads": [h for h, *_ in states],
        "rows": [[int(rows[0]), len(rows)] for _, rows, *_ in states],
        "columns": [[int(columns[0]), len(columns)] for _, _, columns, _ in states],
    }
    for name in names:
        arrays = [getattr(state, name) for *_, state in states]
        shape = [tile, *([tile] if name in ("s", "p", "kept", "ds") else arrays[0].shape[1:])]
        whole = np.full((len(arrays), *shape), np.nan)
        for i, array in enumerate(arrays):
            whole[i][tuple(slice(n) for n in array.shape)] = array
        found[name] = pack(whole)
    return found
