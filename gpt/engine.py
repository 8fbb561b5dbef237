"""What the trainer, the generator and the checks ask of an engine, and nothing else about it.

An engine holds one model, its gradients and its optimizer. Everything passes this line as NumPy arrays, under the
parameter names of `GPTConfig.parameter_shapes`, so that code above it never asks which engine it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from gpt.errors import UserError, is_installed
from reference.config import GPTConfig
from reference.torch_rng import StreamNoise

Arrays = dict[str, np.ndarray]
Noise = Callable[[int, int, tuple[int, ...], float], Any]  # (layer, site, shape, rate), see reference/philox.py
Trace = Callable[[str, np.ndarray], None]
OWN = "own."  # begins the names of what an engine keeps beside AdamW's memory for itself; all others overlook it
IGNORE = -100  # a target that does not count
STREAM_AGAIN = "checkpoint_activations: dropout_source torch draws other masks when asked again; choose philox"
PRECISIONS = ("full", "tf32", "bfloat16", "float16")


class Tensor(Protocol):
    """An array, or what becomes one when it is read from a file (gpt/weights/tensors.py)."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def __array__(self, dtype: Any = None) -> np.ndarray: ...


class Batch(NamedTuple):
    """Examples to learn from: at each position the inputs so far, and the token that comes next."""

    inputs: np.ndarray  # (B, T) int64
    targets: np.ndarray  # (B, T) int64, IGNORE where nothing is to be predicted

    @property
    def counted(self) -> int:
        """How many targets count in the mean loss."""
        return int(np.count_nonzero(self.targets != IGNORE))

    @property
    def examples(self) -> int:
        """How many texts these are."""
        return len(self.inputs)

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        return self.inputs.shape[0], self.inputs.shape[1]

    def part(self, examples: slice) -> Batch:
        """Some of the texts."""
        return Batch(self.inputs[examples], self.targets[examples])


class Unread:
    """A Batch of which each process reads its part only: what it is can be said without reading it.

    `read` gives the texts of a slice. There are `shape` (B, T) of them, and every target counts.
    """

    def __init__(self, read: Callable[[slice], Batch], shape: tuple[int, int]) -> None:
        self.part, self.shape = read, shape

    @property
    def inputs(self) -> np.ndarray:
        """(B, T) int64, read now."""
        return self.part(slice(None)).inputs

    @property
    def targets(self) -> np.ndarray:
        """(B, T) int64, read now."""
        return self.part(slice(None)).targets

    @property
    def counted(self) -> int:
        """How many targets count in the mean loss."""
        return self.shape[0] * self.shape[1]

    @property
    def examples(self) -> int:
        """How many texts these are."""
        return self.shape[0]


class Preferences(NamedTuple):
    """Pairs of answers to learn from: the chosen answers to P prompts, and after them the rejected ones, in order."""

    inputs: np.ndarray  # (2 P, T) int64, prompt and answer
    targets: np.ndarray  # (2 P, T) int64, IGNORE but where a token of the answer is to be predicted
    objective: Literal["dpo", "orpo"]  # reference/dpo.py, reference/orpo.py
    beta: float  # how much the preference weighs, see there
    reference: np.ndarray | None = None  # (2 P,) log-probabilities of the answers before training, which dpo needs

    @property
    def counted(self) -> int:
        """How many pairs count in the mean loss."""
        return len(self.inputs) // 2

    @property
    def examples(self) -> int:
        """How many pairs these are."""
        return self.counted

    @property
    def shape(self) -> tuple[int, int]:
        """(2 P, T)."""
        return self.inputs.shape[0], self.inputs.shape[1]

    def part(self, examples: slice) -> Preferences:
        """Some of the pairs."""

        def chosen(array: np.ndarray) -> np.ndarray:
            return np.concatenate([half[examples] for half in np.split(array, 2)])

        reference = None if self.reference is None else chosen(self.reference)
        return self._replace(inputs=chosen(self.inputs), targets=chosen(self.targets), reference=reference)

    @property
    def lengths(self) -> np.ndarray:
        """How many tokens each answer has, (2 P,)."""
        return np.count_nonzero(self.targets != IGNORE, axis=1)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW's settings. `decay`: every parameter decays ("all"), or those of two or more axes ("matrices").

    `trained`: patterns of the names of the parameters that learn, such as blocks.11.*; the others are frozen. Without
    any, all learn, or, in a model with low-rank adapters, these alone.
    """

    lr: float = 4e-4
    """Learning rate, the largest of its schedule."""
    betas: tuple[float, float] = (0.9, 0.999)
    """How much of the first and of the second moment stays in each step."""
    eps: float = 1e-8
    """What is added to the root of the second moment."""
    weight_decay: float = 0.1
    """Times the learning rate, the part of a parameter that each step takes away."""
    decay: Literal["all", "matrices"] = "all"
    """Which parameters decay. matrices: those of two or more axes."""
    trained: tuple[str, ...] = ()
    """Patterns of the names of the parameters that learn, such as blocks.11.*; none: all, or the adapters."""

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise UserError(f"lr: expected a positive learning rate, got {self.lr}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas: expected two numbers in [0, 1), got {self.betas}")
        if not self.eps > 0:
            raise UserError(f"eps: expected a positive number, got {self.eps}")
        if not self.weight_decay >= 0:
            raise UserError(f"weight_decay: expected a number of at least 0, got {self.weight_decay}")
        if self.decay not in ("all", "matrices"):
            raise UserError(f"decay: {self.decay!r} is not one of all, matrices")


class NonFiniteError(UserError):
    """A loss or a gradient that is infinite or not a number; the message names the first tensor where it shows."""


class KeyValueCache(Protocol):
    """What an engine remembers of the texts it has read, see reference/cache.py."""

    lengths: np.ndarray  # (B,) int64: tokens of each row

    def select(self, rows: np.ndarray) -> None:
        """Go on with these rows alone, indices (R,) in this order."""
        ...


Examples = Batch | Unread | Preferences


class TokenLogps(NamedTuple):
    """What a model thought of the targets of a batch."""

    logps: np.ndarray  # (B, T) float64 log-probabilities, 0 where the target is IGNORE
    best: np.ndarray  # (B, T) bool: no token was more probable; False where the target is IGNORE


class Engine(Protocol):
    """One model, its gradients and its optimizer. Arrays that come out may share the engine's memory: copy to keep."""

    name: str
    config: GPTConfig
    trained: tuple[str, ...]  # the parameters that learn; all others are frozen

    def loss(self, batch: Examples) -> float:
        """The mean loss without dropout: cross entropy over the counted targets, 0 if none counts, or over the pairs
        the objective of the preferences."""
        ...

    def accumulate(self, batch: Examples, weight: float = 1.0, noise: Noise | None = None, last: bool = True) -> float:
        """Add `weight` times the gradient of the mean loss; return that loss. `noise` None: without dropout.

        `last` is False where more follows before the step: processes that share it then need not add up yet.
        """
        ...

    def token_logps(self, batch: Examples) -> TokenLogps:
        """The log-probability of each target, without dropout."""
        ...

    def gradients(self) -> Arrays:
        """What has been accumulated since the last step, by parameter name."""
        ...

    def gradient_norm(self) -> float:
        """Global L2 norm of `gradients()`."""
        ...

    def step(self, lr: float, max_norm: float | None = None) -> float:
        """Clip to `max_norm`, take an AdamW step, forget the gradients; return the norm before clipping."""
        ...

    def forget_gradients(self) -> None:
        """Drop what has been accumulated: a step that will not be taken."""
        ...

    def logits(
        self, tokens: np.ndarray, cache: KeyValueCache | None = None, counts: np.ndarray | None = None
    ) -> np.ndarray:
        """tokens (B, T) -> logits (B, V) of the token that comes next, without dropout.

        With a cache the tokens continue what it holds, and are added to it. `counts` (B,): how many tokens of each row
        there are, where not T; the rest of the row is padding, with any id.
        """
        ...

    def new_cache(self, rows: int, capacity: int) -> KeyValueCache:
        """An empty key-value cache for `rows` texts of at most `capacity` tokens."""
        ...

    def parameters(self) -> Arrays:
        """All parameters by name. Of processes that share a model all ask, and the first gets them."""
        ...

    def load_parameters(self, params: Mapping[str, Tensor]) -> None:
        """Replace all parameters; a missing, unknown or misshapen one is a UserError, and nothing has changed."""
        ...

    def optimizer_state(self) -> Arrays:
        """AdamW's memory: arrays "m.NAME" and "v.NAME" for each parameter that learns, and "step", an int64 scalar.

        What else an engine needs to go on as it would have is there under names that begin with `OWN`. All processes
        ask, as for `parameters`.
        """
        ...

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Replace AdamW's memory; errors as in `load_parameters`."""
        ...

    def trace(self, batch: Examples, trace: Trace, noise: Noise | None = None) -> None:
        """Call `trace(name, tensor)` with every tensor of a forward and backward pass, in the order of execution.

        The gradients of frozen parameters' layers are among them.
        """
        ...


def create_engine(
    name: str,
    config: GPTConfig,
    params: Mapping[str, Tensor],
    optimizer: OptimizerConfig | None = None,
    dtype: str = "float32",
    device: str = "auto",
    precision: str = "full",
    compile: bool = False,
    parallel: Literal["ddp", "fsdp"] | None = None,
    checkpoint_activations: bool = False,
) -> Engine:
    """The engine "numpy", "torch" or "triton" holding a copy of `params`; "auto" is torch where it is installed.

    "triton" is PyTorch's model on the kernels (gpt/ops.py). `dtype`, of parameters and gradients, is float32 or
    float64. `precision` bfloat16 or float16 computes in that type where torch.autocast does, float16 with its gradients
    scaled; tf32 lets GPUs round the factors of float32 products to 10 bits, in the whole process. `compile` is
    torch.compile, of the model and of the optimizer's step, or of each block where `parallel` is fsdp. These two and
    `device` are not for the NumPy engine, which runs on the CPU. `parallel` lets the processes that torchrun started
    share each batch (gpt/distributed_engine.py). `checkpoint_activations` keeps each block's input alone, and computes
    the rest again in the backward pass.
    """
    if dtype not in ("float32", "float64"):
        raise UserError(f"dtype: {dtype!r} is not one of float32, float64")
    if precision not in PRECISIONS:
        raise UserError(f"precision: {precision!r} is not one of {', '.join(PRECISIONS)}")
    if precision != "full" and dtype == "float64":
        raise UserError(f"precision: {precision} is for float32; with --dtype float64 expected full")
    if name == "auto":
        name = "torch" if is_installed("torch") else "numpy"
    optimizer = optimizer or OptimizerConfig()
    if name == "numpy":
        if device not in ("auto", "cpu"):
            raise UserError(f"device: the numpy engine runs on the cpu, not on {device!r}; choose --engine torch")
        if parallel:
            raise UserError("engine: numpy trains in one process; choose --engine torch, or start it without torchrun")
        if precision != "full" or compile:
            raise UserError("precision, compile: the numpy engine computes in its dtype, and compiles nothing")
        from gpt.numpy_engine import NumpyEngine

        return NumpyEngine(config, params, optimizer, dtype, checkpoint_activations)
    if name in ("torch", "triton"):
        from gpt.errors import require

        require("torch", extra="torch")
        if parallel:
            from gpt.distributed_engine import ENGINES

            return ENGINES[parallel](
                config, params, optimizer, dtype, device, name, precision, compile, checkpoint_activations
            )
        from gpt.torch_engine import TorchEngine

        return TorchEngine(config, params, optimizer, dtype, device, name, precision, compile, checkpoint_activations)
    raise UserError(f"engine: {name!r} is not one of numpy, torch, triton, auto")


def check_tokens(tokens: np.ndarray, config: GPTConfig, past: int = 0) -> None:
    """Refuse what is not (B, T) integers of the vocabulary, T and the `past` of at most the context length together."""
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"tokens: expected integers of shape (batch, time), got {tokens.dtype} {tokens.shape}")
    if not len(tokens):
        raise UserError("tokens: expected at least one text, got none")
    if not 0 < tokens.shape[1] <= config.context_length - past:
        raise UserError(f"tokens: expected 1 to {config.context_length - past} positions, got {tokens.shape[1]}")
    if tokens.size and not (0 <= tokens.min() and tokens.max() < config.vocab_size):
        wrong = tokens[(tokens < 0) | (tokens >= config.vocab_size)].flat[0]
        raise UserError(f"tokens: id {wrong} is outside the vocabulary, expected 0 <= id < {config.vocab_size}")


def trained_names(config: GPTConfig, patterns: Iterable[str] = ()) -> tuple[str, ...]:
    """The parameters that learn, see OptimizerConfig. UserError for a pattern that none has."""
    names = tuple(config.parameter_shapes())
    patterns = tuple(patterns) or (("*.lora_a", "*.lora_b") if config.lora else ("*",))
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"trained: no parameter is named {pattern!r}; there are {', '.join(names[:3])}, ...")
    return tuple(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))


def check_batch(batch: Examples, config: GPTConfig) -> None:
    """`check_tokens` for the inputs, and the same for the targets that count; of preferences, that they are pairs."""
    check_tokens(batch.inputs, config)
    if batch.targets.shape != batch.inputs.shape:
        raise UserError(f"targets: expected the inputs' shape {batch.inputs.shape}, got {batch.targets.shape}")
    if not np.issubdtype(batch.targets.dtype, np.integer):
        raise UserError(f"targets: expected integers, got {batch.targets.dtype}")
    counted = batch.targets[batch.targets != IGNORE]
    if counted.size and not (0 <= counted.min() and counted.max() < config.n_outputs):
        wrong = counted[(counted < 0) | (counted >= config.n_outputs)].flat[0]
        kind = "the vocabulary" if config.n_outputs == config.vocab_size else "the classes"
        raise UserError(f"targets: id {wrong} is outside {kind}, expected 0 <= id < {config.n_outputs}")
    if isinstance(batch, Preferences):
        _check_pairs(batch)


def _check_pairs(batch: Preferences) -> None:
    rows = len(batch.inputs)
    if batch.objective not in ("dpo", "orpo"):
        raise UserError(f"objective: {batch.objective!r} is not one of dpo, orpo")
    if rows % 2:
        raise UserError(f"preferences: expected pairs, as many chosen as rejected answers, got {rows} answers")
    if not (batch.targets != IGNORE).any(axis=1).all():
        raise UserError("preferences: an answer has no token")
    if batch.objective == "dpo" and (batch.reference is None or batch.reference.shape != (rows,)):
        raise UserError(f"dpo: expected the {rows} answers' log-probabilities before training as `reference`")


def check_noise(noise: Noise | None, checkpoint_activations: bool) -> None:
    """Refuse noise that would be other noise where activations are computed a second time."""
    if checkpoint_activations and isinstance(noise, StreamNoise):
        raise UserError(STREAM_AGAIN)


def check_arrays(given: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a mapping whose names or shapes are not exactly these, but for what is some engine's `OWN`."""
    missing = [name for name in shapes if name not in given]
    unknown = [name for name in given if name not in shapes and not name.startswith(OWN)]
    if missing or unknown:
        named = {"missing": missing, "unexpected": unknown}
        listed = "; ".join(f"{kind} {', '.join(names)}" for kind, names in named.items() if names)
        raise UserError(f"parameters do not fit the model: {listed}")
    for name, shape in shapes.items():
        if tuple(given[name].shape) != tuple(shape):
            raise UserError(f"{name}: expected shape {tuple(shape)}, got {tuple(given[name].shape)}")


def optimizer_shapes(config: GPTConfig, trained: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what `Engine.optimizer_state` holds, of a model whose parameters `trained` learn."""
    shapes = config.parameter_shapes()
    return {"step": ()} | {f"{moment}.{name}": shapes[name] for moment in "mv" for name in trained}


def first_non_finite(engine: Engine, batch: Examples, noise: Noise | None) -> str:
    """The name of the first tensor of a pass, in execution order, that is not finite."""
    found: list[str] = []

    def look(name: str, tensor: np.ndarray) -> None:
        if not found and not np.isfinite(tensor).all():
            found.append(name)

    for name, array in engine.parameters().items():
        look(name, array)
    with np.errstate(all="ignore"):
        if not found:
            engine.trace(batch, look, noise)
    return found[0] if found else "loss"
