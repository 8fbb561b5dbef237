"""LitGPT's commands finetune_lora and finetune_full: their flags (workshop_config.py) on this project's trainer.

OUT_DIR/         hyperparameters.yaml                  what was asked for; --config reads it, with --resume to go on
                 config.yaml  log.csv  checkpoints     as any run's
                 metrics.csv                           of log.csv the rows of `log_interval` and of each validation
                 adapter.safetensors                   the adapters alone, if there are any
OUT_DIR/final/   model.safetensors                     the finished model, adapters merged, with tokenizer and style
                 hyperparameters.yaml  model_config.yaml  prompt_style.yaml  tokenizer.json      the same to be read

An iteration is a micro-batch, a step is an update of the parameters. With N training entries, batches of `micro` and
steps of `global` examples,

    batches = ceil(N / micro)                  steps = epochs ceil(batches / (global / micro))
    lr(s)   = lr s / warmup                    s < warmup, counted from 0: LambdaLR
    lr(s)   = min_lr + (lr - min_lr) (1 + cos(pi (s - warmup) / (steps - warmup))) / 2         CosineAnnealingLR

The last step of an epoch takes the batches that are left, where LitGPT takes those of the next epoch too.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gpt.data.examples import Entries, JsonEntries, Subset
from gpt.data.files import atomic_write
from gpt.engine import Engine
from gpt.errors import INTERRUPTED, UserError
from gpt.finetune import config as ours
from gpt.finetune.instruct import Instruct
from gpt.finetune.run import data_file, finetune, write_json
from gpt.finetune.workshop_config import STYLES, FinetuneFull, FinetuneLoRA
from gpt.options import parse_config, to_yaml
from gpt.tokenizers import Tokenizer
from gpt.train.config import TrainConfig
from gpt.train.log import Row, read_log
from gpt.train.progress import Progress, create_progress
from gpt.train.run import CONFIG, LOG, again
from gpt.train.trainer import Result, evaluate
from gpt.weights.native import read_model
from reference.config import GPTConfig
from reference.torch_rng import Generator

__all__ = ["FinetuneFull", "FinetuneLoRA", "main", "random_split", "run"]

HYPERPARAMETERS, METRICS, FINAL = "hyperparameters.yaml", "metrics.csv", "final"
FRACTION = 0.05  # of the entries, for validation
CHOICES = {"--data": "--data.class_path", "--optimizer": "--optimizer.class_path"}  # what is also a group's name
PRECISIONS = {
    "32-true": ("float32", "full"),
    "64-true": ("float64", "full"),
    "bf16-true": ("float32", "bfloat16"),
    "bf16-mixed": ("float32", "bfloat16"),
    "16-mixed": ("float32", "float16"),
}


def main(config_class: type[FinetuneFull], argv: Sequence[str], prog: str) -> int:
    """Run the command of these flags and return its exit status."""
    words = ["--checkpoint_dir", *argv] if argv and not argv[0].startswith("-") else list(argv)
    named = [(CHOICES.get(name, name), equals, value) for name, equals, value in (w.partition("=") for w in words)]
    result = run(parse_config(config_class, ["".join(parts) for parts in named], prog), prog)
    return INTERRUPTED if result.interrupted else 0


def run(asked: FinetuneFull, command: str = "twingrad finetune_full", progress: Progress | None = None) -> Result:
    """Print what was asked for, train, and write `asked.out_dir`. Raises UserError.

    `command`: by which the user can go on.
    """
    asked = _resolved(asked)
    settings = again(_settings(asked))
    if not settings.resume and Path(asked.out_dir, CONFIG).exists():
        raise UserError(
            f"out_dir: {asked.out_dir} already holds a run: go on with it by --resume, or give another by --out_dir"
        )
    report = Report(progress or create_progress(), asked.train.log_interval)
    report.line(to_yaml(asked).rstrip())
    return finetune(settings, partial(Workshop, asked), command, report, HYPERPARAMETERS)


@dataclass
class RunConfig(ours.InstructConfig):
    """What `config.yaml` has of such a run: its settings in this project's words."""

    val_split_fraction: float | None = None
    """The part of a file's entries for validation."""
    split_seed: int = 42
    """Of the draw of these, and of the order of the others."""


def _resolved(asked: FinetuneFull) -> FinetuneFull:
    """What was asked for, with a fraction where a file is to be split. UserError for one where there is a folder."""
    data = asked.data
    folder = Path(data.json_path).is_dir()
    if folder and data.val_split_fraction is not None:
        raise UserError(
            f"data.val_split_fraction: {data.json_path} is a folder, whose val.json is for validation; expected none, "
            f"got {data.val_split_fraction}"
        )
    fraction = FRACTION if not folder and data.val_split_fraction is None else data.val_split_fraction
    return dataclasses.replace(asked, data=dataclasses.replace(data, val_split_fraction=fraction))


def _settings(asked: FinetuneFull) -> RunConfig:
    """This project's settings for what was asked for."""
    data, train, lora = asked.data, asked.train, asked.lora()
    dtype, precision = PRECISIONS[asked.precision]
    adapters = (
        ours.LoRAConfig(lora.rank, lora.alpha, "alpha/rank", lora.dropout, lora.targets) if lora else ours.LoRAConfig()
    )
    return RunConfig(
        tokenizer=asked.tokenizer,
        weights=asked.checkpoint_dir,
        engine=asked.engine,
        dtype=dtype,  # type: ignore[arg-type]
        precision=precision,  # type: ignore[arg-type]
        out=asked.out_dir,
        log_to=() if asked.logger_name == "csv" else (asked.logger_name,),
        resume=asked.resume,
        optimizer=ours.FinetuneOptimizer(
            lr=asked.optimizer.lr, betas=asked.optimizer.betas, weight_decay=asked.optimizer.weight_decay
        ),
        data=data.json_path,
        loader=ours.ExamplesConfig(train.micro_batch_size, train.max_seq_length, shuffle=True, drop_last=False),
        lora=adapters,
        train=ours.FinetuneTrain(
            epochs=train.epochs,
            accumulation=train.global_batch_size // train.micro_batch_size,
            seed=asked.seed,
            schedule="cosine",
            warmup_steps=train.lr_warmup_steps or 0,
            min_lr=train.min_lr,
            max_norm=train.max_norm,
            eval_every=asked.eval.interval,
            eval_batches=asked.eval.max_iters,
            first_eval="one",
            sample_every=asked.eval.interval,
            save_every=train.save_interval or 0,
            save_best=False,
        ),
        style=STYLES[data.prompt_style],  # type: ignore[arg-type]
        mask_instruction=data.mask_prompt,
        val_split_fraction=data.val_split_fraction,
        split_seed=data.seed,
    )


def random_split(entries: Entries, fraction: float, seed: int) -> tuple[Subset, Subset]:
    """Training and validation entries, as torch.utils.data.random_split draws them for [1 - fraction, fraction].

    UserError where one of them is left empty.
    """
    n = len(entries)
    held_out = math.floor(n * fraction)
    if n - held_out - math.floor(n * (1.0 - fraction)) > 1:  # both products rounded down: each part gets one more
        held_out += 1
    order = Generator(seed).randperm(n)
    if not 0 < held_out < n:
        raise UserError(
            f"data.val_split_fraction: {fraction} of {n} entries makes training and validation sets of "
            f"{n - held_out} and {held_out}"
        )
    return Subset(entries, order[: n - held_out]), Subset(entries, order[n - held_out :])


class Report(Progress):
    """What another one shows, and a line for each `every` iterations."""

    def __init__(self, shown: Progress, every: int) -> None:
        self._shown, self._every = shown, every
        self._validation = math.nan
        self.iterations: Callable[[int], int] = lambda step: step  # how many a number of steps has

    def start(self, done: int, total: int) -> None:
        self._shown.start(done, total)

    def step(self, row: Row) -> None:
        self._shown.step(row)
        if not math.isnan(row.val_loss):
            self._validation = row.val_loss
        if self.due(row.step):
            known = "n/a" if math.isnan(self._validation) else f"{self._validation:.3f}"
            self.line(
                f"Epoch {math.ceil(row.epoch)} | iter {self.iterations(row.step)} step {row.step} | "
                f"loss train: {row.loss:.3f}, val: {known} | lr {row.lr:.2e} | {row.tokens_per_s:,.0f} tokens/s"
            )

    def due(self, step: int) -> bool:
        """Whether a multiple of `every` is among the iterations of a step, counted from 1."""
        return self.iterations(step) // self._every > self.iterations(step - 1) // self._every

    def line(self, text: str) -> None:
        self._shown.line(text)

    def close(self) -> None:
        self._shown.close()


class Workshop(Instruct):
    """Instructions, as was asked for by LitGPT's flags."""

    def __init__(
        self, asked: FinetuneFull, config: RunConfig, tokenizer: Tokenizer, model: GPTConfig, generator: Generator
    ) -> None:
        self.asked = asked
        super().__init__(config, tokenizer, model, generator)
        self.generator, self.choice = generator, Generator(self.asked.seed)
        self.sample_tokens = self.asked.eval.max_new_tokens
        self.max_length = min(config.loader.max_length or model.context_length, model.context_length)
        wanted = self.asked.eval.evaluate_example
        if wanted.isdecimal() and int(wanted) >= len(self.held_out):
            raise UserError(
                f"eval.evaluate_example: expected below {len(self.held_out)}, the number of validation entries, "
                f"got {wanted}"
            )

    def files(self, config: RunConfig) -> list[Path]:
        if config.val_split_fraction is None:
            return [_split_file(Path(config.data), name) for name in ("train", "val")]
        return [data_file(config.data)]

    def parts(self, config: RunConfig) -> tuple[Entries, Entries, Entries]:
        if config.val_split_fraction is None:
            train, validation = map(JsonEntries, self.files(config))
            return train, validation, train[:0]
        entries = JsonEntries(*self.files(config))
        return *random_split(entries, config.val_split_fraction, config.split_seed), entries[:0]

    def settings(self, train: TrainConfig) -> TrainConfig:
        wanted = self.asked.train
        per_epoch = math.ceil(len(self.train_loader) / train.accumulation)
        limits = [wanted.epochs * per_epoch]
        if wanted.max_steps is not None:
            limits.append(wanted.max_steps)
        if wanted.max_tokens is not None:
            most = wanted.global_batch_size * min(self.longest, self.max_length)
            if wanted.max_tokens < most:
                raise UserError(
                    f"train.max_tokens: one step may read {most} tokens, expected at least these, "
                    f"got {wanted.max_tokens}"
                )
            limits.append(wanted.max_tokens // most)
        warmup = train.warmup_steps
        if wanted.lr_warmup_fraction is not None:
            warmup = math.ceil(wanted.lr_warmup_fraction * per_epoch)
        steps = min(limits)
        if warmup >= steps:
            warnings.warn(
                f"train: the warmup's {warmup} steps are not over when the run is, after {steps}",
                stacklevel=2,
            )
        return dataclasses.replace(train, epochs=None, steps=steps, warmup_steps=warmup)

    def iterations(self, steps: int) -> int:
        """How many micro-batches so many steps have, the last step of an epoch perhaps fewer than the others."""
        accumulation = self.config.train.accumulation
        epochs, rest = divmod(steps, math.ceil(len(self.train_loader) / accumulation))
        return epochs * len(self.train_loader) + rest * accumulation

    def begin(self, engine: Engine, progress: Progress) -> None:
        _write(Path(self.config.out, HYPERPARAMETERS), self._hyperparameters())
        if isinstance(progress, Report):
            progress.iterations = self.iterations
        progress.line(
            f"The longest training entry has {self.longest} tokens; at most {self.max_length} are read of each"
        )
        if self.asked.eval.initial_validation and not self.config.resume:
            loss = evaluate(engine, self.validation_loader)
            progress.line(f"Initial validation: val loss {loss:.3f}, val ppl {np.exp(loss):.3f}")
        # From here on the stream orders the data; begun anew, whatever was drawn for the adapters and the validation.
        self.generator.set_state(Generator(self.asked.data.seed).state())

    def example(self) -> Mapping[str, Any]:
        wanted = self.asked.eval.evaluate_example
        if wanted == "random":
            return self.held_out[int(self.choice.randint(0, len(self.held_out), (1,))[0])]
        return self.held_out[0 if wanted == "first" else int(wanted)]

    def finish(self, engine: Engine, progress: Progress) -> dict[str, Any]:
        out = Path(self.config.out)
        final, style = out / FINAL, self.config.style
        if self.asked.logger_name == "csv":
            self._write_metrics(out / METRICS)
        _write(final / HYPERPARAMETERS, self._hyperparameters())
        _write(final / "model_config.yaml", _yaml(read_model(final / "model.safetensors").config.to_dict()))
        _write(final / "prompt_style.yaml", _yaml({"style": style}))
        write_json(final / "tokenizer.json", self.tokenizer.spec())
        progress.line(f"The finished model: {final}; talk to it by: twingrad chat --model {final}")
        results: dict[str, Any] = {"dropped": [{"entry": number, "reason": reason} for number, reason in self.dropped]}
        if self.asked.eval.final_validation:
            loss = evaluate(engine, self.validation_loader)
            results |= {"final_val_loss": loss, "final_val_ppl": float(np.exp(loss))}
        return results

    def file_name(self, weights: str) -> str:
        return f"{FINAL}/model"

    def _hyperparameters(self) -> str:
        return to_yaml(dataclasses.replace(self.asked, resume=False))

    def _write_metrics(self, path: Path) -> None:
        """The log's rows that are due, or that a validation is in."""
        log, every = read_log(path.with_name(LOG)), self.asked.train.log_interval
        report = Report(Progress(), every)
        report.iterations = self.iterations
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(
            ["iter", "step", "epoch", "tokens", "learning_rate", "loss", "norm", "train_loss", "val_loss", "val_ppl"]
        )
        for i, step in enumerate(log["step"].astype(int).tolist()):
            train_loss, val_loss = log["train_loss"][i], log["val_loss"][i]
            if not report.due(step) and math.isnan(val_loss):
                continue
            known = [log[name][i] for name in ("lr", "loss", "norm")]
            numbers = [*known, train_loss, val_loss, np.exp(val_loss)]
            counts = [self.iterations(step), step, float(log["epoch"][i]), int(log["tokens"][i])]
            table.writerow([*counts, *("" if math.isnan(value) else float(value) for value in numbers)])
        _write(path, text.getvalue())


def _split_file(folder: Path, name: str) -> Path:
    """The file of a folder that holds this part of the entries."""
    paths = [folder / f"{name}{ending}" for ending in (".json", ".jsonl")]
    for path in paths:
        if path.is_file():
            return path
    raise UserError(f"data.json_path: {folder} holds no {paths[0].name}, expected train.json and val.json")


def _yaml(values: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(json.loads(json.dumps(values)), sort_keys=False)


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())
