"""What a finetuning run is made from, as plain dataclasses that YAML and a command line can fill."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from gpt.chat import TEMPLATES
from gpt.engine import OptimizerConfig
from gpt.errors import UserError
from gpt.options import did_you_mean, given
from gpt.prompts import STYLES
from gpt.train.config import ModelConfig, TrainConfig
from reference.lora import TARGETS, LoRA

__all__ = [
    "ClassifyConfig",
    "ExamplesConfig",
    "FinetuneConfig",
    "InstructConfig",
    "LoRAConfig",
    "PreferConfig",
]


@dataclass
class ExamplesConfig:
    """How examples become batches."""

    batch_size: int = 8
    """Examples, or pairs of answers, in a micro-batch."""
    max_length: int | None = None
    """Tokens of an example that are read, what is longer being cut; none: in classification those of the longest
    training text, else the model's context."""
    shuffle: bool = True
    """Whether the training examples come in a new random order each epoch."""
    drop_last: bool = True
    """Whether a last, smaller training batch is left out."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size: expected at least 1, got {self.batch_size}")
        if self.max_length is not None and self.max_length < 1:
            raise UserError(f"max_length: expected at least 1, got {self.max_length}")


@dataclass
class LoRAConfig:
    """Low-rank adapters (reference/lora.py), which are then all that is trained."""

    rank: int = 0
    """Of the adapters; 0: none, and the model itself is trained."""
    alpha: float | None = None
    """What their output is scaled with; none: the rank."""
    scaling: Literal["alpha/rank", "alpha"] = "alpha/rank"
    """alpha/rank is the paper's, alpha the book's."""
    lora_dropout: float = 0.0
    """Of what the adapters read."""
    targets: tuple[str, ...] = TARGETS
    """Layers that have one: query, key, value, out, mlp (or gate, up, down), head. May be given several times; all,
    unless given. A classifier's new head without one is trained as a whole."""

    def settings(self) -> LoRA | None:
        """None at rank 0. UserError for what makes no adapter."""
        if not self.rank:
            return None
        alpha = float(self.rank) if self.alpha is None else self.alpha
        try:
            return LoRA(self.rank, alpha, self.scaling, self.lora_dropout, self.targets)
        except ValueError as error:
            raise UserError(str(error)) from None


@dataclass(frozen=True)
class FinetuneOptimizer(OptimizerConfig):
    """AdamW's settings."""

    lr: float = 5e-5


@dataclass
class FinetuneTrain(TrainConfig):
    """How long the trainer goes on, and when it evaluates, samples and saves."""

    epochs: int | None = 2
    """Passes over the training examples, unless `steps` says otherwise."""
    schedule: Literal["constant", "cosine"] = "constant"

    def __post_init__(self) -> None:
        if self.steps is not None:
            self.epochs = None
        super().__post_init__()


@dataclass
class ClassifyTrain(FinetuneTrain):
    """How long the trainer goes on, and when it evaluates, samples and saves."""

    epochs: int | None = 5
    """Passes over the training texts, unless `steps` says otherwise."""


@dataclass
class FinetuneConfig(ModelConfig):
    """What all tasks have in common."""

    data: str = ""
    """A name of the data catalogue, or the path of a file."""
    loader: ExamplesConfig = field(default_factory=ExamplesConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    optimizer: FinetuneOptimizer = field(default_factory=FinetuneOptimizer)
    train: FinetuneTrain = field(default_factory=FinetuneTrain)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.lora.settings()
        if not self.lora.rank and (useless := given(self.lora)):
            raise UserError(f"{useless[0]}: of adapters, and at rank 0 there are none; expected --rank beside it")
        if self.lora.rank and self.optimizer.trained:
            raise UserError("trained: with adapters (rank above 0) they alone are trained")

    def changes(self) -> dict[str, Any]:
        """The fields of a model's config (GPTConfig) that this needs otherwise."""
        return {"lora": self.lora.settings()}


@dataclass
class ClassifyConfig(FinetuneConfig):
    """Teach a model to tell texts apart: its head is replaced by one with an output for each label, unless it has that
    many."""

    data: str = "sms-spam"
    """A name of the data catalogue, a file of lines LABEL<TAB>TEXT, or a .csv with the columns Label,Text."""
    labels: tuple[str, ...] = ("ham", "spam")
    """The labels, of which a file may also hold the numbers. May be given several times."""
    balance: bool = True
    """Whether as many texts of each label are used as the rarest has."""
    train_fraction: float = 0.7
    """The part of the texts that is trained on."""
    validation_fraction: float = 0.1
    """The part for validation; the rest is for testing."""
    position: Literal["last", "first"] = "last"
    """The token whose output tells the label."""
    layers: Literal["auto", "head", "last_block", "all"] = "auto"
    """What is trained: the new head; the last block, the final norm and the head; or all. auto: last_block where there
    are weights to begin with, else all. Adapters and --trained stand for it."""
    train: ClassifyTrain = field(default_factory=ClassifyTrain)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.labels)) < max(2, len(self.labels)):
            raise UserError(f"labels: expected two different ones at least, got {', '.join(self.labels) or 'none'}")

    def changes(self) -> dict[str, Any]:
        """A head of its own, with a bias, as the book's."""
        return {
            **super().changes(),
            "tie_embeddings": False,
            "n_outputs": len(self.labels),
            "head_bias": True,
        }


@dataclass
class InstructConfig(FinetuneConfig):
    """Teach a model to follow instructions."""

    data: str = "instruction-data"
    """A name of the data catalogue, or a file of entries: a JSON array, or an object a line, with "instruction",
    "output" and perhaps "input"."""
    style: Literal["alpaca", "phi3", "plain"] = "alpaca"
    """How an instruction is put to the model."""
    mask_instruction: bool = False
    """Whether only the answer's tokens are learnt, and not the instruction's."""
    train_fraction: float = 0.85
    """The part of the entries that is trained on, from the beginning."""
    test_fraction: float | None = 0.1
    """The part for testing, which comes next; the rest is for validation. none: all the rest is for testing, and the
    loss on it is the validation loss."""
    keep_tokens: bool = True
    """Whether token ids are kept in memory, or made again whenever they are needed."""
    responses: int | None = None
    """How many test entries are answered when training is done; none: all."""
    max_new_tokens: int = 256
    """Tokens of an answer, at most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_answers(self.responses, self.max_new_tokens)


@dataclass
class PreferConfig(FinetuneConfig):
    """Teach a model which of two answers is preferred: DPO or ORPO."""

    data: str = "instruction-data-with-preference"
    """A name of the data catalogue, or a file of entries: "instruction", "chosen" and "rejected", or messages of a
    chat under "chosen" and "rejected"."""
    objective: Literal["dpo", "orpo"] = "dpo"
    """dpo: relative to the model before training. orpo: with the odds ratio, and the chosen answer's cross entropy."""
    beta: float = 0.1
    """How much the preference weighs: dpo's beta, orpo's lambda."""
    style: str = "alpaca"
    """How a prompt is put to the model: alpaca, phi3, plain, or a chat template: llama3, chatml, zephyr."""
    validation_fraction: float = 0.05
    """The part of the entries for validation, drawn with `split_seed`."""
    split_seed: int = 42
    """Of the draw."""
    drop_sources: tuple[str, ...] = ()
    """Entries whose "source" is this are left out. May be given several times."""
    max_prompt_tokens: int | None = None
    """Entries with prompts of so many tokens or more are left out."""
    drop_identical: bool = False
    """Whether pairs of equal answers are left out."""
    responses: int = 8
    """How many validation prompts are answered before and after training."""
    max_new_tokens: int = 128
    """Tokens of such an answer, at most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta > 0:
            raise UserError(f"beta: expected a positive number, got {self.beta}")
        known = (*STYLES, *TEMPLATES)
        if self.style not in known and "{" not in self.style:  # a template's text
            raise UserError(f"style: {self.style!r} is not one of {', '.join(known)}{did_you_mean(self.style, known)}")
        _check_answers(self.responses, self.max_new_tokens)


def _check_answers(responses: int | None, max_new_tokens: int) -> None:
    """Said before training, and not when it is time to answer."""
    if responses is not None and responses < 0:
        raise UserError(f"responses: expected at least 0, got {responses}")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
