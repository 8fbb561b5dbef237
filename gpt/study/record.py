"""One pass of the reference's model, forward and backward, with every tensor and where each came from.

The model is written out as the list of operations that it consists of; each is run through its own layer's `forward`
and `backward`, and what it got and gave is kept. That this is the model that the engine runs, and not another one, is
checked: `differences_to_model` counts the tensors that are not the engine's, bit for bit.

From the list follows what the page needs: of an operation its arguments, its result, the gradient that arrived and
those that it passed on; of a tensor used more than once the gradients that add up; and, for proofs by finite
differences, the loss with any one tensor replaced by another, recomputed from there on.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from gpt.engine import Arrays, Noise
from gpt.study.derivations import Derivation, derive
from reference import cross_entropy, lora, model, philox, rope
from reference.config import GPTConfig

__all__ = ["Operation", "Recording", "Step", "differences_to_model", "operations", "record"]


@dataclass(frozen=True)
class Operation:
    """`name` is that of its result, as the model's trace has it; `layer` a module of `reference`, or one of PLAIN."""

    name: str
    layer: str
    tensors: dict[str, str]  # an argument: whose value is this tensor's
    constants: dict[str, Any] = field(default_factory=dict)  # an argument: its value

    @property
    def differentiable(self) -> tuple[str, ...]:
        """The arguments whose gradients the layer's backward returns, in order, if they are there."""
        return tuple(argument for argument in self.tensors if argument not in ("ids", "targets"))


class SplitHeads:
    """(B, T, H D) -> (B, H, T, D)."""

    @staticmethod
    def forward(x: np.ndarray, head_dim: int) -> tuple[np.ndarray, Any]:
        return x.reshape(*x.shape[:2], -1, head_dim).transpose(0, 2, 1, 3), None

    @staticmethod
    def backward(dy: np.ndarray, saved: Any) -> np.ndarray:
        return JoinHeads.forward(dy)[0]


class JoinHeads:
    """(B, H, T, D) -> (B, T, H D)."""

    @staticmethod
    def forward(x: np.ndarray) -> tuple[np.ndarray, Any]:
        return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1), x.shape[-1]

    @staticmethod
    def backward(dy: np.ndarray, saved: Any) -> np.ndarray:
        return SplitHeads.forward(dy, saved)[0]


class Add:
    """The end of a shortcut, or positions added to tokens."""

    @staticmethod
    def forward(x: np.ndarray, branch: np.ndarray) -> tuple[np.ndarray, Any]:
        return x + branch, branch.ndim < x.ndim

    @staticmethod
    def backward(dy: np.ndarray, saved: Any) -> tuple[np.ndarray, np.ndarray]:
        return dy, dy.sum(axis=0) if saved else dy


PLAIN: dict[str, Any] = {"split_heads": SplitHeads, "join_heads": JoinHeads, "add": Add}


def layer_of(operation: Operation) -> Any:
    """What has the operation's `forward` and `backward`. Looked up anew, so that it may be swapped."""
    return PLAIN.get(operation.layer) or importlib.import_module(f"reference.{operation.layer}")


def _masks(noise: Noise) -> Noise:
    """The masks themselves, computed once: a loss is computed thousands of times."""
    return lambda layer, site, shape, rate: philox.keep_mask(noise(layer, site, shape, rate), shape, rate)


def operations(
    config: GPTConfig, shape: tuple[int, int], noise: Noise | None = None, dtype: Any = "float64"
) -> list[Operation]:
    """The operations of a pass over tokens of this shape (B, T), in order, from "tokens" to "loss"."""
    B, T = shape
    found: list[Operation] = []
    turns = {}
    if noise is not None:
        noise = _masks(noise)
    if config.position == "rope":
        angles = rope.angles(np.arange(T), config.head_dim, config.rope_theta, config.rope_scaling, dtype)
        turns = {"cos": angles[0], "sin": angles[1], "interleaved": config.rope_interleaved}
    shapes = config.parameter_shapes()

    def add(name: str, layer: str, tensors: dict[str, str], **constants: Any) -> str:
        found.append(Operation(name, layer, tensors, constants))
        return name

    def add_biased(name: str, layer: str, tensors: dict[str, str], bias: str, **constants: Any) -> str:
        if bias in shapes:
            return add(name, layer, {**tensors, "bias": bias}, **constants)
        return add(name, layer, tensors, bias=None, **constants)

    def norm(name: str, x: str) -> str:
        tensors = {"x": x, "weight": f"{name}.weight"}
        if config.norm == "rms_norm":
            return add(name, "rms_norm", tensors, eps=config.norm_eps)
        return add_biased(name, "layer_norm", tensors, f"{name}.bias", eps=config.norm_eps)

    def project(name: str, x: str, layer: int, tied: str = "") -> str:
        adapted = bool(config.lora and config.adapts(name))
        tensors = {"x": x, "weight": tied or f"{name}.weight"}
        of_linear = f"{name}.linear" if adapted else name
        add_biased(of_linear, "linear", tensors, f"{name}.bias")
        if not adapted:
            return name
        assert config.lora is not None
        rate, site = config.lora.dropout, lora.SITES[name.rpartition(".")[2]]
        here = noise(layer, site, _shape_of(x, found, config, shape), rate) if rate and noise else None
        tensors = {"x": x, "a": f"{name}.lora_a", "b": f"{name}.lora_b"}
        add(f"{name}.lora", "lora", tensors, scale=config.lora.scale, rate=rate, noise=here)
        return add(name, "add", {"x": of_linear, "branch": f"{name}.lora"})

    def drop(name: str, layer: int, site: int, rate: float, x: str) -> str:
        if not rate or noise is None:
            return x
        return add(name, "dropout", {"x": x}, rate=rate, noise=noise(layer, site, (B, T, config.emb_dim), rate))

    def attend(i: int, x: str) -> str:
        name, rate = f"blocks.{i}.attn", config.attn_dropout
        q, k, v = (
            add(f"{name}.{part}.heads", "split_heads", {"x": project(f"{name}.{part}", x, i)}, head_dim=config.head_dim)
            for part in ("query", "key", "value")
        )
        if config.position == "rope":
            q = add(f"{name}.query.rope", "rope", {"x": q}, **turns)
            k = add(f"{name}.key.rope", "rope", {"x": k}, **turns)
        here = noise(i, philox.ATTENTION, (B, config.n_heads, T, T), rate) if rate and noise else None
        qkv = {"q": q, "k": k, "v": v}
        y = add(f"{name}.heads", "attention", qkv, causal=True, scale=None, rate=rate, noise=here)
        y = project(f"{name}.out", add(f"{name}.joined", "join_heads", {"x": y}), i)
        return drop(f"{name}.dropout", i, philox.ATTENTION_SHORTCUT, config.shortcut_dropout, y)

    def feed_forward(i: int, x: str) -> str:
        name = f"blocks.{i}.mlp"
        if config.mlp == "swiglu":
            gate, up = (project(f"{name}.{part}", x, i) for part in ("gate", "up"))
            y = add(f"{name}.act", "swiglu", {"gate": gate, "up": up})
        else:
            y = add(f"{name}.act", "gelu", {"x": project(f"{name}.up", x, i)}, approximate=model.GELU[config.mlp])
        y = project(f"{name}.down", y, i)
        return drop(f"{name}.dropout", i, philox.MLP_SHORTCUT, config.shortcut_dropout, y)

    x = add("tok_emb", "embedding", {"ids": "tokens", "weight": "tok_emb.weight"})
    if config.position == "learned":
        positions = add("pos_emb", "embedding", {"ids": "positions", "weight": "pos_emb.weight"})
        x = add("emb", "add", {"x": x, "branch": positions})
    x = drop("emb.dropout", 0, philox.EMBEDDING, config.emb_dropout, x)
    for i in range(config.n_layers):
        x = add(f"blocks.{i}.shortcut1", "add", {"x": x, "branch": attend(i, norm(f"blocks.{i}.norm1", x))})
        x = add(f"blocks.{i}.shortcut2", "add", {"x": x, "branch": feed_forward(i, norm(f"blocks.{i}.norm2", x))})
    logits = project("head", norm("final_norm", x), 0, "tok_emb.weight" if config.tie_embeddings else "")
    add("loss", "cross_entropy", {"logits": logits, "targets": "targets"}, ignore_index=-100)
    return found


def _shape_of(x: str, found: list[Operation], config: GPTConfig, shape: tuple[int, int]) -> tuple[int, ...]:
    """The shape of what an adapter sees: the hidden layer's where that comes before it."""
    of = {"act": config.mlp_dim, "joined": config.n_heads * config.head_dim}
    return (*shape, of.get(x.rpartition(".")[2], config.emb_dim))


@dataclass
class Step:
    """An operation with its numbers: arguments, result, what it saved, the gradient that arrived, those it gave."""

    operation: Operation
    arguments: dict[str, Any]
    y: np.ndarray
    saved: Any
    dy: np.ndarray
    gradients: dict[str, np.ndarray]  # by argument

    @property
    def name(self) -> str:
        return self.operation.name

    @property
    def result(self) -> str:
        """The result's name in the layer's equations."""
        return self.derivation.forward[-1].tensor

    @cached_property
    def derivation(self) -> Derivation:
        return derive(self.operation.layer, self.arguments)

    @cached_property
    def values(self) -> dict[str, Any]:
        """Everything in the step's equations by the names used there. What the layer returns is the layer's own; what
        it does not show is computed by the equations."""
        known = {name: value for name, value in self.arguments.items() if value is not None}
        known |= {self.result: self.y, f"d{self.result}": self.dy}
        known |= {f"d{argument}": gradient for argument, gradient in self.gradients.items()}
        known |= self.derivation.constants
        for equation in (*self.derivation.forward, *self.derivation.backward):
            if equation.tensor not in known:
                known[equation.tensor] = equation.evaluate(known)
        return known


@dataclass
class Recording:
    """See the module's docstring. Tensors and their gradients by name: results of operations, parameters, tokens."""

    config: GPTConfig
    steps: list[Step]
    tensors: Arrays
    gradients: Arrays
    contributions: dict[str, list[tuple[str, str, np.ndarray]]]  # of a tensor: (operation, argument, gradient)

    @property
    def loss(self) -> float:
        return float(self.tensors["loss"])

    def step(self, name: str) -> Step:
        """The step of the operation with this name; KeyError for another."""
        return {step.name: step for step in self.steps}[name]

    def loss_with(self, name: str, value: np.ndarray) -> float:
        """The loss with a tensor replaced: what depends on it is computed anew, the rest is as recorded."""
        changed = {name: value}
        for step in self.steps:
            if step.name != name and changed.keys() & set(step.operation.tensors.values()):
                tensors = {a: changed.get(of, self.tensors[of]) for a, of in step.operation.tensors.items()}
                changed[step.name] = layer_of(step.operation).forward(**step.arguments | tensors)[0]
        return float(changed.get("loss", self.tensors["loss"]))


def record(
    config: GPTConfig,
    params: Arrays,
    tokens: np.ndarray,
    targets: np.ndarray,
    noise: Noise | None = None,
    chain: Sequence[Operation] | None = None,
) -> Recording:
    """Run the model on tokens (B, T) with these targets (B, T), and back. `chain`: operations to run, in order, that
    are not the model's own; it ends with the loss."""
    dtype = params["tok_emb.weight"].dtype
    tensors: Arrays = {"tokens": tokens, "targets": targets, "positions": np.arange(tokens.shape[1]), **params}
    steps = []
    if chain is None:
        chain = operations(config, (tokens.shape[0], tokens.shape[1]), noise, dtype)
    for operation in chain:
        arguments = {argument: tensors[of] for argument, of in operation.tensors.items()} | operation.constants
        y, saved = layer_of(operation).forward(**arguments)
        tensors[operation.name] = np.asarray(y)
        steps.append(Step(operation, arguments, tensors[operation.name], saved, np.empty(0), {}))
    contributions: dict[str, list[tuple[str, str, np.ndarray]]] = {}
    for step in reversed(steps):
        operation = step.operation
        parts = contributions.get(operation.name)
        step.dy = _total(parts) if parts else np.array(1.0, dtype)  # of the loss itself
        returned = layer_of(operation).backward(step.dy, step.saved)
        returned = returned if isinstance(returned, tuple) else (returned,)
        step.gradients = dict(zip(operation.differentiable, returned, strict=False))
        for argument, gradient in step.gradients.items():
            contributions.setdefault(operation.tensors[argument], []).append((operation.name, argument, gradient))
    gradients = {of: _total(parts) for of, parts in contributions.items()} | {"loss": steps[-1].dy}
    return Recording(config, steps, tensors, gradients, contributions)


def _total(parts: list[tuple[str, str, np.ndarray]]) -> np.ndarray:
    """The sum of a tensor's gradients, added in the order of the model, which gives it the same bits."""
    sums: dict[str, np.ndarray] = {}
    for name, _, gradient in parts:
        of = name.removesuffix(".linear").removesuffix(".lora")  # a layer and its adapter are one to the model
        sums[of] = sums[of] + gradient if of in sums else gradient
    return functools.reduce(np.add, sums.values())


def trace_model(
    config: GPTConfig, params: Arrays, tokens: np.ndarray, targets: np.ndarray, noise: Noise | None = None
) -> Arrays:
    """A pass of `reference.model`: its tensors in the order of execution, those of the way back and the parameters'
    gradients with "d." before their names."""
    seen: Arrays = {}

    def keep(name: str, tensor: np.ndarray) -> None:
        seen[name] = np.array(tensor)

    logits, saved = model.forward(params, config, tokens, noise, keep)
    loss, saved_loss = cross_entropy.forward(logits, targets)
    keep("loss", np.asarray(loss))
    grads = model.backward(cross_entropy.backward(1.0, saved_loss), saved, trace=keep)
    return seen | {f"d.{name}": gradient for name, gradient in grads.items()}


def differences_to_model(recording: Recording, noise: Noise | None = None) -> tuple[int, list[str]]:
    """How many tensors of a pass of `reference.model` were compared with the recording's, and which have other bits."""
    config, tensors = recording.config, recording.tensors
    params = {name: tensors[name] for name in config.parameter_shapes()}
    seen = trace_model(config, params, tensors["tokens"], tensors["targets"], noise)
    ours = {**tensors, **{f"d.{name}": gradient for name, gradient in recording.gradients.items()}}
    return len(seen), [name for name, tensor in seen.items() if not np.array_equal(ours[name], tensor)]
