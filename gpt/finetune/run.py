"""A finetuning run: a task's data, model and measures on the one trainer, and what the task does with the result.

runs/latest/   config.yaml  log.csv  loss.png  METRIC.png  checkpoints      as any run's
               NAME.safetensors                                             the finished model, adapters merged
               adapter.safetensors                                          the adapters alone, if there are any
               results.json, and what the task writes
"""

from __future__ import annotations

import dataclasses
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from gpt import tokenizers, world
from gpt.data import Loader
from gpt.data.catalogue import ENTRIES, get
from gpt.data.files import atomic_write
from gpt.engine import Engine, Tensor
from gpt.errors import UserError
from gpt.finetune.adapters import adapt, changed_config, merge, save_adapter
from gpt.finetune.config import FinetuneConfig
from gpt.tokenizers import Tokenizer
from gpt.train.config import TrainConfig
from gpt.train.progress import Progress, create_progress
from gpt.train.run import CONFIG, again, carry_out, check_memory, make_engine, model_config, shared
from gpt.train.trainer import Result, Trainer
from gpt.weights.load import load
from gpt.weights.native import SavedModel, save_model
from reference.config import GPTConfig
from reference.init import initialize
from reference.torch_rng import Generator

__all__ = ["ADAPTER", "RESULTS", "Task", "data_file", "end_token", "finetune", "write_json"]

ADAPTER, RESULTS = "adapter.safetensors", "results.json"


class Task(ABC):
    """What one kind of finetuning differs in."""

    metrics: ClassVar[tuple[str, ...]] = ()  # what `measure` gives beside the loss

    train_loader: Loader
    validation_loader: Loader
    length: int  # of the longest training example in a batch, in tokens
    objective: str = "cross_entropy"  # or dpo, orpo; with `counted` as in gpt.plan.Setup
    counted: int | None = None
    data: str  # what is learnt from, in words
    spec: dict[str, Any]  # what using the model needs to know, kept in its files

    def trained(self, model: GPTConfig) -> tuple[str, ...]:
        """Patterns of the parameters that learn, where the user's do not say it; none: all, or the adapters alone."""
        return ()

    def settings(self, train: TrainConfig) -> TrainConfig:
        """The trainer's settings, where they depend on how many batches there are."""
        return train

    def begin(self, engine: Engine, progress: Progress) -> None:  # noqa: B027 - most tasks have nothing to do
        """Called with the model as it is before training, in a resumed run too."""

    def measure(self, engine: Engine, batch: Any) -> Mapping[str, float]:
        """The loss of a batch in evaluation mode, and the metrics."""
        return {"loss": engine.loss(batch)}

    def sample(self, engine: Engine) -> str:
        """Something to show at the end of an epoch."""
        return ""

    @abstractmethod
    def finish(self, engine: Engine, progress: Progress) -> dict[str, Any]:
        """Called when training is done: measure, show and write what the task is for; results by name."""

    @abstractmethod
    def file_name(self, weights: str) -> str:
        """What the finished model's file is called in the run's folder, without its ending."""


# What makes a task: of a run's configuration, the tokenizer, the model's config and the stream that orders the data.
MakeTask = Callable[[Any, Tokenizer, GPTConfig, Generator], Task]


class _Trainer(Trainer):
    """Removes the finished model when training goes on beyond it, for it is loaded before any checkpoint."""

    finished: Path

    def run(self) -> Result:
        if self.step < self.total_steps:
            world.first(lambda: self.finished.unlink(missing_ok=True))
        return super().run()


def finetune(
    config: FinetuneConfig,
    make_task: MakeTask,
    command: str,
    progress: Progress | None = None,
    config_file: str = CONFIG,
) -> Result:
    """Train a task, write the run's folder `config.out`, and return where the run ended. Raises UserError.

    `command`: by which the user can go on with it, and `config_file` of the folder.
    """
    config = again(config)
    command = f"{command.replace('twingrad', world.launcher(), 1)} --config {Path(config.out, config_file)} --resume"
    with shared(config, command):
        progress = progress or create_progress()
        trainer, task = build(config, make_task, progress)
        task.begin(trainer.engine, progress)
        result = carry_out(config, trainer, task.data)
        if result.interrupted:
            progress.line(f"To go on: {command}")
            return result
        engine = _alone(config, trainer.engine)
        world.first(lambda: _finish(config, trainer, engine, task, progress))
    return result


def _alone(config: FinetuneConfig, engine: Engine) -> Engine:
    """The trained engine; where several processes share it, in the first a whole one that it can use without them."""
    if world.size() == 1:
        return engine
    params = engine.parameters()
    return make_engine(config, engine.config, params, shared=False) if world.is_first() else engine


def _finish(config: FinetuneConfig, trainer: Trainer, engine: Engine, task: Task, progress: Progress) -> None:
    """Write the model, and what the task makes with it."""
    _save(Path(config.out), config, trainer, engine, task)
    results = task.finish(engine, progress)
    write_json(Path(config.out, RESULTS), results)
    for name, value in results.items():
        if isinstance(value, int | float):
            progress.line(f"{name.replace('_', ' ')}: {value:.4g}")


def build(config: FinetuneConfig, make_task: MakeTask, progress: Progress | None = None) -> tuple[Trainer, Task]:
    """The trainer of a run, before its first step, and the task. Raises UserError."""
    begun = world.first_then_all(lambda: _begin(config, make_task))
    return world.together(lambda: _make_trainer(config, begun, progress))


class Begun(NamedTuple):
    """A run whose files are there, and nothing large is made."""

    saved: SavedModel | None
    tokenizer: Tokenizer
    model: GPTConfig  # that the weights are of, or are drawn for
    adapted: GPTConfig  # what the task makes of it
    task: Task
    generator: Generator


def _begin(config: FinetuneConfig, make_task: MakeTask) -> Begun:
    """Find weights and data, and read the data."""
    saved = load(config.weights) if config.weights else None
    if saved and saved.config.lora:
        params, architecture = merge(saved.params, saved.config)
        saved = saved._replace(params=params, config=architecture)
    tokenizer, generator, changes = _tokenizer(config, saved), Generator(config.train.seed), config.changes()
    model = model_config(config, tokenizer.n_vocab, saved, classifies="n_outputs" in changes)
    adapted = changed_config(model, **changes)
    task = make_task(config, tokenizer, adapted, generator)  # which draws nothing yet
    return Begun(saved, tokenizer, model, adapted, task, generator)


def _make_trainer(config: FinetuneConfig, begun: Begun, progress: Progress | None) -> tuple[Trainer, Task]:
    saved, tokenizer, model, adapted, task, generator = begun
    patterns = config.optimizer.trained or task.trained(adapted)
    check_memory(config, adapted, task.length, patterns, task.objective, task.counted)
    base: Mapping[str, Tensor] = saved.params if saved else initialize(model, generator, config.init)
    params, _ = adapt(base, model, generator, **config.changes())
    optimizer = dataclasses.replace(config.optimizer, trained=patterns)
    trainer = _Trainer(
        make_engine(config, adapted, params, optimizer),
        task.settings(config.train),
        task.train_loader,
        task.validation_loader,
        lr=optimizer.lr,
        generator=generator,
        run_dir=config.out,
        tokenizer=tokenizer.spec(),
        task=task.spec,
        measure=task.measure,
        metrics=task.metrics,
        sample=task.sample,
        progress=progress,
    )
    trainer.finished = _finished(config, task)
    return trainer, task


def _save(out: Path, config: FinetuneConfig, trainer: Trainer, engine: Engine, task: Task) -> None:
    """The finished model, and its adapters alone."""
    model = engine.config
    params: Mapping[str, Tensor] = engine.parameters()
    if model.lora:
        save_adapter(out / ADAPTER, params, model)
        params, model = merge(params, model)
    save_model(_finished(config, task), params, model, trainer.tokenizer, task.spec)


def _finished(config: FinetuneConfig, task: Task) -> Path:
    """The finished model's file."""
    return Path(config.out, f"{task.file_name(config.weights or config.preset)}.safetensors")


def _tokenizer(config: FinetuneConfig, saved: SavedModel | None) -> Tokenizer:
    if config.tokenizer:
        return tokenizers.load(config.tokenizer)
    if saved and saved.tokenizer:
        return tokenizers.from_spec(saved.tokenizer)
    if saved:
        raise UserError(f"{config.weights}: holds no tokenizer; name it by --tokenizer")
    return tokenizers.load("bytes")


def data_file(name: str) -> Path:
    """The file that `data` means: a path, or a name of the catalogue, downloaded if need be."""
    path = Path(name)
    if path.is_file():
        return path
    if name in ENTRIES or not path.suffix:
        return get(name)
    raise UserError(f"data: {name}: no such file")


def end_token(tokenizer: Tokenizer) -> int:
    """The token that ends a text, and pads it. UserError for a tokenizer without one."""
    if tokenizer.eot is None:
        raise UserError(f"tokenizer: {tokenizer.name} has no end token, which examples are ended and padded with")
    return tokenizer.eot


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file as people read it, whole or not at all. Numbers that are none become null."""
    with atomic_write(path) as file:
        file.write(json.dumps(_finite(value), indent=2, ensure_ascii=False).encode("utf-8", "replace") + b"\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
