"""GPT: tokens in, logits out, and the way back, layer by layer.

A block (pre-norm, Radford et al. 2019, section 2.3):    x = x + attn(norm1(x))      x = x + mlp(norm2(x))

Where a value is used twice its gradients add up: at the shortcuts, and in an embedding table that is the head as well.
Parameters are a flat mapping from name to array; `forward` keeps what each operation saved under that operation's name,
and `backward` takes it from there, in reverse, down to the first parameter that is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np

from reference import (
    attention,
    cached_attention,
    cross_entropy,
    dropout,
    embedding,
    gelu,
    init,
    layer_norm,
    linear,
    linear_cross_entropy,
    lora,
    philox,
    rms_norm,
    rope,
    swiglu,
)
from reference.cache import Cache
from reference.config import GPTConfig
from reference.torch_rng import Generator

Arrays = dict[str, np.ndarray]
Trace = Callable[[str, np.ndarray], None]  # called with each tensor, in execution order
GELU = {"gelu": "none", "gelu_tanh": "tanh"}


class Part(Protocol):
    """Some texts of a batch, or some positions of them, while others compute the rest of it at the same time."""

    start: int  # how many positions of these texts come before

    def join(self, layer: int, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """k and v (B, G, T, D) of these positions -> of all up to here, (B, G, start + T, D)."""
        ...

    def hand_back(self, layer: int, dk: np.ndarray, dv: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The gradients of what `join` gave -> of what it was given, what later positions ask of it included."""
        ...

    def sum(self, name: str, gradient: np.ndarray) -> np.ndarray | None:
        """The sum of all parts' gradients of this name for one of them, which is to go on with it; None for others."""
        ...

    def turn(self, name: str) -> AbstractContextManager[Any]:
        """Within it no other part adds to this name, and each has added all that came before."""
        ...


def forward(
    params: Arrays,
    config: GPTConfig,
    tokens: np.ndarray,
    noise: Callable[..., Any] | None = None,
    trace: Trace | None = None,
    positions: slice | np.ndarray = slice(None),
    keep: bool = True,
    cache: Cache | None = None,
    trained: Collection[str] | None = None,
    targets: np.ndarray | None = None,
    recompute: bool = False,
    part: Part | None = None,
) -> tuple[np.ndarray, Any]:
    """tokens (B, T) of integers -> logits (B, T, V), saved. With `targets` (B, T): -> loss, saved;
    no logits exist then, but of a head with an adapter.

    `noise(layer, site, shape, rate)` gives the noise of a dropout site, see philox.PhiloxNoise; None: no dropout.
    `positions`: those whose logits are wanted, such as slice(-1, None) to predict the next token, or integers (B, P).
    `keep` False: nothing is saved for a gradient, and memory is free again as soon as a layer is done with it.
    `cache`: of the tokens before these, to which these are added; without dropout, and no gradient is taken through it.
    `trained`: the names of the parameters that will get gradients, None for all; below the first nothing is saved.
    `recompute`: of each block its input alone is saved, and `backward` computes the rest again.
    `part`: what else there is of the batch; where it is of the same texts, without dropout, cache and `recompute`.
    """
    B, T = tokens.shape
    start = part.start if part else 0
    starts = np.full(1, start) if cache is None else cache.lengths
    if (longest := int(starts.max()) + T) > config.context_length:
        raise ValueError(f"tokens: {longest} positions, more than the context length of {config.context_length}")
    saved: dict[str, Any] = {}
    first = first_trained(config, trained)
    keeping = keep and first < 0

    def note(name: str, y: np.ndarray) -> np.ndarray:
        if trace:
            trace(name, y)
        return y

    def compute(name: str, layer: Any, *arguments: Any) -> np.ndarray:
        y, of_layer = layer.forward(*arguments)
        if keeping:
            saved[name] = of_layer
        return y

    def run(name: str, layer: Any, *arguments: Any) -> np.ndarray:
        return note(name, compute(name, layer, *arguments))

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        if config.norm == "rms_norm":
            return run(name, rms_norm, x, params[f"{name}.weight"], config.norm_eps)
        return run(name, layer_norm, x, params[f"{name}.weight"], params.get(f"{name}.bias"), config.norm_eps)

    def project(name: str, x: np.ndarray, weight: str = "", layer: int = 0) -> np.ndarray:
        y = compute(name, linear, x, params[weight or f"{name}.weight"], params.get(f"{name}.bias"))
        if config.lora and config.adapts(name):
            a, b, rate = params[f"{name}.lora_a"], params[f"{name}.lora_b"], config.lora.dropout
            here = noise(layer, lora.SITES[name.rpartition(".")[2]], x.shape, rate) if rate and noise else None
            y += run(f"{name}.lora", lora, x, a, b, config.lora.scale, rate, here)
        return note(name, y)

    def drop(name: str, layer: int, site: int, rate: float, x: np.ndarray) -> np.ndarray:
        if not rate or noise is None:
            return x
        return run(name, dropout, x, rate, noise(layer, site, x.shape, rate))

    def heads(x: np.ndarray) -> np.ndarray:
        return x.reshape(B, T, -1, config.head_dim).transpose(0, 2, 1, 3)  # (B, H, T, D)

    def attend(i: int, x: np.ndarray) -> np.ndarray:
        name, rate = f"blocks.{i}.attn", config.attn_dropout
        q, k, v = (heads(project(f"{name}.{part}", x, layer=i)) for part in ("query", "key", "value"))
        if config.position == "rope":
            q = run(f"{name}.query.rope", rope, q, *turns, config.rope_interleaved)
            k = run(f"{name}.key.rope", rope, k, *turns, config.rope_interleaved)
        if part:
            k, v = part.join(i, k, v)
        if cache is None:
            here = noise(i, philox.ATTENTION, (B, config.n_heads, T, T), rate) if rate and noise else None
            y = run(f"{name}.heads", attention, q, k, v, True, None, rate, here)
        else:
            y = run(f"{name}.heads", cached_attention, q, *cache.store(i, k, v), starts)
        y = project(f"{name}.out", y.transpose(0, 2, 1, 3).reshape(B, T, -1), layer=i)
        return drop(f"{name}.dropout", i, philox.ATTENTION_SHORTCUT, config.shortcut_dropout, y)

    def feed_forward(i: int, x: np.ndarray) -> np.ndarray:
        name = f"blocks.{i}.mlp"
        if config.mlp == "swiglu":
            gate, up = (project(f"{name}.{part}", x, layer=i) for part in ("gate", "up"))
            x = run(f"{name}.act", swiglu, gate, up)
        else:
            x = run(f"{name}.act", gelu, project(f"{name}.up", x, layer=i), GELU[config.mlp])
        x = project(f"{name}.down", x, layer=i)
        return drop(f"{name}.dropout", i, philox.MLP_SHORTCUT, config.shortcut_dropout, x)

    def block(i: int, x: np.ndarray) -> np.ndarray:
        x = note(f"blocks.{i}.shortcut1", x + attend(i, norm(f"blocks.{i}.norm1", x)))
        return note(f"blocks.{i}.shortcut2", x + feed_forward(i, norm(f"blocks.{i}.norm2", x)))

    def again(i: int) -> None:
        """Save what block i's gradient needs, for which its input was saved."""
        nonlocal keeping, trace
        keeping, trace = True, None
        block(i, saved.pop(f"blocks.{i}"))

    x = run("tok_emb", embedding, tokens, params["tok_emb.weight"])
    places = start + np.arange(T) if cache is None else starts[:, None] + np.arange(T)
    if config.position == "learned":
        x = note("emb", x + run("pos_emb", embedding, places, params["pos_emb.weight"]))
    else:
        turns = rope.angles(places, config.head_dim, config.rope_theta, config.rope_scaling, x.dtype)
    x = drop("emb.dropout", 0, philox.EMBEDDING, config.emb_dropout, x)
    for i in range(config.n_layers):
        keeping = keep and first <= i and not recompute
        if keep and first <= i and recompute:
            saved[f"blocks.{i}"] = x
        x = block(i, x)
    chosen = x[:, positions] if isinstance(positions, slice) else np.take_along_axis(x, positions[..., None], axis=1)
    keeping = keep
    x = norm("final_norm", chosen)
    head = head_weight(config)
    if targets is None:
        y = project("head", x, head)
    elif config.adapts("head"):  # whose logits are a sum
        y = run("loss", cross_entropy, project("head", x, head), targets)
    else:
        y = run("loss", linear_cross_entropy, x, params[head], params.get("head.bias"), targets)
    return y, (config, saved, positions, (B, T), trained, first, again if recompute else None, part)


def head_weight(config: GPTConfig) -> str:
    """The name of the parameter that makes logits."""
    return "tok_emb.weight" if config.tie_embeddings else "head.weight"


def first_trained(config: GPTConfig, trained: Collection[str] | None) -> int:
    """The first block with a parameter among `trained`: -1 if an embedding is, n_layers if none but what follows."""
    if trained is None:
        return -1
    blocks = [int(name.split(".")[1]) for name in trained if name.startswith("blocks.")]
    return -1 if any("emb" in name for name in trained) else min(blocks, default=config.n_layers)


def backward(
    dy: Any,
    saved: Any,
    grads: Arrays | None = None,
    spare: Arrays | None = None,
    trace: Trace | None = None,
) -> Arrays:
    """dy like what `forward` gave, logits or loss -> gradients by parameter name, added to `grads` if given.

    What was saved is used up: its memory is free again as soon as a layer is done with it.
    `spare`: arrays by parameter name whose contents are no longer needed; a weight's gradient is written there rather
    than to fresh memory. Each is taken out of the mapping when it is used.
    """
    config, saved, positions, (B, T), trained, first, again, part = saved
    grads = {} if grads is None else grads
    spare = {} if spare is None else spare

    def note(name: str, dy: np.ndarray) -> np.ndarray:
        if trace:
            trace(f"d.{name}", dy)
        return dy

    def learns(name: str) -> bool:
        return trained is None or name in trained

    def add(name: str, gradient: np.ndarray | None) -> None:
        if gradient is None or not learns(name):
            return
        if part:
            gradient = part.sum(name, gradient)
        if gradient is not None and name in grads:
            grads[name] += gradient
        elif gradient is not None:
            grads[name] = gradient

    def norm(name: str, dy: np.ndarray) -> np.ndarray:
        if config.norm == "rms_norm":
            dx, dweight = rms_norm.backward(note(name, dy), saved.pop(name))
            dbias = None
        else:
            dx, dweight, dbias = layer_norm.backward(note(name, dy), saved.pop(name))
        add(f"{name}.weight", dweight)
        add(f"{name}.bias", dbias)
        return dx

    def project(name: str, dy: np.ndarray, weight: str = "") -> np.ndarray:
        weight = weight or f"{name}.weight"
        out = None if weight in grads else spare.pop(weight, None)
        frozen = not learns(weight) and not learns(f"{name}.bias")
        dx, dweight, dbias = linear.backward(note(name, dy), saved.pop(name), out, frozen)
        add(weight, dweight)
        add(f"{name}.bias", dbias)
        if f"{name}.lora" in saved:
            dx_lora, da, db = lora.backward(note(f"{name}.lora", dy), saved.pop(f"{name}.lora"))
            add(f"{name}.lora_a", da)
            add(f"{name}.lora_b", db)
            dx += dx_lora
        return dx

    def embed(name: str, dy: np.ndarray) -> None:
        weight = f"{name}.weight"
        note(name, dy)
        if not learns(weight):
            return
        with part.turn(weight) if part else nullcontext():
            if weight not in grads and weight in spare:
                grads[weight] = spare.pop(weight)
                grads[weight].fill(0)
            grads[weight] = embedding.backward(dy, saved.pop(name), grads.get(weight))

    def drop(name: str, dy: np.ndarray) -> np.ndarray:
        return dropout.backward(note(name, dy), saved.pop(name)) if name in saved else dy

    def attend(i: int, dy: np.ndarray) -> np.ndarray:
        name = f"blocks.{i}.attn"
        dy = project(f"{name}.out", drop(f"{name}.dropout", dy))
        dy = note(f"{name}.heads", dy.reshape(B, T, -1, config.head_dim).transpose(0, 2, 1, 3))
        dq, dk, dv = attention.backward(dy, saved.pop(f"{name}.heads"))
        if part:
            dk, dv = part.hand_back(i, dk, dv)
        if config.position == "rope":
            dk = rope.backward(note(f"{name}.key.rope", dk), saved.pop(f"{name}.key.rope"))
            dq = rope.backward(note(f"{name}.query.rope", dq), saved.pop(f"{name}.query.rope"))
        dq, dk, dv = (part.transpose(0, 2, 1, 3).reshape(B, T, -1) for part in (dq, dk, dv))
        dx = project(f"{name}.value", dv)
        dx += project(f"{name}.key", dk)
        dx += project(f"{name}.query", dq)
        return dx

    def feed_forward(i: int, dy: np.ndarray) -> np.ndarray:
        name = f"blocks.{i}.mlp"
        dy = project(f"{name}.down", drop(f"{name}.dropout", dy))
        if config.mlp == "swiglu":
            dgate, dup = swiglu.backward(note(f"{name}.act", dy), saved.pop(f"{name}.act"))
            dx = project(f"{name}.up", dup)
            dx += project(f"{name}.gate", dgate)
            return dx
        return project(f"{name}.up", gelu.backward(note(f"{name}.act", dy), saved.pop(f"{name}.act")))

    head = head_weight(config)
    if "loss" in saved and "head" not in saved:
        spare.pop(head, None)  # its memory is free for the gradient, which this layer returns in a new array
        dx, dweight, dbias = linear_cross_entropy.backward(dy, saved.pop("loss"))
        add(head, dweight)
        add("head.bias", dbias)
    else:
        if "loss" in saved:
            dy = cross_entropy.backward(dy, saved.pop("loss"))
        dx = project("head", dy, head)
    del dy
    dx = norm("final_norm", dx)
    if not (isinstance(positions, slice) and positions == slice(None)):
        dx_chosen, dx = dx, np.zeros((B, T, dx.shape[2]), dx.dtype)
        if isinstance(positions, slice):
            dx[:, positions] = dx_chosen
        else:
            np.add.at(dx, (np.arange(B)[:, None], positions), dx_chosen)  # a position may be asked for twice
    for i in reversed(range(max(first, 0), config.n_layers)):
        if again:
            again(i)
        note(f"blocks.{i}.shortcut2", dx)
        dx += norm(f"blocks.{i}.norm2", feed_forward(i, dx))
        note(f"blocks.{i}.shortcut1", dx)
        dx += norm(f"blocks.{i}.norm1", attend(i, dx))
    if first >= 0:
        return grads  # what lies below learns nothing
    dx = drop("emb.dropout", dx)
    if config.position == "learned":
        dx = note("emb", dx)
        embed("pos_emb", dx.sum(axis=0))
    embed("tok_emb", dx)
    return grads


class GPT:
    """A model to hold in the hand: a config and its parameters, a flat mapping from name to array."""

    def __init__(self, config: GPTConfig, params: Arrays) -> None:
        shapes = config.parameter_shapes()
        for name, shape in shapes.items():
            if name not in params:
                raise ValueError(f"params: {name} is missing")
            if params[name].shape != shape:
                raise ValueError(f"params: {name} has shape {params[name].shape}, expected {shape}")
        if extra := sorted(set(params) - set(shapes)):
            raise ValueError(f"params: {extra[0]} is not a parameter of this model")
        self.config, self.params = config, params

    @classmethod
    def seeded(cls, config: GPTConfig, seed: int, scheme: str = "book") -> GPT:
        """A model with the initial weights that PyTorch would draw from this seed, see init.py."""
        return cls(config, init.initialize(config, Generator(seed), scheme))

    def __call__(self, tokens: np.ndarray, noise: Callable[..., Any] | None = None) -> np.ndarray:
        """tokens (B, T) -> logits (B, T, V)."""
        return forward(self.params, self.config, tokens, noise, keep=False)[0]

    def loss(self, tokens: np.ndarray, targets: np.ndarray) -> float:
        """tokens and targets (B, T) -> mean cross entropy of the targets that are not -100."""
        return float(cross_entropy.forward(self(tokens), targets)[0])

    def loss_and_gradients(
        self, tokens: np.ndarray, targets: np.ndarray, noise: Callable[..., Any] | None = None
    ) -> tuple[float, Arrays]:
        """tokens and targets (B, T) -> loss, and its gradient by parameter name."""
        logits, saved = forward(self.params, self.config, tokens, noise)
        loss, saved_loss = cross_entropy.forward(logits, targets)
        return float(loss), backward(cross_entropy.backward(1.0, saved_loss), saved)
