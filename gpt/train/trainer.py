"""The training loop, for either engine: it knows the engine's protocol and the loaders', and nothing below them.

A step sums the gradients of its micro-batches, each the gradient of a mean over the micro-batch's counted tokens, with
weights n_i / sum(n): the result is the gradient of the mean over all counted tokens of the step, whatever the split.

Where several processes share a run (gpt/world.py), all go through the same steps, and the first alone logs, tells and
writes. They stop together: a signal that one has seen all act upon.

Everything that a step depends on is in the checkpoint (parameters, moments, step, position in the data, state of the
random stream), so a resumed run repeats the uninterrupted one bit for bit.
"""

from __future__ import annotations

import contextlib
import errno
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

from gpt import world
from gpt.data.loader import Loader
from gpt.engine import Arrays, Engine, Examples, NonFiniteError
from gpt.errors import UserError
from gpt.train import checkpoint
from gpt.train.config import TrainConfig
from gpt.train.log import Log, Row
from gpt.train.progress import Progress
from gpt.train.schedule import warmup_constant, warmup_cosine
from gpt.train.trackers import Tracker
from gpt.weights.native import save_model
from reference.philox import PhiloxNoise
from reference.torch_rng import Generator, StreamNoise

__all__ = ["Result", "Trainer", "evaluate"]


@dataclass(frozen=True)
class Result:
    """Where a run ended. Losses are the last known ones, nan where there was none."""

    step: int  # steps done, by all parts of a resumed run together
    tokens: int
    loss: float
    train_loss: float
    val_loss: float
    best_loss: float  # lowest validation loss
    interrupted: bool


Measure = Callable[[Engine, Any], Mapping[str, float]]


def loss_alone(engine: Engine, batch: Examples) -> Mapping[str, float]:
    """What is measured of a batch in evaluation mode where a task measures nothing else."""
    return {"loss": engine.loss(batch)}


def evaluate(engine: Engine, loader: Loader, batches: int | None = None) -> float:
    """The mean loss of `measured`."""
    return measured(engine, loader, batches)["loss"]


def measured(
    engine: Engine, loader: Loader, batches: int | None = None, measure: Measure = loss_alone
) -> dict[str, float]:
    """The means over batches of what `measure` gives, over the first `batches` of a fresh pass, or over all.

    As in the book, each batch counts the same in the loss, and each example (whatever a batch counts) in other metrics.
    A loader without batches gives a loss of nan, and nothing else.
    """
    found = [(measure(engine, batch), batch.counted) for batch in islice(loader.epoch(), batches)]
    if not found:
        return {"loss": math.nan}
    means = {"loss": sum(values["loss"] for values, _ in found) / len(found)}
    counted = sum(count for _, count in found)
    for name in found[0][0]:
        if name != "loss":
            means[name] = sum(values[name] * count for values, count in found) / counted if counted else math.nan
    return means


class Trainer:
    """Trains `engine` on `train_loader`. `run` trains to the end, `resume` first goes back to a checkpoint.

    lr          peak learning rate, where the warmup ends
    generator   the random stream that the loaders draw from; dropout too when `dropout_source` is "torch"
    run_dir     folder of the log and the checkpoints; None writes nothing
    tokenizer   the tokenizer's spec(), kept beside the parameters
    task        what the model is finetuned for, kept there too
    measure     called with the engine and a batch, returns its "loss" and the `metrics`, in evaluation mode
    metrics     the names of what it returns beside the loss
    sample      called with the engine, returns a text to show, if any
    tracker     told of each step beside the log; closed by whoever made it
    """

    def __init__(
        self,
        engine: Engine,
        config: TrainConfig,
        train_loader: Loader,
        validation_loader: Loader | None = None,
        *,
        lr: float,
        generator: Generator | None = None,
        run_dir: str | Path | None = None,
        tokenizer: Mapping[str, Any] | None = None,
        task: Mapping[str, Any] | None = None,
        measure: Measure = loss_alone,
        metrics: Sequence[str] = (),
        sample: Callable[[Engine], str] | None = None,
        progress: Progress | None = None,
        tracker: Tracker | None = None,
    ) -> None:
        if len(train_loader) == 0:
            raise UserError("train_loader: no batches to train on")
        if config.dropout_source == "torch" and generator is None:
            raise UserError("dropout_source: torch needs the generator that the loaders draw from")
        if config.dropout_source == "torch" and world.size() > 1:
            raise UserError(f"dropout_source: torch is one stream for one process, not {world.size()}; choose philox")
        self.engine, self.config, self.lr = engine, config, lr
        self.train_loader, self.validation_loader = train_loader, validation_loader
        self.generator, self.tokenizer, self.task = generator, tokenizer, task
        self.measure, self.metrics, self.sample = measure, metrics, sample
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.progress, self.tracker = progress or Progress(), tracker
        self.steps_per_epoch = math.ceil(len(train_loader) / config.accumulation)
        epochs = 1 if config.epochs is None else config.epochs
        self.total_steps = epochs * self.steps_per_epoch if config.steps is None else config.steps
        self.step = 0  # steps done
        self.tokens = self.examples = 0
        self.loss = self.train_loss = self.val_loss = math.nan
        self.best_loss = math.inf
        self._batches: Iterator[Examples] | None = None  # of the pass that is under way
        self._saved_step = -1
        self._began = 0.0  # on the clock of time.perf_counter, as if the run had never stopped

    def run(self) -> Result:
        """Train until the last step, or until Ctrl-C, SIGTERM, or the terminal is closed; then save and return.

        Raises NonFiniteError naming step, tensor and the last good checkpoint, UserError for a full disk, and
        world.LostContactError where another process is gone.
        """
        log = world.first(self._open_log)
        self._began = time.perf_counter() - (log.seconds if log else 0.0)
        self.progress.start(self.step, self.total_steps)
        try:
            with _Interrupt() as interrupt:
                self._snapshot()
                while self.step < self.total_steps and not interrupt.noticed():
                    row = self._step(interrupt)
                    if row is not None:
                        self._after_step(row, log, interrupt)
                self._save()
                if interrupt.noticed():
                    with interrupt.shown():
                        self._tell_how_to_go_on(interrupt.seen)
        finally:
            self.progress.close()
            if log:
                log.close()
        return self._result(bool(interrupt.seen))

    def _open_log(self) -> Log | None:
        """The run's log, in a folder without what a killed process left half-written."""
        if not self.run_dir:
            return None
        self.run_dir.mkdir(parents=True, exist_ok=True)
        checkpoint.clean(self.run_dir)
        splits = ("train", "val") if self.validation_loader is not None else ("train",)
        columns = [f"{split}_{name}" for split in splits for name in self.metrics]
        return Log(self.run_dir / "log.csv", self._number(self.step), columns)

    def resume(self, run_dir: str | Path | None = None) -> None:
        """Go back to the last checkpoint of `run_dir` (the trainer's own). Either engine may have written it."""
        found = checkpoint.load_checkpoint(run_dir or self.run_dir or "")
        if found.model.config != self.engine.config:
            raise UserError(f"{found.path}: its model differs: {_differences(found.model.config, self.engine.config)}")
        self.engine.load_parameters(found.model.params)
        try:
            self.engine.load_optimizer_state(found.optimizer)
        except UserError as error:
            raise UserError(f"{found.path}: other parameters learnt there: {error}") from None
        state = found.state
        try:
            self.step = self._saved_step = state["step"]
            self.tokens, self.examples = state["tokens"], state.get("examples", 0)
            self.loss, self.train_loss, self.val_loss = (_number(state[n]) for n in ("loss", "train_loss", "val_loss"))
            self.best_loss = math.inf if state["best_loss"] is None else state["best_loss"]
            if self.run_dir:  # a killed run may have got further, and kept its best
                self.best_loss = min(self.best_loss, checkpoint.best_loss(self.run_dir))
            self._go_to(state)
        except (KeyError, TypeError) as error:
            raise UserError(f"{found.path}: not a readable checkpoint ({type(error).__name__}: {error})") from None

    def learning_rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        config = self.config
        if config.schedule == "constant":
            return warmup_constant(step, self.lr, config.warmup_steps, config.initial_lr)
        floor = self.lr / 10 if config.min_lr is None else config.min_lr
        return warmup_cosine(step, self.total_steps, self.lr, config.warmup_steps, config.initial_lr, floor)

    def _step(self, interrupt: _Interrupt) -> Row | None:
        """One step; None, and nothing changed, if a signal came between its micro-batches."""
        config, started = self.config, time.perf_counter()
        position = self._position() if config.accumulation > 1 else {}
        if self._batches is None:
            self._batches = iter(self.train_loader)
        batches = list(islice(self._batches, config.accumulation))
        lr = self.learning_rate(self.step)
        max_norm = config.max_norm if self.step >= config.clip_from_step else None
        try:
            loss = self._accumulate(batches, interrupt)
            if loss is None:
                self.engine.forget_gradients()
                self._go_to(position)
                return None
            norm = self.engine.step(lr, max_norm)
        except NonFiniteError as error:
            last = checkpoint.find_checkpoint(self.run_dir, "last") if self.run_dir else None
            kept = f"last good checkpoint: {last}" if last else "there is no checkpoint yet"
            raise NonFiniteError(f"step {self._number(self.step)}: {error}; {kept}") from None
        n_tokens = sum(math.prod(batch.shape) for batch in batches)
        speed = n_tokens / max(time.perf_counter() - started, 1e-9)
        number = self._number(self.step)
        self.step, self.tokens, self.loss = self.step + 1, self.tokens + n_tokens, loss
        self.examples += sum(batch.examples for batch in batches)
        epoch = self.step / self.steps_per_epoch
        return Row(number, epoch, self.tokens, lr, loss, norm, tokens_per_s=speed, examples=self.examples)

    def _accumulate(self, batches: list[Examples], interrupt: _Interrupt) -> float | None:
        """Add up the step's gradient; mean loss over its counted tokens, or None if a signal came before the end."""
        counted = max(1, sum(batch.counted for batch in batches))
        loss, example = 0.0, 0
        for i, batch in enumerate(batches):
            weight, last = batch.counted / counted, i + 1 == len(batches)
            loss += weight * self.engine.accumulate(batch, weight, self._noise(example), last)
            example += batch.shape[0]
            if not last and interrupt.noticed():
                return None
        return loss

    def _noise(self, first_example: int) -> PhiloxNoise | StreamNoise:
        """Dropout of the micro-batch that starts at this example of the step."""
        if self.config.dropout_source == "torch":
            assert self.generator is not None
            return StreamNoise(self.generator)
        return PhiloxNoise(self.config.seed, self.step, first_example)

    def _snapshot(self) -> None:
        """Keep the parameters as they are now, if that is asked for (gpt/study/attention.py looks into them)."""
        every = self.config.study_every
        if every and self.run_dir and self.step % every == 0:
            path = self.run_dir / f"step-{self.step:08d}.safetensors"
            params = self.engine.parameters()
            world.first(lambda: save_model(path, params, self.engine.config, self.tokenizer, self.task))

    def _after_step(self, row: Row, log: Log | None, interrupt: _Interrupt) -> None:
        """Evaluation, the log, a checkpoint, which holds all that the step changed, a sample."""
        config = self.config
        epoch_over = self.step % self.steps_per_epoch == 0
        if epoch_over:
            assert self._batches is not None
            next(self._batches, None)  # lets the loader notice that the pass is over
            self._batches = None
        if config.eval_every and row.step % config.eval_every == 0:
            self._evaluate(row)
        row.seconds = time.perf_counter() - self._began
        if log:
            log.write(row)
        if self.tracker:
            self.tracker.log(row)
        with interrupt.shown():
            self.progress.step(row)
        self._snapshot()
        if _due(config.save_every, self.step, epoch_over):
            self._save()
        if self.sample and _due(config.sample_every, self.step, epoch_over) and (text := self.sample(self.engine)):
            with interrupt.shown():
                self.progress.line(text)

    def _evaluate(self, row: Row) -> None:
        self.train_loss = row.train_loss = self._measured("train", self.train_loader, row)
        if self.validation_loader is not None:
            self.val_loss = row.val_loss = self._measured("val", self.validation_loader, row)
        if row.val_loss < self.best_loss:
            self.best_loss = row.val_loss
            if self.run_dir and self.config.save_best:
                self._write("best")

    def _measured(self, split: str, loader: Loader, row: Row) -> float:
        """The loss on a split; what else is measured is noted in the row."""
        found = measured(self.engine, loader, self.config.eval_batches, self.measure)
        row.metrics |= {f"{split}_{name}": value for name, value in found.items() if name != "loss"}
        return found["loss"]

    def _save(self) -> None:
        """Write the last checkpoint, unless this step's is there."""
        if self.run_dir and self.step != self._saved_step:
            self._write("last", self.engine.optimizer_state())
            self._saved_step = self.step

    def _write(self, kind: checkpoint.Kind, optimizer: Arrays | None = None) -> None:
        folder, params, config = self.run_dir, self.engine.parameters(), self.engine.config
        assert folder is not None
        rest = params, config, self.tokenizer, optimizer, self.task
        world.first(lambda: checkpoint.save_checkpoint(folder, kind, self._state(), *rest))

    def _state(self) -> dict[str, Any]:
        """The checkpoint's JSON part."""
        losses = {name: _or_none(getattr(self, name)) for name in ("loss", "train_loss", "val_loss", "best_loss")}
        return {
            "step": self.step,
            "tokens": self.tokens,
            "examples": self.examples,
            **losses,
            **self._position(),
            "train": asdict(self.config),
            "lr": self.lr,
            "engine": self.engine.name,
        }

    def _position(self) -> dict[str, Any]:
        """Where data and random stream stand."""
        generator = None if self.generator is None else self.generator.state()
        return {"loader": self.train_loader.state(), "generator": generator}

    def _go_to(self, position: Mapping[str, Any]) -> None:
        self.train_loader.load_state(position["loader"])
        if self.generator is not None:
            self.generator.set_state(position["generator"])
        self._batches = None

    def _number(self, step: int) -> int:
        """The number that a step, counted from 0, has in the log and for the evaluation's cadence."""
        return step if self.config.first_eval == "zero" else step + 1

    def _tell_how_to_go_on(self, signal_name: str) -> None:
        where = f"; saved in {self.run_dir}, from where it can be resumed" if self.run_dir else "; nothing is saved"
        self.progress.line(f"Stopped by {signal_name} after {self.step} of {self.total_steps} steps{where}")

    def _result(self, interrupted: bool) -> Result:
        best = self.best_loss if math.isfinite(self.best_loss) else math.nan
        return Result(self.step, self.tokens, self.loss, self.train_loss, self.val_loss, best, interrupted)


HANGUP = getattr(signal, "SIGHUP", signal.SIGTERM)  # which Windows lacks


class _Interrupt:
    """Within it, the first SIGINT, SIGTERM or SIGHUP only leaves its name in `seen`; a second SIGINT raises
    KeyboardInterrupt. SIGHUP, of a terminal that is closed, stays ignored where it was (nohup).

    Signals reach the main thread alone, so in any other thread this does nothing.
    """

    def __init__(self) -> None:
        self.seen = ""
        self._number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Interrupt:
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM]
            if signal.getsignal(HANGUP) != signal.SIG_IGN:
                numbers.append(HANGUP)
            self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def noticed(self) -> bool:
        """Whether a signal came, to this process or to one that shares the run: all ask, and all hear the same."""
        number = world.any_of(self._number)
        if number:
            self.seen = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        return bool(number)

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Around what is shown: where terminal or reader has gone, that stops the run as a signal does."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            self._number = self._number or HANGUP

    def _note(self, number: int, _: FrameType | None) -> None:
        self._number = number
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _due(every: int | None, step: int, epoch_over: bool) -> bool:
    """None: at the end of each epoch; 0: never; n: after every n steps."""
    return epoch_over if every is None else every > 0 and step % every == 0


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _differences(saved: Any, ours: Any) -> str:
    """The fields in which two model configs differ."""
    ours = ours.to_dict()
    return ", ".join(f"{k} {v}, not {ours[k]}" for k, v in saved.to_dict().items() if v != ours[k])
