"""A training run from a RunConfig: builds text, tokenizer, model, engine and loaders from their names, and trains.

One random stream, seeded once, initializes the parameters and then orders the data (and drops elements, on request), as
in the book, where `torch.manual_seed` comes before the model is made. So a seed gives the same run in either engine.
"""

from __future__ import annotations

import contextlib
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from gpt import memory, parts, tokenizers, world
from gpt.data import (
    Loader,
    RandomBatches,
    TokenFile,
    WindowLoader,
    load_text,
    open_tokens,
    prepare,
    split_tokens,
)
from gpt.data.encoded import encode_split
from gpt.data.files import atomic_write, locked
from gpt.data.tokenfile import MAGIC, fingerprint
from gpt.data.workers import cores
from gpt.engine import STREAM_AGAIN, Engine, create_engine
from gpt.errors import UserError, is_installed
from gpt.generate import Sampling, generate
from gpt.options import did_you_mean, from_dict, read_yaml, to_dict, to_yaml
from gpt.plan import Setup, require_memory
from gpt.tokenizers import Tokenizer
from gpt.train import checkpoint
from gpt.train.config import LoaderConfig, ModelConfig, OptimizerConfig, RunConfig
from gpt.train.log import read_log
from gpt.train.plot import is_measured, plot_losses, plot_metric, save_plot
from gpt.train.progress import Progress, create_progress
from gpt.train.trackers import check_trackers, create_trackers
from gpt.train.trainer import Result, Trainer
from gpt.weights.load import load
from gpt.weights.native import SavedModel
from reference.config import PRESETS, GPTConfig
from reference.init import initialize
from reference.torch_rng import Generator

__all__ = [
    "again",
    "build",
    "carry_out",
    "check_folder",
    "check_memory",
    "make_engine",
    "model_config",
    "shared",
    "train",
]

Config = TypeVar("Config", bound=ModelConfig)

CONFIG, LOG, PLOT = "config.yaml", "log.csv", "loss"
# What a resumed run may change: on which engine it goes on, for how long, and how it is looked at. All else would make
# it another run, as would what is FIXED of `train` and `optimizer`.
FREE = (
    "engine", "precision", "compile", "checkpoint_activations", "parallel", "timeout", "out", "log_to", "resume",
    "prompt", "sample_tokens", "responses", "max_new_tokens", "keep_tokens", "optimizer", "train",
)  # fmt: skip
FIXED = ("train.seed", "train.first_eval", "train.accumulation", "optimizer.trained")


@dataclass(frozen=True)
class Corpus:
    """A text as token ids, split, and the tokenizer that made them."""

    tokenizer: Tokenizer
    train_ids: np.ndarray  # (N,)
    validation_ids: np.ndarray  # (M,)
    data: str  # which tokens these are, in a few words: their number and checksum


def train(config: RunConfig, progress: Progress | None = None) -> Result:
    """Train on a text, write the run's folder `config.out`, and return where the run ended. Raises UserError.

    A folder that holds a run already is refused unless `config.resume`; then the run goes on from its last checkpoint,
    where what makes it that run (data, model, seed, ...) must be the same, and how long or on which engine it goes on
    may differ. Processes that torchrun started all call this, and share the run.
    """
    command = f"{world.launcher()} train --config {Path(config.out, CONFIG)} --resume"
    config = again(config)
    with shared(config, command):
        progress = progress or create_progress()
        trainer, corpus = build(config, progress)
        tokens = len(corpus.train_ids) + len(corpus.validation_ids)
        result = carry_out(config, trainer, f"{config.data}: {tokens:,} tokens ({corpus.tokenizer.name})")
        if result.interrupted:
            progress.line(f"To go on: {command}")
    return result


def again(config: Config) -> Config:
    """The configuration; to be resumed where torchrun began this run itself, and now begins anew (--max-restarts)."""
    begun = world.remembered(config.out, config.timeout) and Path(config.out, CONFIG).exists()
    return replace(config, resume=True) if begun else config


@contextlib.contextmanager
def shared(config: ModelConfig, command: str) -> Iterator[None]:
    """Around a run of one process or several: these meet, agree on the configuration, and know when one is gone.

    `command`: with which the user can go on. Raises UserError, see also `check_folder`.
    """

    def go_on() -> str:
        return f"; go on with: {command}" if Path(config.out, CONFIG).exists() else ""

    with world.contact(go_on):
        world.start(config.timeout)
        world.same_on_all(to_dict(config), "options")
        world.together(lambda: check_folder(config))
        world.remember(config.out)  # a folder that was refused is not, so that it is refused after a restart too
        yield


def carry_out(config: Any, trainer: Trainer, data: str) -> Result:
    """Run a trainer from where its folder says, and leave there its configuration, its log and plots of it.

    `config`: a ModelConfig with `train`. `data`: what it learns from, in words.
    """
    out, progress = Path(config.out), trainer.progress
    progress.line(_describe(config, trainer, data))
    if config.resume and checkpoint.find_checkpoint(out, "last"):
        world.together(trainer.resume)
        progress.line(f"Goes on after step {trainer.step} of {trainer.total_steps}")
    run = {"model": trainer.engine.config.to_dict(), "data": data, "steps done": trainer.step}
    world.same_on_all(run | {"content": trainer.train_loader.state().get("data")}, "run")
    _same_weights(trainer.engine)
    lock = world.first(lambda: _own_folder(config))
    try:
        return _run(config, trainer)
    finally:
        if lock is not None:
            os.close(lock)


def _own_folder(config: Any) -> int:
    """What `locked` gives: from here on no other run writes there. One may have come since the folder was looked at."""
    lock = locked(Path(config.out), f"out: another run is writing {config.out}; wait for it, or give another folder")
    try:
        check_folder(config)
    except BaseException:
        os.close(lock)
        raise
    return lock


def _run(config: Any, trainer: Trainer) -> Result:
    out = Path(config.out)
    trainer.tracker = world.first(lambda: create_trackers(config.log_to, out, to_dict(config)))
    try:
        world.first(lambda: _write_config(config, out / CONFIG))
        result = trainer.run()
    except BaseException as error:
        # A RuntimeError may be of another process that is gone, which is to be said at once.
        if world.is_first() and not isinstance(error, RuntimeError):
            if isinstance(error, UserError):
                world.announce(str(error))
            with contextlib.suppress(Exception):  # on a full disk: what went wrong first is what is to be said
                _plot(out, trainer.metrics)
        if memory.is_lacking(error):
            raise UserError(
                f"memory: none is left after step {trainer.step} ({' '.join(str(error).split())}); a smaller "
                "batch_size with as much more accumulation takes less, and so does checkpoint_activations "
                "(see twingrad plan)"
            ) from error
        raise
    finally:
        if trainer.tracker:
            trainer.tracker.close()
    world.first(lambda: _plot(out, trainer.metrics))
    return result


def _same_weights(engine: Engine) -> None:
    """UserError where processes have other weights, such as from files of one name on several machines.

    They are told apart by what they say: logits that differ by more than what other processors make of the same.
    """
    if world.size() == 1:
        return
    everyones = world.exchange(engine.logits(np.zeros((1, 1), np.int64))[0])
    for rank, logits in enumerate(everyones):
        if not np.allclose(logits, everyones[0], rtol=0, atol=1e-3 * np.abs(everyones[0]).max(), equal_nan=True):
            raise UserError(f"weights: those of rank {rank} are other weights than rank 0's; all ranks need the same")


def _write_config(config: Any, path: Path) -> None:
    with atomic_write(path) as file:
        file.write(to_yaml(replace(config, resume=False)).encode())


def build(config: RunConfig, progress: Progress | None = None) -> tuple[Trainer, Corpus]:
    """The trainer of a run, before its first step, and the text it trains on. Writes nothing but a folder's tokens."""
    saved = world.together(lambda: load(config.weights) if config.weights else None)
    corpus = world.first_then_all(lambda: load_corpus(config, saved.tokenizer if saved else None))
    return world.together(lambda: _make_trainer(config, saved, corpus, progress)), corpus


def _make_trainer(config: RunConfig, saved: SavedModel | None, corpus: Corpus, progress: Progress | None) -> Trainer:
    model = model_config(config, corpus.tokenizer.n_vocab, saved)
    max_length = config.loader.max_length or model.context_length
    if max_length > model.context_length:
        raise UserError(
            f"max_length: expected at most the model's context_length {model.context_length}, got {max_length}"
        )
    check_memory(config, model, max_length, config.optimizer.trained)
    generator = Generator(config.train.seed)
    params: Mapping[str, Any] = saved.params if saved else initialize(model, generator, config.init)
    loaders = [
        _loader(config.loader, split, ids, max_length, generator, corpus.data)
        for split, ids in (("training", corpus.train_ids), ("validation", corpus.validation_ids))
    ]
    return Trainer(
        make_engine(config, model, params),
        config.train,
        *loaders,
        lr=config.optimizer.lr,
        generator=generator,
        run_dir=config.out,
        tokenizer=corpus.tokenizer.spec(),
        sample=_sampler(config, corpus),
        progress=progress,
    )


def check_memory(
    config: Any,
    model: GPTConfig,
    length: int,
    trained: tuple[str, ...],
    objective: str = "cross_entropy",
    counted: int | None = None,
) -> None:
    """UserError, before anything large is made, where a step would take more than is free (gpt/plan.py).

    `config`: a ModelConfig with `loader` and `train`. `length`: tokens of its longest example. `trained`: patterns of
    the parameters that learn. `objective` and `counted` as in gpt.plan.Setup.
    """
    engine = config.engine if config.engine != "auto" else ("torch" if is_installed("torch") else "numpy")
    memory.return_freed()  # of an earlier run in this process
    on_gpu = memory.free_on_gpu() if engine != "numpy" else None
    free: float | None = on_gpu
    if on_gpu is None and (here := memory.free_bytes()) is not None:
        free = here / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # the processes of this machine share it
    if free is not None:
        setup = Setup(
            model, config.loader.batch_size, length, engine, config.dtype, config.precision, trained,
            config.train.accumulation, world.size(), config.parallel,
            config.checkpoint_activations, "cpu" if on_gpu is None else "cuda", parts.threads(), objective, counted,
        )  # fmt: skip
        require_memory(setup, free)


def make_engine(
    config: ModelConfig,
    model: GPTConfig,
    params: Mapping[str, Any],
    optimizer: OptimizerConfig | None = None,
    shared: bool = True,
) -> Engine:
    """The engine that a configuration asks for, with these parameters. `optimizer`: instead of the configuration's.

    `shared`: by the processes that there are, if there are several; else this process has it alone.
    """
    source = getattr(getattr(config, "train", None), "dropout_source", "philox")
    if config.checkpoint_activations and source != "philox":
        raise UserError(STREAM_AGAIN)
    try:
        return create_engine(
            config.engine, model, params, optimizer or config.optimizer, config.dtype,
            precision=config.precision, compile=config.compile, checkpoint_activations=config.checkpoint_activations,
            parallel=config.parallel if shared and world.size() > 1 else None,
        )  # fmt: skip
    except UserError as error:
        why = (
            " (model: fields that change the weights' shapes)"
            if config.weights and "expected shape" in str(error)
            else ""
        )
        raise UserError(f"{error}{why}") from None


def load_corpus(config: RunConfig, spec: Mapping[str, Any] | None = None) -> Corpus:
    """The text that `config.data` names, encoded and split. `spec`: of the tokenizer, where the config names none."""
    path, fraction = Path(config.data), config.loader.train_fraction
    default = tokenizers.from_spec(spec) if spec and not config.tokenizer else None
    if path.is_dir():
        return _split_file(_encode_folder(config, path, default), fraction)
    if path.is_file():
        with open(path, "rb") as file:
            if file.read(len(MAGIC)) == MAGIC:
                wanted = tokenizers.load(config.tokenizer) if config.tokenizer else default
                return _split_file(open_tokens(path, wanted), fraction)
    text = load_text(config.data)
    tokenizer = default or tokenizers.load(config.tokenizer or "bytes", text)
    train_ids, validation_ids = encode_split(text, tokenizer, fraction)
    crc32 = zlib.crc32(validation_ids.tobytes(), zlib.crc32(train_ids.tobytes()))
    return Corpus(tokenizer, train_ids, validation_ids, fingerprint(len(train_ids) + len(validation_ids), crc32))


def _encode_folder(config: RunConfig, folder: Path, default: Tokenizer | None) -> TokenFile:
    """The folder's texts as a token file in the run's folder, encoded when the run begins."""
    target, tokenizer = Path(config.out, "corpus.tokens"), default or tokenizers.load(config.tokenizer or "bytes")
    if (config.resume or not world.is_first()) and target.exists():
        return open_tokens(target, tokenizer)
    return prepare(folder, target, tokenizer, "*.txt", processes=cores())


def _split_file(file: TokenFile, fraction: float) -> Corpus:
    return Corpus(tokenizers.from_spec(file.tokenizer), *split_tokens(file.ids, fraction), file.fingerprint)


def model_config(config: ModelConfig, n_vocab: int, saved: SavedModel | None, classifies: bool = False) -> GPTConfig:
    """The architecture that a configuration asks for: the preset's or the loaded weights', and what it changes.

    `classifies`: weights that tell classes apart will do.
    """
    if config.preset not in PRESETS:
        names = ", ".join(PRESETS)
        raise UserError(f"preset: {config.preset!r} is not one of {names}{did_you_mean(config.preset, PRESETS)}")
    try:
        if saved:
            model = saved.config.replace(**config.model)
        else:
            model = PRESETS[config.preset].replace(**{"vocab_size": n_vocab, **config.model})
    except (TypeError, ValueError) as error:
        raise UserError(f"model: {error}") from None
    if model.n_outputs != model.vocab_size and not classifies:
        raise UserError(
            f"{config.weights or 'model'}: tells {model.n_outputs} classes apart, and cannot learn to write"
        )
    if model.vocab_size < n_vocab:
        raise UserError(f"vocab_size: the tokenizer has {n_vocab} tokens, and the model only {model.vocab_size}")
    return model


def _loader(
    config: LoaderConfig, split: str, ids: np.ndarray, max_length: int, generator: Generator, data: str
) -> Loader:
    """The loader of one split; the validation split is read in order, to its end."""
    training = split == "training"
    try:
        if config.sampling == "random":
            per_epoch = max(1, len(ids) // (config.batch_size * max_length))
            return RandomBatches(ids, config.batch_size, max_length, generator, per_epoch, data=data)
        shuffle, drop_last = training and config.shuffle, training and config.drop_last
        stride = config.stride or max_length
        return WindowLoader(ids, config.batch_size, max_length, stride, shuffle, drop_last, generator, data=data)
    except UserError as error:
        raise UserError(f"{split} split: {error}") from None


def _sampler(config: RunConfig, corpus: Corpus) -> Callable[[Engine], str]:
    """What a text sample is: the prompt's most probable continuation, on one line."""
    tokenizer = corpus.tokenizer
    words = tokenizer.decode(corpus.validation_ids[:100]).split()
    prompt = config.prompt or " ".join(words[1:5])  # the split may have cut the first
    ids = np.array([tokenizer.encode(prompt) or corpus.validation_ids[:1]], np.int64)
    sampling = Sampling(config.sample_tokens)
    return lambda engine: tokenizer.decode(generate(engine, ids, sampling)[0]).replace("\n", " ")


def check_folder(config: Any) -> None:
    """Refuse to overwrite a run, to resume what is none, or to resume it as another; and a tracker that is not there.

    `config`: a ModelConfig, whose class the run in the folder must have as well.
    """
    check_trackers(config.log_to)
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"out: {out} is a file, expected a folder")
    if not config.resume:
        if (out / CONFIG).exists() or (out / LOG).exists() or checkpoint.find_checkpoint(out, "last"):
            raise UserError(
                f"out: {out} already holds a run: go on with it by --resume, or give another folder by --out"
            )
        return
    if not (out / CONFIG).exists():
        raise UserError(f"resume: {out} holds no run, for there is no {CONFIG} in it")
    try:
        before, now = (to_dict(c) for c in (from_dict(type(config), read_yaml(out / CONFIG)), config))
    except UserError as error:
        raise UserError(f"{out / CONFIG}: another kind of run, or damaged: {error}") from None
    for name in [*(name for name in now if name not in FREE), *FIXED]:
        group, _, field = name.rpartition(".")
        was, wanted = (settings[group][field] if group else settings[name] for settings in (before, now))
        if was != wanted:
            raise UserError(f"resume: {name} of the run in {out} is {was}, not {wanted}; see {out / CONFIG}")


def _describe(config: ModelConfig, trainer: Trainer, data: str) -> str:
    engine = trainer.engine
    total, shapes = engine.config.n_parameters, engine.config.parameter_shapes()
    trained = sum(math.prod(shapes[name]) for name in engine.trained)
    learning = f", {trained:,} of them trained" if trained < total else ""
    processes = f" in {world.size()} processes ({config.parallel})" if world.size() > 1 else ""
    return (
        f"{data}; {config.weights or config.preset}: {total:,} parameters{learning}; "
        f"{engine.name} engine, {config.dtype}{processes}; "
        f"{trainer.total_steps:,} steps, {trainer.steps_per_epoch:,} an epoch; {config.out}"
    )


def _plot(out: Path, metrics: Sequence[str] = ()) -> None:
    """Draw the log as far as it goes: the loss, and each metric."""
    if (out / LOG).exists():
        log = read_log(out / LOG)
        if len(log["step"]):
            unit = "Loss" if metrics else "Loss (nats per token)"
            save_plot(plot_losses({out.name: log}, loss=unit), out / PLOT)
            for name in metrics:
                if is_measured(log, name):
                    save_plot(plot_metric(log, name), out / name)
