"""What a training run is made from, as plain dataclasses that YAML and a command line can fill.

Field names are unique across the nested dataclasses, so ``epochs`` alone says as much as ``train.epochs``. `RunConfig`
names everything that a run on a text is built from, and shares `ModelConfig` with the runs that finetune; `TrainConfig`
alone is what the trainer reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from gpt.engine import OptimizerConfig
from gpt.errors import UserError

__all__ = ["LoaderConfig", "ModelConfig", "OptimizerConfig", "RunConfig", "TrainConfig"]


@dataclass
class LoaderConfig:
    """How a text becomes batches of (inputs, targets)."""

    sampling: Literal["windows", "random"] = "windows"
    """windows: sliding windows over the text, an epoch sees each once. random: batches at random positions."""
    batch_size: int = 2
    """Examples in a micro-batch."""
    max_length: int | None = None
    """Tokens in an example; none: the model's context length."""
    stride: int | None = None
    """Tokens from the start of one window to the next; none: max_length, no overlap."""
    shuffle: bool = True
    """Whether the training windows come in a new random order each epoch."""
    drop_last: bool = True
    """Whether a last, smaller training batch is left out."""
    train_fraction: float = 0.9
    """The part of the text, from its beginning, that is trained on: of a text's characters, of a token file's tokens.
    The rest is held out for validation."""

    def __post_init__(self) -> None:
        _require(self.sampling in ("windows", "random"), "sampling", self.sampling, "windows or random")
        _require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        _require(self.max_length is None or self.max_length >= 1, "max_length", self.max_length, "at least 1")
        _require(self.stride is None or self.stride >= 1, "stride", self.stride, "at least 1")
        _require(0 < self.train_fraction < 1, "train_fraction", self.train_fraction, "between 0 and 1")


@dataclass
class TrainConfig:
    """How long the trainer goes on, with which learning rate, and when it evaluates, samples and saves.

    A step is one update of the parameters, from `accumulation` micro-batches (fewer at the end of an epoch).
    """

    epochs: int | None = None
    """Passes over the training loader; none and no `steps`: 1."""
    steps: int | None = None
    """Steps altogether, instead of `epochs`."""
    accumulation: int = 1
    """Micro-batches to a step, each weighted by its share of the step's counted tokens."""
    seed: int = 123
    """Of the initial parameters, the order of the data and dropout."""
    dropout_source: Literal["philox", "torch"] = "philox"
    """philox: a mask depends on seed, step, layer and element alone. torch: masks follow PyTorch's random stream."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Learning rate after the warmup: the optimizer's `lr` throughout, or from there down to `min_lr` by a cosine."""
    warmup_steps: int = 0
    """Steps that raise the learning rate linearly from `initial_lr` to the optimizer's `lr`."""
    initial_lr: float = 0.0
    """Learning rate of the warmup's first step."""
    min_lr: float | None = None
    """Where the cosine ends; none: a tenth of `lr`."""
    max_norm: float | None = 1.0
    """Gradients are scaled down to this global norm; none: never."""
    clip_from_step: int = 0
    """The first step, counted from 0, whose gradients are clipped."""
    eval_every: int = 50
    """Steps from one evaluation to the next; 0: never."""
    eval_batches: int | None = 5
    """Batches of each loader that an evaluation averages over; none: all."""
    first_eval: Literal["zero", "one"] = "zero"
    """Whether steps are counted from 0, so that the first is evaluated, or from 1. Evaluations fall on multiples of
    `eval_every`."""
    sample_every: int | None = None
    """Steps from one text sample to the next; none: one at the end of each epoch; 0: never."""
    save_every: int | None = None
    """Steps from one checkpoint to the next; none: one at the end of each epoch; 0: only at the end of the run."""
    study_every: int | None = None
    """Steps from one snapshot of the parameters to the next, to study how they grew (twingrad study, attention). All
    are kept, the first is of before training; none: no snapshots."""
    save_best: bool = True
    """Whether to keep the parameters that had the lowest validation loss."""

    def __post_init__(self) -> None:
        _require(self.epochs is None or self.steps is None, "steps", self.steps, "epochs or steps, not both")
        _require(self.study_every is None or self.study_every >= 1, "study_every", self.study_every, "at least 1")
        for name in ("epochs", "steps", "sample_every", "save_every"):
            _require(getattr(self, name) is None or getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        for name in ("warmup_steps", "clip_from_step", "eval_every", "initial_lr", "seed"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        _require(self.accumulation >= 1, "accumulation", self.accumulation, "at least 1")
        _require(self.eval_batches is None or self.eval_batches >= 1, "eval_batches", self.eval_batches, "at least 1")
        _require(self.min_lr is None or self.min_lr >= 0, "min_lr", self.min_lr, "at least 0")
        _require(self.max_norm is None or self.max_norm > 0, "max_norm", self.max_norm, "more than 0")
        _require(self.seed < 2**64, "seed", self.seed, "less than 2**64")
        cosine, warm = self.schedule == "cosine", self.warmup_steps > 0
        _require(self.min_lr is None or cosine, "min_lr", self.min_lr, "none, where the schedule is constant")
        _require(self.initial_lr == 0 or warm, "initial_lr", self.initial_lr, "0, where there are no warmup_steps")
        for name, choices in (
            ("dropout_source", ("philox", "torch")),
            ("schedule", ("constant", "cosine")),
            ("first_eval", ("zero", "one")),
        ):
            _require(getattr(self, name) in choices, name, getattr(self, name), " or ".join(choices))


@dataclass
class ModelConfig:
    """What is trained, on which engine, and where the results go."""

    tokenizer: str | None = None
    """gpt2, bytes, simple-v1, simple-v2, or a file .model or .json, as `twingrad tokenizer train` writes it; none: the
    weights' or the token file's own, else bytes."""
    preset: str = "bytes-small"
    """The model's architecture, a name in reference.config.PRESETS."""
    model: dict[str, Any] = field(default_factory=dict)
    """Fields of GPTConfig that differ from the preset. The vocabulary size follows the tokenizer unless set here."""
    weights: str | None = None
    """Begin with these weights, a folder, a file or a name (weights list); their model then stands for the preset, and
    their tokenizer for the tokenizer."""
    engine: Literal["auto", "numpy", "torch", "triton"] = "auto"
    """auto: PyTorch where it is installed, else NumPy. triton: PyTorch on the kernels."""
    dtype: Literal["float32", "float64"] = "float32"
    """Of parameters, gradients and moments."""
    precision: Literal["full", "tf32", "bfloat16", "float16"] = "full"
    """What PyTorch computes in: full is `dtype`, tf32 rounds factors on GPUs, the others are its autocast, with
    float16's gradients scaled."""
    compile: bool = False
    """Whether PyTorch compiles the model and the optimizer's step, under fsdp each block (torch.compile), which takes a
    minute and pays on GPUs and in long runs."""
    checkpoint_activations: bool = False
    """Whether a block's activations are computed again in the backward pass instead of kept: a third more work, a
    fraction of the memory."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How processes that torchrun started share a model: ddp, each has the whole of it; fsdp, each a part."""
    timeout: float = 600.0
    """Seconds that such a process waits for another at a step before it gives it up."""
    init: Literal["book", "gpt2"] = "gpt2"
    """book: PyTorch's default initialisation. gpt2: normal 0.02 with scaled residual projections."""
    out: str = "runs/latest"
    """The run's folder: config.yaml, log.csv, loss.png, loss.pdf and the checkpoints."""
    log_to: tuple[str, ...] = ()
    """Where the losses go beside log.csv: wandb, tensorboard. May be given several times."""
    resume: bool = False
    """Whether to go on with the run in `out` from its last checkpoint."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        for name, choices in (
            ("engine", ("auto", "numpy", "torch", "triton")),
            ("dtype", ("float32", "float64")),
            ("parallel", ("ddp", "fsdp")),
            ("init", ("book", "gpt2")),
        ):
            _require(getattr(self, name) in choices, name, getattr(self, name), " or ".join(choices))
        _require(bool(self.out), "out", self.out, "the name of a folder")
        _require(0 < self.timeout <= 1e9, "timeout", self.timeout, "more than 0, at most 1e9")


@dataclass
class RunConfig(ModelConfig):
    """Train a GPT: on which text, with which tokenizer, model and engine, and where the results go."""

    data: str = "python-stdlib"
    """A name of the data catalogue, or the path of a text file, a token file, or a folder of .txt files."""
    prompt: str | None = None
    """Where text samples begin; none: with a few words of the held-out text."""
    sample_tokens: int = 50
    """Tokens in a text sample, each the most probable one."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(bool(self.data), "data", self.data, "a name or a path")
        _require(self.sample_tokens >= 1, "sample_tokens", self.sample_tokens, "at least 1")


def _require(condition: bool, name: str, value: Any, expected: str) -> None:
    if not condition:
        raise UserError(f"{name}: expected {expected}, got {value!r}")
