"""A run that was interrupted and resumed equals the one that was not, bit for bit; a killed one loses no checkpoint."""

import errno
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gpt.engine import OWN, OptimizerConfig
from gpt.errors import UserError
from gpt.train.checkpoint import find_checkpoint, load_checkpoint
from gpt.train.log import read_log
from gpt.train.progress import Progress
from reference.config import GPTConfig

TIMES = ("tokens_per_s", "seconds")


class InterruptAfter(Progress):
    """Sends the process a signal after a step."""

    def __init__(self, step, number=signal.SIGINT):
        self.at, self.number, self.lines = step, number, []

    def step(self, row):
        if row.step == self.at:
            signal.raise_signal(self.number)

    def line(self, text):
        self.lines.append(text)


@pytest.fixture(params=["numpy", "torch"])
def engine(request):
    if request.param == "torch":
        pytest.importorskip("torch", reason="PyTorch is not installed")
    return request.param


def assert_same_run(one: Path, other: Path, **tolerance) -> None:
    """Same last checkpoint, same best one, same log but for the times."""
    a, b = load_checkpoint(one), load_checkpoint(other)
    assert a.path.name == b.path.name
    pairs = [(a.model.params, b.model.params), (a.optimizer, b.optimizer)]
    if not tolerance:
        assert a.state == b.state
        assert find_checkpoint(one, "best").name == find_checkpoint(other, "best").name
    logs = [{name: column for name, column in read_log(run).items() if name not in TIMES} for run in (one, other)]
    for mine, theirs in (*pairs, logs):
        assert set(mine) == set(theirs)
        for name in mine:
            if tolerance:
                np.testing.assert_allclose(mine[name], theirs[name], err_msg=name, **tolerance)
            else:
                np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)


@pytest.mark.parametrize("source", ["philox", "torch"])
@pytest.mark.parametrize("stop, number", [(6, signal.SIGINT), (11, signal.SIGTERM), (12, signal.SIGHUP)])
def test_resumed_equals_uninterrupted(make_trainer, tmp_path, engine, source, stop, number):
    """Stopped in the middle of an epoch, at its end, and after the first step of the next."""
    settings = {"engine": engine, "epochs": 2, "dropout_source": source, "first_eval": "zero", "warmup_steps": 4}
    make_trainer(run_dir=tmp_path / "whole", **settings).run()
    heard = InterruptAfter(stop, number)
    parts = {**settings, "run_dir": tmp_path / "parts"}
    result = make_trainer(progress=heard, **parts).run()
    assert result.interrupted
    assert result.step == stop + 1
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    assert heard.lines[-1].startswith(f"Stopped by {name} after {stop + 1} of 24 steps; saved in {tmp_path / 'parts'}")
    trainer = make_trainer(**parts)
    trainer.resume()
    result = trainer.run()
    assert not result.interrupted
    assert result.step == 24
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("source", ["philox", "torch"])
def test_interrupted_between_micro_batches(make_trainer, tmp_path, engine, source, monkeypatch):
    """The step begun is given up; the same trainer may go on, or a fresh one."""
    settings = {"engine": engine, "epochs": 2, "accumulation": 5, "dropout_source": source}
    make_trainer(run_dir=tmp_path / "whole", **settings).run()
    for go_on in ("same", "fresh"):
        parts = {**settings, "run_dir": tmp_path / go_on}
        trainer = make_trainer(**parts)
        calls = 0
        accumulate = trainer.engine.accumulate

        def accumulate_and_signal(*args, accumulate=accumulate):
            nonlocal calls
            calls += 1
            if calls == 8:  # the third micro-batch of the second step
                signal.raise_signal(signal.SIGINT)
            return accumulate(*args)

        monkeypatch.setattr(trainer.engine, "accumulate", accumulate_and_signal)
        result = trainer.run()
        assert result.interrupted
        assert result.step == 1
        assert calls == 8
        assert find_checkpoint(tmp_path / go_on, "last").name == "last-00000001"
        if go_on == "fresh":
            trainer = make_trainer(**parts)
            trainer.resume()
        trainer.run()
        assert_same_run(tmp_path / "whole", tmp_path / go_on)


@pytest.mark.parametrize("first, second", [("numpy", "torch"), ("torch", "numpy")])
def test_continues_in_the_other_engine(make_trainer, tmp_path, first, second):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    settings = {"epochs": 2, "dtype": "float64"}
    make_trainer(first, tmp_path / "whole", **settings).run()
    make_trainer(first, tmp_path / "parts", progress=InterruptAfter(7), **settings).run()
    trainer = make_trainer(second, tmp_path / "parts", **settings)
    trainer.resume()
    trainer.run()
    assert_same_run(tmp_path / "whole", tmp_path / "parts", rtol=1e-6, atol=1e-9)


def scaled(trainer, init_scale):
    """The trainer, whose gradients' scale is this at first, and doubles after three steps that were taken."""
    torch = pytest.importorskip("torch")
    trainer.engine._scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=3)
    return trainer


@pytest.mark.parametrize("stop", [1, 13])
def test_the_scale_of_float16_gradients_is_kept(make_trainer, tmp_path, stop):
    """It begins too large, so that the first steps are skipped, then grows now and then. Other engines overlook it."""
    settings = {"engine": "torch", "precision": "float16", "epochs": 2}
    whole = scaled(make_trainer(run_dir=tmp_path / "whole", **settings), 2.0**40)
    whole.run()
    parts = {**settings, "run_dir": tmp_path / "parts"}
    first = scaled(make_trainer(progress=InterruptAfter(stop), **parts), 2.0**40)
    first.run()
    taken = int(first.engine.optimizer_state()["step"])
    assert taken < stop + 1
    trainer = scaled(make_trainer(**parts), 2.0**3)
    trainer.resume()
    assert trainer.engine._scaler.get_scale() == first.engine._scaler.get_scale() < 2.0**40
    trainer.run()
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    for name, precision in (("numpy", "full"), ("torch", "full"), ("torch", "bfloat16")):
        other = make_trainer(name, tmp_path / "parts", epochs=3, precision=precision)
        other.resume()
        assert not any(key.startswith(OWN) for key in other.engine.optimizer_state())


def test_float16_goes_on_from_a_checkpoint_without_a_scale(make_trainer, tmp_path):
    make_trainer("numpy", epochs=1).run()
    trainer = make_trainer("torch", precision="float16", epochs=2)
    trainer.resume()
    assert trainer.run().step == 24


def test_signals_are_given_back(make_trainer):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    make_trainer(epochs=1, progress=InterruptAfter(2)).run()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_a_closed_terminal_is_ignored_where_it_was_before(make_trainer, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup has it
    try:
        assert not make_trainer(epochs=1, progress=InterruptAfter(2, signal.SIGHUP)).run().interrupted
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("gone", [errno.EPIPE, errno.EIO], ids=["reader", "terminal"])
def test_a_run_that_nobody_hears_any_more_stops_and_is_saved(make_trainer, tmp_path, gone):
    class Gone(Progress):
        def step(self, row):
            if row.step >= 3:
                raise OSError(gone, "gone")

        def line(self, text):
            raise OSError(gone, "gone")

    result = make_trainer(epochs=1, save_every=0, progress=Gone()).run()
    assert (result.interrupted, result.step) == (True, 4)
    assert load_checkpoint(tmp_path / "run").state["step"] == 4


def test_a_second_ctrl_c_stops_at_once(make_trainer):
    class Impatient(InterruptAfter):
        def step(self, row):
            super().step(row)
            super().step(row)

    with pytest.raises(KeyboardInterrupt):
        make_trainer(epochs=1, progress=Impatient(3)).run()


def test_a_finished_run_resumes_to_nothing(make_trainer, tmp_path):
    first = make_trainer(epochs=1).run()
    before = (tmp_path / "run" / "log.csv").read_text()
    trainer = make_trainer(epochs=1)
    trainer.resume()
    again = trainer.run()
    assert (again.step, again.loss, again.best_loss) == (first.step, first.loss, first.best_loss)
    assert (tmp_path / "run" / "log.csv").read_text() == before


def test_a_longer_run_goes_on_from_a_shorter_one(make_trainer, tmp_path):
    settings = {"schedule": "constant", "eval_every": 5}
    make_trainer(run_dir=tmp_path / "whole", epochs=3, **settings).run()
    make_trainer(run_dir=tmp_path / "parts", epochs=1, **settings).run()
    trainer = make_trainer(run_dir=tmp_path / "parts", epochs=3, **settings)
    trainer.resume()
    trainer.run()
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("loss", [9.0, 0.0])
def test_the_best_of_a_run_that_was_killed_further_on_stays_until_a_lower_loss(make_trainer, tmp_path, loss):
    make_trainer(epochs=1).run()
    found = find_checkpoint(tmp_path / "run", "best")
    state = json.loads((found / "trainer.json").read_text())
    (found / "trainer.json").write_text(json.dumps({**state, "val_loss": loss, "best_loss": loss}))
    found.rename(tmp_path / "run" / "best-00000020")
    last = find_checkpoint(tmp_path / "run", "last") / "trainer.json"
    last.write_text(json.dumps({**json.loads(last.read_text()), "best_loss": 10.0}))
    trainer = make_trainer(epochs=2, eval_every=4)
    trainer.resume()
    assert trainer.best_loss == loss
    trainer.run()
    (best,) = (tmp_path / "run").glob("best-*")
    state = json.loads((best / "trainer.json").read_text())
    assert state["val_loss"] == trainer.best_loss
    assert (trainer.best_loss < loss) == (loss == 9.0)


def test_the_best_of_the_same_step_is_replaced(make_trainer, tmp_path):
    make_trainer(epochs=1, eval_every=4).run()
    before = find_checkpoint(tmp_path / "run", "best") / "model.safetensors"
    content = before.read_bytes()
    shutil.rmtree(find_checkpoint(tmp_path / "run", "last"))
    other = make_trainer(epochs=1, eval_every=4, optimizer=OptimizerConfig(lr=2e-2))
    other.run()
    assert find_checkpoint(tmp_path / "run", "best") == before.parent
    assert before.read_bytes() != content


def test_another_model_is_refused(make_trainer, tmp_path):
    make_trainer(epochs=1).run()
    with pytest.raises(UserError, match=r"last-00000012: its model differs: .*emb_dim 12, not 24"):
        make_trainer(epochs=1, config=GPTConfig(29, 8, 24, 2, 3)).resume()


def test_rows_after_the_checkpoint_are_dropped(make_trainer, tmp_path):
    """What a killed run had logged beyond its last checkpoint, and a line that a crash cut short, come again."""
    make_trainer(run_dir=tmp_path / "whole", epochs=2).run()
    make_trainer(run_dir=tmp_path / "parts", epochs=2, progress=InterruptAfter(9)).run()
    with open(tmp_path / "parts" / "log.csv", "a") as log:
        log.write("10,0.9,352,0.004,9.9,1,,,1,1\n11,1.0,38")
    trainer = make_trainer(run_dir=tmp_path / "parts", epochs=2)
    trainer.resume()
    trainer.run()
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


KILLED_RUN = """
import sys
import numpy as np
from gpt.data.windows import WindowLoader
from gpt.engine import OptimizerConfig, create_engine
from gpt.train.checkpoint import find_checkpoint
from gpt.train.config import TrainConfig
from gpt.train.trainer import Trainer
from reference.config import GPTConfig
from reference.init import initialize
from reference.torch_rng import Generator

config, generator = GPTConfig(29, 8, 12, 1, 3, attn_dropout=0.1), Generator(1)
params = initialize(config, generator, "book")
ids = np.arange(300) * 3 % 29
loaders = [WindowLoader(ids, 4, 8, 4, True, True, generator) for _ in range(2)]
settings = TrainConfig(steps=int(sys.argv[2]), save_every=1, eval_every=3, eval_batches=1)
engine = create_engine("numpy", config, params, OptimizerConfig(lr=1e-3))
trainer = Trainer(engine, settings, *loaders, lr=1e-3, generator=generator, run_dir=sys.argv[1])
if find_checkpoint(sys.argv[1], "last"):
    trainer.resume()
assert "torch" not in sys.modules
print("begins", flush=True)
trainer.run()
"""


def start(run_dir: Path, steps: int) -> subprocess.Popen:
    root = Path(__file__).parents[3]
    return subprocess.Popen(
        [sys.executable, "-c", KILLED_RUN, str(run_dir), str(steps)], cwd=root, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_sigkill_never_loses_the_last_checkpoint(tmp_path, kills):
    """Killed at random moments of a run that writes a checkpoint each step, and resumed, until it is through."""
    moments, steps, reached = random.Random(kills), 60 * kills, 0
    for _ in range(kills):
        process = start(tmp_path / "parts", steps)
        assert process.stdout.readline() == "begins\n"
        while find_checkpoint(tmp_path / "parts", "last") is None and process.poll() is None:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        process.wait()
        step = load_checkpoint(tmp_path / "parts").state["step"]
        assert step >= max(1, reached)
        reached = step
    for run_dir in ("parts", "whole"):
        process = start(tmp_path / run_dir, steps)
        process.communicate()
        assert process.returncode == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert sorted(path.name[:5] for path in (tmp_path / "parts").iterdir()) == ["best-", "last-", "log.c"]
