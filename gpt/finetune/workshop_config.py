"""The flags of LitGPT's commands finetune_lora and finetune_full, as plain dataclasses, and what is wrong with them.

Names, groups and defaults are LitGPT's, also where this project has other ones; so is the optimizer's default, which is
torch.optim.AdamW's own. What cannot be done here (several devices, quantized weights, other data modules) is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from gpt.engine import IGNORE
from gpt.errors import UserError
from gpt.finetune.config import FinetuneOptimizer
from gpt.options import did_you_mean
from reference.lora import LoRA

__all__ = ["MIN_LR", "STYLES", "WARMUP", "FinetuneFull", "FinetuneLoRA"]

WARMUP, MIN_LR = 100, 6e-5
STYLES = {"alpaca": "alpaca", "phi-3": "phi3", "phi3": "phi3", "default": "plain", "plain": "plain"}
FIXED_EXAMPLES = ("first", "random")


@dataclass
class DataConfig:
    """What is learnt from."""

    class_path: str = "JSON"
    """The data module, of which there is JSON alone; also as --data JSON."""
    json_path: str = ""
    """A file of entries, a JSON array or an object a line, with "instruction", "output" and perhaps "input"; or a
    folder with train.json and val.json (or .jsonl)."""
    val_split_fraction: float | None = None
    """The part of a file's entries for validation, drawn with data.seed; none: 0.05."""
    mask_prompt: bool = False
    """Whether only the answer's tokens are learnt, and not the prompt's."""
    prompt_style: Literal["alpaca", "phi-3", "phi3", "default", "plain"] = "alpaca"
    """How an instruction is put to the model. default and plain: as it is."""
    ignore_index: int = IGNORE
    """The target that does not count, of which there is -100 alone."""
    seed: int = 42
    """Of the draw of the validation entries, and of the order of the training entries."""

    def __post_init__(self) -> None:
        if self.class_path != "JSON":
            close = did_you_mean(self.class_path, ("JSON",))
            raise UserError(f"data: {self.class_path!r} is not available, expected JSON and --data.json_path{close}")
        if not self.json_path:
            raise UserError("data.json_path: expected a file of entries, or a folder with train.json and val.json")
        if self.val_split_fraction is not None and not 0 < self.val_split_fraction < 1:
            raise UserError(f"data.val_split_fraction: expected between 0 and 1, got {self.val_split_fraction}")
        if self.ignore_index != IGNORE:
            raise UserError(f"data.ignore_index: expected {IGNORE}, got {self.ignore_index}")
        _at_least("data.seed", self.seed, 0)


@dataclass
class TrainConfig:
    """How long, in which batches, and at which learning rate."""

    save_interval: int | None = 1000
    """Steps from one checkpoint to the next, of which the last is kept; none: one at the end of the run."""
    log_interval: int = 1
    """Iterations, a micro-batch each, from one printed line and one row of metrics.csv to the next."""
    global_batch_size: int = 16
    """Examples in a step, which is one update of the parameters."""
    micro_batch_size: int = 1
    """Examples that go through the model together."""
    lr_warmup_steps: int | None = None
    """Steps that raise the learning rate from 0; none: 100, unless there is lr_warmup_fraction."""
    lr_warmup_fraction: float | None = None
    """The same as a part of an epoch's steps, instead."""
    epochs: int = 5
    """Passes over the training entries."""
    max_tokens: int | None = None
    """Only so many steps as surely read no more tokens, each counted as global_batch_size times the tokens of the
    longest training entry (of max_seq_length, if that is less), with padding."""
    max_steps: int | None = None
    """Only so many steps."""
    max_seq_length: int | None = None
    """Tokens of an example that are read, what is longer being cut; none: the model's context."""
    max_norm: float | None = None
    """Gradients are scaled down to this global norm; none: never."""
    min_lr: float | None = None
    """Where the cosine that follows the warmup ends; none: 6e-5, or the learning rate where that is less."""

    def __post_init__(self) -> None:
        for name in ("log_interval", "global_batch_size", "micro_batch_size", "epochs"):
            _at_least(f"train.{name}", getattr(self, name), 1)
        for name in ("save_interval", "max_tokens", "max_steps", "max_seq_length"):
            _at_least(f"train.{name}", getattr(self, name), 1)
        for name in ("lr_warmup_steps", "min_lr"):
            _at_least(f"train.{name}", getattr(self, name), 0)
        if self.global_batch_size % self.micro_batch_size:
            raise UserError(
                f"train.global_batch_size: expected a multiple of train.micro_batch_size {self.micro_batch_size}, "
                f"got {self.global_batch_size}"
            )
        if self.lr_warmup_fraction is None:
            self.lr_warmup_steps = WARMUP if self.lr_warmup_steps is None else self.lr_warmup_steps
        elif self.lr_warmup_steps is not None:
            raise UserError("train.lr_warmup_fraction: expected it or train.lr_warmup_steps, got both")
        elif not 0 <= self.lr_warmup_fraction <= 1:
            raise UserError(f"train.lr_warmup_fraction: expected between 0 and 1, got {self.lr_warmup_fraction}")
        if self.max_norm is not None and not self.max_norm > 0:
            raise UserError(f"train.max_norm: expected more than 0, got {self.max_norm}")


@dataclass
class EvalConfig:
    """What is measured and shown besides."""

    interval: int = 100
    """Steps from one validation to the next, each with an answer that is shown; 0: none."""
    max_new_tokens: int = 100
    """Tokens of that answer, at most."""
    max_iters: int = 100
    """Batches that a validation averages over, at most; the initial and the final one take all."""
    initial_validation: bool = False
    """Whether to validate before training too."""
    final_validation: bool = True
    """Whether to validate when training is done."""
    evaluate_example: str = "first"
    """The validation entry that is answered: first, random (another each time), or its number, counted from 0."""

    def __post_init__(self) -> None:
        _at_least("eval.interval", self.interval, 0)
        _at_least("eval.max_new_tokens", self.max_new_tokens, 0)
        _at_least("eval.max_iters", self.max_iters, 1)
        if self.evaluate_example not in FIXED_EXAMPLES and not self.evaluate_example.isdecimal():
            close = did_you_mean(self.evaluate_example, FIXED_EXAMPLES)
            raise UserError(
                f"eval.evaluate_example: expected first, random or a number, got {self.evaluate_example!r}{close}"
            )


@dataclass
class AdamWConfig:
    """The optimizer."""

    class_path: str = "AdamW"
    """Of which there is AdamW alone; also as --optimizer AdamW."""
    lr: float = 1e-3
    """The learning rate after the warmup."""
    weight_decay: float = 0.01
    """Of all parameters that learn."""
    betas: tuple[float, float] = (0.9, 0.999)
    """How slowly the two moments follow the gradient."""

    def __post_init__(self) -> None:
        if self.class_path != "AdamW":
            close = did_you_mean(self.class_path, ("AdamW",))
            raise UserError(f"optimizer: {self.class_path!r} is not available, expected AdamW{close}")
        FinetuneOptimizer(lr=self.lr, weight_decay=self.weight_decay, betas=self.betas)  # for what it refuses


@dataclass
class FinetuneFull:
    """Teach a checkpoint to follow instructions, all of its weights: finetune_full CHECKPOINT --FLAGS."""

    checkpoint_dir: str = ""
    """The model to begin with: a folder, a file or a name (weights list)."""
    out_dir: str = "out/finetune/full"
    """The run's folder; the finished model is in its folder final."""
    precision: Literal["32-true", "64-true", "bf16-true", "bf16-mixed", "16-mixed"] = "32-true"
    """bf16 computes in bfloat16 and 16-mixed in float16 where PyTorch's autocast does, with float32 parameters."""
    quantize: str | None = None
    """Of which there is none."""
    devices: int = 1
    """How many are used, of which there is 1."""
    engine: Literal["auto", "numpy", "torch", "triton"] = "auto"
    """auto: PyTorch where it is installed, else NumPy. triton: PyTorch on the kernels."""
    tokenizer: str | None = None
    """gpt2, bytes, or a file .model or .json; none: the checkpoint's own."""
    logger_name: Literal["csv", "tensorboard", "wandb"] = "csv"
    """Where the numbers go beside log.csv. csv: metrics.csv, written when training is done."""
    seed: int = 1337
    """Of dropout, of which example is random, and of the first values of adapters, where there are any."""
    resume: bool = False
    """Whether to go on with the run in out_dir from its last checkpoint."""
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    optimizer: AdamWConfig = field(default_factory=AdamWConfig)

    def __post_init__(self) -> None:
        if not self.checkpoint_dir:
            raise UserError("checkpoint_dir: expected a folder, a file or a name of weights to begin with, got none")
        if self.quantize is not None:
            raise UserError(f"quantize: quantized weights cannot be trained here, expected none, got {self.quantize!r}")
        if self.devices != 1:
            raise UserError(f"devices: expected 1, got {self.devices}")
        _at_least("seed", self.seed, 0)
        lr = self.optimizer.lr
        if self.train.min_lr is None:
            self.train.min_lr = min(MIN_LR, lr)
        elif self.train.min_lr > lr:
            raise UserError(f"train.min_lr: expected at most the learning rate {lr}, got {self.train.min_lr}")

    def lora(self) -> LoRA | None:
        """The adapters that are trained; None: the weights themselves are."""
        return None


@dataclass
class FinetuneLoRA(FinetuneFull):
    """Teach a checkpoint to follow instructions, by low-rank adapters: finetune_lora CHECKPOINT --FLAGS."""

    out_dir: str = "out/finetune/lora"
    """The run's folder; the finished model, its adapters merged, is in its folder final."""
    lora_r: int = 8
    """The adapters' rank."""
    lora_alpha: float = 16
    """Their output is scaled with lora_alpha / lora_r."""
    lora_dropout: float = 0.05
    """Of what they read."""
    lora_query: bool = True
    """Whether attention's queries have one."""
    lora_key: bool = False
    """Whether attention's keys have one."""
    lora_value: bool = True
    """Whether attention's values have one."""
    lora_projection: bool = False
    """Whether attention's output has one."""
    lora_mlp: bool = False
    """Whether the MLP's layers have one."""
    lora_head: bool = False
    """Whether the head has one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.lora()

    def lora(self) -> LoRA:
        """The adapters. UserError for settings that make none."""
        given = {
            "query": self.lora_query,
            "key": self.lora_key,
            "value": self.lora_value,
            "out": self.lora_projection,
            "mlp": self.lora_mlp,
            "head": self.lora_head,
        }
        targets = tuple(target for target, wanted in given.items() if wanted)
        if not targets:
            raise UserError("lora: expected a layer with an adapter, such as --lora_query true, got none")
        try:
            return LoRA(self.lora_r, float(self.lora_alpha), "alpha/rank", self.lora_dropout, targets)
        except ValueError as error:
            raise UserError(str(error)) from None


def _at_least(name: str, value: float | None, least: int) -> None:
    if value is not None and not value >= least:
        raise UserError(f"{name}: expected at least {least}, got {value}")
