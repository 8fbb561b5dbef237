"""The whole model, by hand against central differences, and the two engines against each other.

A key's bias is handled by name. It adds the same number to all of a query's scores, which softmax takes away again, so
that its true gradient is 0 and both engines hold rounding: that is measured against the gradient of the key's weight.
AdamW divides rounding by its own size and makes steps of it, in each engine other ones; neither the loss nor any other
gradient depends on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from gpt.engine import IGNORE, Arrays, Batch, Engine, Examples, Noise, OptimizerConfig, create_engine
from gpt.parity.gates import ALGEBRA, Result, distance, error_of
from gpt.parity.laws import DIFFERENCES, EXACT, relative
from reference import cross_entropy, model
from reference.config import GPTConfig
from reference.gradcheck import numeric_gradient
from reference.lora import LoRA
from reference.philox import PhiloxNoise
from reference.rope import Scaling

KEY_BIAS = "attn.key.bias"
KEY_BIAS_NOTE = "true gradient 0, measured against its weight's"
LOCKSTEP = {"float64": 1e-12, "float32": 1e-6}  # the loss, at every step

# Between them: tied and untied, grouped heads and not, every bias on and off, all activations, norms and positions,
# dropout at all places, adapters and frozen parameters.
CONFIGS: dict[str, GPTConfig] = {
    "tied": GPTConfig(
        vocab_size=37, context_length=16, emb_dim=20, n_layers=2, n_heads=3, head_dim=7, mlp_dim=33, qkv_bias=True,
        tie_embeddings=True, emb_dropout=0.1, shortcut_dropout=0.15, attn_dropout=0.2,
    ),
    "untied": GPTConfig(
        vocab_size=37, context_length=16, emb_dim=20, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=7, mlp_dim=33,
        norm_eps=1e-3, mlp="gelu", qkv_bias=True, head_bias=True,
        emb_dropout=0.1, shortcut_dropout=0.15, attn_dropout=0.2,
    ),
    "llama": GPTConfig(
        vocab_size=37, context_length=16, emb_dim=20, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=8, mlp_dim=33,
        norm="rms_norm", norm_eps=1e-3, mlp="swiglu", position="rope", rope_theta=100.0, rope_interleaved=True,
        rope_scaling=Scaling(4.0, 1.0, 4.0, 8), bias=False, emb_dropout=0.1, shortcut_dropout=0.15, attn_dropout=0.2,
    ),
    "adapted": GPTConfig(
        vocab_size=37, context_length=16, emb_dim=20, n_layers=2, n_heads=3, head_dim=7, mlp_dim=33, qkv_bias=True,
        tie_embeddings=True, lora=LoRA(rank=3, alpha=5.0, dropout=0.2),
        emb_dropout=0.1, shortcut_dropout=0.15, attn_dropout=0.2,
    ),
    "classifier": GPTConfig(
        vocab_size=37, context_length=16, emb_dim=20, n_layers=3, n_heads=3, head_dim=7, mlp_dim=33, head_bias=True,
        n_outputs=5, lora=LoRA(rank=2, alpha=1.5, scaling="alpha", targets=("value", "mlp")),
        emb_dropout=0.1, shortcut_dropout=0.15, attn_dropout=0.2,
    ),
    "no-bias": GPTConfig(
        vocab_size=37, context_length=16, emb_dim=20, n_layers=2, n_heads=3, mlp_dim=33, head_dim=7, bias=False,
        emb_dropout=0.1, shortcut_dropout=0.15, attn_dropout=0.2,
    ),
}  # fmt: skip
OPTIMIZERS = {
    "tied": OptimizerConfig(decay="matrices"),
    "untied": OptimizerConfig(betas=(0.8, 0.95)),
    "classifier": OptimizerConfig(trained=("blocks.1.*", "blocks.2.*.lora_?", "final_norm.*", "head.*")),
}
MAX_NORM = 0.7  # below the first steps' norms, so that they are clipped
SEED = 7
KERNEL_STEPS = 3  # each takes seconds in Triton's interpreter


def parameters(config: GPTConfig) -> Arrays:
    """Weights that keep activations of size 1; biases and norm weights neither 0, nor 1, nor small."""
    rng = np.random.default_rng(SEED)
    params = {}
    for name, shape in config.parameter_shapes().items():
        if len(shape) == 2:
            params[name] = rng.normal(size=shape) / (1 if "emb" in name else np.sqrt(shape[1]))
        else:
            params[name] = rng.uniform(0.4, 1.6, shape) * rng.choice([-1, 1], shape)
    return params


def batch(config: GPTConfig, step: int = 0) -> Batch:
    """Tokens that follow each other by a rule, so that there is something to learn; a few targets do not count."""
    rng = np.random.default_rng([SEED, step])
    tokens = (rng.integers(config.vocab_size, size=(5, 1)) + 3 * np.arange(14)) % config.vocab_size
    targets = np.where(rng.random((5, 13)) < 0.2, IGNORE, tokens[:, 1:] % config.n_outputs)
    return Batch(tokens[:, :-1], targets)


def noise(step: int = 0, first_example: int = 0) -> Noise:
    """Dropout's noise for a step, for a micro-batch that starts at this example."""
    return PhiloxNoise(SEED, step, first_example)


def engines(name: str, dtype: str, other: str = "torch", device: str = "cpu") -> tuple[Engine, Engine]:
    """The NumPy engine and another one, on the CPU unless told, with the same parameters."""
    config, optimizer = CONFIGS[name], OPTIMIZERS.get(name)
    params = parameters(config)
    ours = create_engine("numpy", config, params, optimizer, dtype)
    return ours, create_engine(other, config, params, optimizer, dtype, device)


def _label(name: str, both: tuple[Engine, Engine]) -> str:
    """A model's name in results: with the engine that NumPy's is held against, where that is not PyTorch's."""
    return f"model {name}" if both[1].name == "torch" else f"{both[1].name} model {name}"


def differences(name: str) -> Iterator[Result]:
    """Each gradient of the NumPy model, dropout on, against central differences: some entries, and the largest."""
    config = CONFIGS[name]
    params, (inputs, targets), rng = parameters(config), batch(config), np.random.default_rng(0)

    def loss(tensor: str, value: np.ndarray) -> float:
        logits, _ = model.forward({**params, tensor: value}, config, inputs, noise(), keep=False)
        return float(cross_entropy.forward(logits, targets)[0])

    _, gradients = model_gradients(config, params, Batch(inputs, targets), noise())
    for tensor, x in params.items():
        gradient = gradients[tensor]
        flat = {int(np.argmax(np.abs(gradient))), *rng.choice(x.size, 4, replace=False).tolist()}
        indices = [tuple(map(int, np.unravel_index(index, x.shape))) for index in flat]
        numeric = numeric_gradient(partial(loss, tensor), x, indices=indices)
        got, true = (np.array([array[index] for index in indices]) for array in (gradient, numeric))
        yield _gradient_result(name, "differences", "float64", tensor, got, true, gradients, DIFFERENCES)


def model_gradients(config: GPTConfig, params: Arrays, batch: Batch, noise: Noise | None) -> tuple[float, Arrays]:
    """Loss and gradients by hand."""
    logits, saved = model.forward(params, config, batch.inputs, noise)
    loss, saved_loss = cross_entropy.forward(logits, batch.targets)
    return float(loss), model.backward(cross_entropy.backward(1.0, saved_loss), saved)


def trace(name: str) -> Iterator[Result]:
    """Every tensor of a pass forward and backward, in the order of execution, in float64."""
    yield from compare_traces(name, "trace", engines(name, "float64"), batch(CONFIGS[name]), noise(), EXACT)


def compare_traces(
    name: str, gate: str, both: tuple[Engine, Engine], batch: Batch, noise: Noise, bound: float
) -> Iterator[Result]:
    """Hold the tensors of two engines against each other, until their names part."""
    ours, theirs = (traced(engine, batch, noise) for engine in both)
    dtype = str(theirs[0][1].dtype)
    for tensor, got, true, note in paired(ours, theirs, both[1].name):
        error, allowed = (np.inf, 0.0) if note else (error_of(got, true), bound)
        yield Result(_label(name, both), gate, dtype, tensor, error, allowed, note)


def traced(engine: Engine, batch: Examples, noise: Noise | None) -> list[tuple[str, np.ndarray]]:
    """Every tensor of a pass forward and backward with its name, in the order of execution; copies."""
    tensors: list[tuple[str, np.ndarray]] = []
    engine.trace(batch, lambda tensor, value: tensors.append((tensor, np.array(value))), noise)
    return tensors


def paired(
    ours: Sequence[tuple[str, np.ndarray]], theirs: Sequence[tuple[str, np.ndarray]], other: str
) -> Iterator[tuple[str, np.ndarray, np.ndarray, str]]:
    """The tensors of two traces side by side: name, ours, theirs, "".

    Where their names part, or one ends before the other, the last that is given has a note that says so.
    """
    for (tensor, got), (expected, true) in zip(ours, theirs, strict=False):
        if tensor != expected:
            yield tensor, got, true, f"the {other} engine has {expected} here"
            return
        yield tensor, got, true, ""
    if len(ours) != len(theirs):
        yield "length", ours[-1][1], theirs[-1][1], f"{len(ours)} tensors, and {len(theirs)} in the {other} engine"


def gradients(name: str) -> Iterator[Result]:
    """Loss and every gradient by name, dropout on, float64; and in float32 at most 3x PyTorch's rounding error."""
    ours, theirs = engines(name, "float64")
    here, at = batch(CONFIGS[name]), noise()
    loss, true_loss = ours.accumulate(here, noise=at), theirs.accumulate(here, noise=at)
    yield Result(f"model {name}", "gradients", "float64", "loss", relative(loss - true_loss, true_loss), EXACT)
    truth = theirs.gradients()
    for tensor, true in truth.items():
        yield _gradient_result(name, "gradients", "float64", tensor, ours.gradients()[tensor], true, truth, EXACT)

    rounded = engines(name, "float32")
    ours.load_parameters(rounded[0].parameters())  # the truth is that of the rounded parameters
    ours.forget_gradients()
    for engine in (ours, *rounded):
        engine.accumulate(here, noise=at)
    errors = [distance(_joined(engine.gradients()), _joined(ours.gradients())) for engine in rounded]
    yield Result(f"model {name}", "gradients", "float32", "all, as multiple of PyTorch's", errors[0] / errors[1], 3.0)


def _joined(arrays: Arrays) -> np.ndarray:
    return np.concatenate([arrays[name].ravel() for name in sorted(arrays)])


def _gradient_result(
    name: str, gate: str, case: str, tensor: str, got: np.ndarray, true: np.ndarray, truth: Arrays, bound: float
) -> Result:
    """The error relative to the true tensor's largest entry; the key's bias by name."""
    note = KEY_BIAS_NOTE if tensor.endswith(KEY_BIAS) else ""
    error = error_of(got, true, truth[measured_by(tensor)])
    return Result(f"model {name}", gate, case, tensor, error, bound, note)


def measured_by(tensor: str) -> str:
    """The parameter whose gradient an error of this one's is relative to: itself, but for a key's bias."""
    return tensor.removesuffix("bias") + "weight" if tensor.endswith(KEY_BIAS) else tensor


def optimizer(name: str) -> Iterator[Result]:
    """Norm, parameters and moments by name after each of three clipped AdamW steps, the key's bias left out."""
    both = engines(name, "float64")
    for step in range(3):
        norms = [_step(engine, step)[1] for engine in both]
        where = f"model {name}", "optimizer", f"step {step}"
        yield Result(*where, "norm", relative(norms[0] - norms[1], norms[1]), EXACT)
        ours, theirs = ({**engine.parameters(), **engine.optimizer_state()} for engine in both)
        for tensor, true in theirs.items():
            if not tensor.endswith(KEY_BIAS):
                yield Result(*where, tensor, error_of(ours[tensor], true), EXACT)


def _step(engine: Engine, step: int, lr: float = 1e-3) -> tuple[float, float]:
    """One training step from two micro-batches, dropout on: loss, and norm before clipping."""
    whole, loss = batch(engine.config, step), 0.0
    for examples in (slice(0, 2), slice(2, None)):
        part = Batch(whole.inputs[examples], whole.targets[examples])
        weight = part.counted / whole.counted
        loss += weight * engine.accumulate(part, weight, noise(step, examples.start))
    return loss, engine.step(lr, MAX_NORM)


def on_kernels(name: str, device: str, steps: int = KERNEL_STEPS) -> Iterator[Result]:
    """The model on the kernels against the NumPy engine: every tensor of a pass, then some steps in lockstep."""
    if device == "cpu":
        both = engines(name, "float64", "triton")
        yield from compare_traces(name, "trace", both, batch(CONFIGS[name]), noise(), ALGEBRA)
        yield from lockstep(name, "float64", steps, both)
    yield from lockstep(name, "float32", steps, engines(name, "float32", "triton", device))


def lockstep(name: str, dtype: str, steps: int, both: tuple[Engine, Engine] | None = None) -> Iterator[Result]:
    """Train two engines with dropout on; where their losses part, name the first tensor that differs."""
    both, bound, gate, worst = both or engines(name, dtype), LOCKSTEP[dtype], f"lockstep {dtype}", 0.0
    for step in range(steps):
        before = [{tensor: value.copy() for tensor, value in engine.parameters().items()} for engine in both]
        losses = [_step(engine, step)[0] for engine in both]
        error = relative(losses[0] - losses[1], losses[1])
        if not error <= bound:
            for engine, params in zip(both, before, strict=True):
                engine.load_parameters(params)
            note = first_difference(name, both, step, bound)
            yield Result(_label(name, both), gate, f"step {step}", "loss", error, bound, note)
            return
        worst = max(worst, error)
    yield Result(_label(name, both), gate, f"{steps} steps", "loss", worst, bound)


def first_difference(name: str, both: tuple[Engine, Engine], step: int, bound: float) -> str:
    """Which tensor is the first to differ in this step: a parameter that it began with, or one computed in it."""
    ours, theirs = (engine.parameters() for engine in both)
    for tensor, true in theirs.items():
        error = error_of(ours[tensor], true)
        if not tensor.endswith(KEY_BIAS) and not error <= bound:
            return f"first differs parameter {tensor}, by {error:.2g}, updated in step {step - 1}"
    for result in compare_traces(name, "lockstep", both, batch(both[0].config, step), noise(step), bound):
        if not result.passed:
            return f"first differs {result.tensor}, by {result.error:.2g}"
    return "no tensor of the pass differs by as much"


# What is checked of each model: name -> (function, package that it needs).
CHECKS: dict[str, tuple[Callable[[str], Iterator[Result]], str]] = {
    "differences": (differences, ""),
    "trace": (trace, "torch"),
    "gradients": (gradients, "torch"),
    "optimizer": (optimizer, "torch"),
}
