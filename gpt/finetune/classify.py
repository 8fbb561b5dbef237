"""Classification on the trainer, and a finished classifier to ask.

from gpt.finetune.classify import Classifier

Classifier.load("runs/spam").classify("You won a prize! Text WIN to 8000")       # "spam"
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gpt import tokenizers
from gpt.data.examples import ExampleLoader, fingerprint
from gpt.engine import IGNORE, Batch, Engine, create_engine
from gpt.errors import UserError
from gpt.finetune import classification as data
from gpt.finetune.answers import check_positive_or_none
from gpt.finetune.config import ClassifyConfig
from gpt.finetune.run import Task, data_file, end_token
from gpt.tokenizers import Tokenizer, encode_special
from gpt.train.progress import Progress
from gpt.train.trainer import measured
from gpt.weights.load import load
from reference import cross_entropy
from reference.config import GPTConfig
from reference.torch_rng import Generator

__all__ = ["AskConfig", "Classifier", "Classify", "ask", "trained_layers"]

KIND = "classification"
SHOWN = 6  # texts, when training is done


class Classify(Task):
    """See gpt.finetune.config.ClassifyConfig."""

    metrics = ("accuracy",)

    def __init__(self, config: ClassifyConfig, tokenizer: Tokenizer, model: GPTConfig, generator: Generator) -> None:
        self.config, self.tokenizer = config, tokenizer
        path = data_file(config.data)
        rows = data.read_rows(path, config.labels)
        used = data.balance(rows, config.train.seed) if config.balance else rows
        self.rows = data.split(used, config.train_fraction, config.validation_fraction, config.train.seed)
        train = data.Classification(
            self.rows[0], tokenizer, config.loader.max_length, model.context_length, len(config.labels)
        )
        self.length = train.max_length
        others = (
            data.Classification(part, tokenizer, self.length, n_labels=len(config.labels)) for part in self.rows[1:]
        )
        pad = end_token(tokenizer)
        collate = partial(data.collate, pad_id=pad, max_length=self.length, position=config.position)
        size, shuffle, drop = config.loader.batch_size, config.loader.shuffle, config.loader.drop_last
        self.train_loader = ExampleLoader(train, collate, size, shuffle, drop, generator, fingerprint(path))
        self.whole_train_loader, self.validation_loader, self.test_loader = (
            ExampleLoader(part, collate, size, False, False, generator) for part in (train, *others)
        )
        sizes = "/".join(str(len(part)) for part in self.rows)
        self.data = (
            f"{config.data}: {len(rows):,} texts, {sizes} to train, validate and test, {self.length} tokens each"
        )
        self.spec = {
            "kind": KIND,
            "labels": list(config.labels),
            "max_length": self.length,
            "position": config.position,
            "pad": pad,
        }

    def trained(self, model: GPTConfig) -> tuple[str, ...]:
        if model.lora:  # a new head that has no adapter would stay as it was drawn
            return () if model.adapts("head") else ("*.lora_?", "head.*")
        layers = self.config.layers
        if layers == "auto":
            layers = "last_block" if self.config.weights else "all"
        return trained_layers(layers, model)

    def measure(self, engine: Engine, batch: Batch) -> Mapping[str, float]:
        """Loss and accuracy from one pass: the logits of the one position that counts in each text."""
        rows, positions = np.nonzero(batch.targets != IGNORE)
        logits, labels = engine.logits(batch.inputs, counts=positions + 1), batch.targets[rows, positions]
        loss = float(cross_entropy.forward(logits, labels)[0])
        return {"loss": loss, "accuracy": float(np.mean(logits.argmax(axis=-1) == labels))}

    def finish(self, engine: Engine, progress: Progress) -> dict[str, Any]:
        """Accuracies on all texts of each part, the parts as CSV files, and some test texts with their labels."""
        data.write_csvs(self.config.out, *self.rows, labels=self.config.labels)
        loaders = {"train": self.whole_train_loader, "validation": self.validation_loader, "test": self.test_loader}
        results: dict[str, Any] = {}
        for name, loader in loaders.items():
            progress.line(f"Measuring on all {name} texts ...")
            found = measured(engine, loader, None, self.measure)
            results |= {f"{name}_{metric}": value for metric, value in found.items()}
        classifier = Classifier(engine, self.tokenizer, self.spec)
        examples = self.rows[2][:SHOWN]
        for (label, text), found_label in zip(examples, classifier.classify([t for _, t in examples]), strict=True):
            true = self.config.labels[label]
            mark = "" if found_label == true else f", but it is {true}"
            progress.line(f"  {found_label}{mark}: {text[:100]}")
        return results

    def file_name(self, weights: str) -> str:
        """The book's name."""
        return "review_classifier"


def trained_layers(layers: str, model: GPTConfig) -> tuple[str, ...]:
    """Patterns of the parameters that learn with `layers` head, last_block or all; none: all."""
    last_block = (f"blocks.{model.n_layers - 1}.*", "final_norm.*", "head.*")
    return {"head": ("head.*",), "last_block": last_block, "all": ()}[layers]


class Classifier:
    """A finished model that tells texts apart."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, spec: Mapping[str, Any]) -> None:
        try:
            self.labels = [str(label) for label in spec["labels"]]
            self.max_length, self.position, self.pad = spec["max_length"], spec["position"], int(spec["pad"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"classifier: its file does not say how to use it ({error})") from None
        if len(self.labels) != engine.config.n_outputs:
            raise UserError(f"classifier: {len(self.labels)} labels, but {engine.config.n_outputs} outputs")
        self.engine, self.tokenizer = engine, tokenizer

    @classmethod
    def load(cls, source: str | Path, engine: str = "auto") -> Classifier:
        """From a run's folder or a file. Raises UserError for a model that is no classifier."""
        saved = load(source)
        if not saved.task or saved.task.get("kind") != KIND or saved.tokenizer is None:
            raise UserError(f"{source}: no classifier; train one by twingrad finetune classify")
        made = create_engine(engine, saved.config, saved.params)
        return cls(made, tokenizers.from_spec(saved.tokenizer), saved.task)

    def probabilities(self, texts: Sequence[str], max_length: int | None = None) -> np.ndarray:
        """Texts -> (B, labels). `max_length`: tokens that are read; none: as in training. UserError for an empty one.

        Texts are padded to that length as in training, where the model saw them so.
        """
        check_positive_or_none(max_length=max_length)
        length = min(max_length or self.max_length or self.engine.config.context_length, self._context())
        examples = []
        for number, text in enumerate(texts, 1):
            ids = encode_special(self.tokenizer, text)
            if not ids:
                raise UserError(f"text {number}: expected a text to classify, got an empty one")
            examples.append(data.Labelled(np.array(ids[:length], np.int32), 0))
        batch = data.collate(examples, self.pad, length, self.position)
        positions = (batch.targets != IGNORE).argmax(axis=1)
        logits = self.engine.logits(batch.inputs, counts=positions + 1).astype(np.float64)
        p = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return p / p.sum(axis=-1, keepdims=True)

    def classify(self, texts: str | Sequence[str], max_length: int | None = None) -> Any:
        """A text's label, or those of several."""
        given = [texts] if isinstance(texts, str) else list(texts)
        found = [self.labels[i] for i in self.probabilities(given, max_length).argmax(axis=-1)] if given else []
        return found[0] if isinstance(texts, str) else found

    def _context(self) -> int:
        return self.engine.config.context_length


@dataclass(frozen=True)
class AskConfig:
    """Tell which label a text has, by a model that was finetuned to."""

    text: tuple[str, ...] = ()
    """A text; may be given several times, and without --text before it."""
    model: str = "runs/latest"
    """The run's folder, or the model's file."""
    engine: Literal["auto", "numpy", "torch", "triton"] = "auto"
    """auto: PyTorch where it is installed, else NumPy. triton: PyTorch on the kernels."""
    max_length: int | None = None
    """Tokens of a text that are read; none: as in training."""

    def __post_init__(self) -> None:
        if not self.text:
            raise UserError('text: expected one to classify, got none; give it as in: twingrad classify "..."')
        check_positive_or_none(max_length=self.max_length)


def ask(config: AskConfig) -> None:
    """Print each text's label and how sure the model is of it."""
    classifier = Classifier.load(config.model, config.engine)
    for text, p in zip(config.text, classifier.probabilities(config.text, config.max_length), strict=True):
        best = int(p.argmax())
        shown = re.sub(r"\s+", " ", text)
        print(f"{classifier.labels[best]} ({p[best]:.1%}): {shown[:100]}")
