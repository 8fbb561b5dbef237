"""What Weights & Biases and TensorBoard are told of a run, and what becomes of the run when they are not there.

Weights & Biases is a stand-in, which takes down what it hears; TensorBoard's files are real where tensorboardX is.
"""

import math
import struct
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from gpt.errors import UserError
from gpt.options import from_dict, parse_config, read_yaml, to_dict
from gpt.train.config import LoaderConfig, OptimizerConfig, RunConfig, TrainConfig
from gpt.train.log import Row, read_log
from gpt.train.progress import Progress
from gpt.train.run import train
from gpt.train.trackers import create_trackers

ROOT = Path(__file__).parents[3]
TEXT = "the quick brown fox jumps over the lazy dog, and the dog does not mind. " * 20
NUMBERS = {"loss/step", "lr", "gradient_norm", "tokens_per_s"}
LOSSES = {"loss/train", "loss/val"}
ROW = Row(step=3, epoch=0.5, tokens=64, lr=1e-3, loss=4.0, norm=2.0, tokens_per_s=100.0)


@pytest.fixture
def config(tmp_path):
    (tmp_path / "fox.txt").write_text(TEXT)
    return RunConfig(
        data=str(tmp_path / "fox.txt"),
        preset="bytes-tiny",
        model={"emb_dim": 12, "n_layers": 1, "n_heads": 2, "context_length": 16},
        engine="numpy",
        out=str(tmp_path / "run"),
        loader=LoaderConfig(batch_size=4),
        optimizer=OptimizerConfig(lr=1e-2),
        train=TrainConfig(steps=12, eval_every=5, sample_every=0),
    )


class Wandb(ModuleType):
    """As much of wandb as is used, and what it heard: `begun`, `heard` and `finished`."""

    def __init__(self):
        super().__init__("wandb")
        self.begun, self.heard, self.finished, self.breaks_at = [], [], 0, math.inf

    def init(self, **settings):
        self.begun.append(settings)
        return SimpleNamespace(log=self._log, finish=self._finish)

    def _log(self, numbers, step):
        if step >= self.breaks_at:
            raise ConnectionError("no route\nto host")
        self.heard.append((step, numbers))

    def _finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.fixture
def tensorboard(monkeypatch):
    """A stand-in for tensorboardX: its writers, each with the scalars that it was given."""
    writers = []

    class SummaryWriter:
        def __init__(self, logdir, purge_step):
            self.logdir, self.purge_step, self.scalars, self.closed = logdir, purge_step, [], False
            writers.append(self)

        def add_scalar(self, name, value, step):
            self.scalars.append((name, value, step))

        def close(self):
            self.closed = True

    module = ModuleType("tensorboardX")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    return writers


@pytest.mark.parametrize("engine", ["numpy", "torch"])
def test_wandb_hears_what_the_log_holds(config, wandb, engine):
    if engine == "torch":
        pytest.importorskip("torch", reason="PyTorch is not installed")
    config = replace(config, engine=engine, log_to=("wandb",))
    train(config, Progress())
    (begun,) = wandb.begun
    assert (begun["project"], begun["dir"], begun["config"]) == ("twingrad", config.out, to_dict(config))
    assert wandb.finished == 1
    log = read_log(config.out)
    columns = {"loss/step": "loss", "loss/train": "train_loss", "loss/val": "val_loss", "lr": "lr"}
    columns |= {"gradient_norm": "norm", "tokens_per_s": "tokens_per_s"}
    assert [step for step, _ in wandb.heard] == list(range(12))
    for step, numbers in wandb.heard:
        assert set(numbers) == (NUMBERS | LOSSES if step % 5 == 0 else NUMBERS)
        assert numbers == {name: log[columns[name]][step] for name in numbers}


def test_a_resumed_run_goes_on_in_the_same_place(config, wandb, tensorboard):
    config = replace(config, log_to=("wandb", "tensorboard"))
    train(replace(config, train=replace(config.train, steps=7)), Progress())
    assert from_dict(RunConfig, read_yaml(Path(config.out, "config.yaml"))).log_to == ("wandb", "tensorboard")
    train(replace(config, resume=True), Progress())
    first, second = wandb.begun
    assert first["id"] == second["id"]
    assert second["resume"] == "allow"
    assert [step for step, _ in wandb.heard] == list(range(12))
    assert [writer.purge_step for writer in tensorboard] == [0, 7]
    train(replace(config, out=config.out + "2"), Progress())
    assert wandb.begun[-1]["id"] != first["id"]


def test_trackers_may_be_asked_for_later_and_no_longer(config, wandb):
    for steps, log_to in ((4, ()), (8, ("wandb",)), (12, ())):
        now = replace(config, train=replace(config.train, steps=steps), log_to=log_to, resume=steps > 4)
        train(now, Progress())
    assert [step for step, _ in wandb.heard] == [4, 5, 6, 7]


def test_tensorboard_is_told_the_same(config, tensorboard):
    train(replace(config, log_to=("tensorboard", "tensorboard")), Progress())
    (writer,) = tensorboard
    assert writer.logdir == str(Path(config.out, "tensorboard"))
    assert writer.closed
    log = read_log(config.out)
    for name, column in (("loss/step", "loss"), ("loss/val", "val_loss"), ("lr", "lr")):
        expected = [(value, step) for step, value in enumerate(log[column]) if not math.isnan(value)]
        assert [(value, step) for heard, value, step in writer.scalars if heard == name] == expected


def test_tensorboard_s_own_files(config):
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    from tensorboardX.proto.event_pb2 import Event

    train(replace(config, log_to=("tensorboard",)), Progress())
    (path,) = Path(config.out, "tensorboard").iterdir()
    data, heard = path.read_bytes(), {}
    while data:  # length, its checksum, an event, its checksum
        (length,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        heard |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        data = data[16 + length :]
    assert {name for name, _ in heard} == NUMBERS | LOSSES
    log = read_log(config.out)
    assert [heard["loss/step", step] for step in range(12)] == pytest.approx(log["loss"])
    assert [step for name, step in heard if name == "loss/val"] == [0, 5, 10]


def test_one_that_fails_is_dropped_with_one_warning(config, wandb, tensorboard):
    wandb.breaks_at = 5
    with pytest.warns(UserWarning, match="^wandb failed") as caught:
        result = train(replace(config, log_to=("wandb", "tensorboard")), Progress())
    assert result.step == 12
    message = "wandb failed, and the run goes on without it (ConnectionError: no route to host)"
    assert [str(warning.message) for warning in caught] == [message]
    assert [step for step, _ in wandb.heard] == list(range(5))
    assert tensorboard[0].scalars[-1][2] == 11
    assert len(read_log(config.out)["step"]) == 12


def test_one_that_cannot_be_closed_is_a_warning(config, wandb, monkeypatch):
    monkeypatch.setattr(wandb, "_finish", lambda: 1 / 0)
    with pytest.warns(UserWarning, match="wandb failed at the end of the run .ZeroDivisionError"):
        assert train(replace(config, log_to=("wandb",)), Progress()).step == 12


def test_one_that_cannot_begin_is_an_error_after_which_one_may_try_again(config, wandb, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(wandb, "init", lambda **_: 1 / 0)
        with pytest.raises(UserError, match=r"^log_to: wandb cannot begin \(ZeroDivisionError"):
            train(replace(config, log_to=("wandb",)), Progress())
    assert train(replace(config, log_to=("wandb",)), Progress()).step == 12


@pytest.mark.parametrize(
    "name, message",
    [
        ("wandb", r"^this needs wandb, which is not installed: pip install 'twingrad\[wandb\]'$"),
        ("tensorboard", r"^this needs tensorboardX, which is not installed: pip install 'twingrad\[tensorboard\]'$"),
        ("wand", "^log_to: 'wand' is not one of wandb, tensorboard; did you mean wandb.$"),
    ],
)
def test_what_cannot_be_had_is_told_before_anything_is_done(config, tmp_path, monkeypatch, name, message):
    for module in ("wandb", "tensorboardX"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=message):
        train(replace(config, log_to=(name,)), Progress())
    assert not (tmp_path / "run").exists()


def test_nobody_is_told_unless_asked(config, wandb, tmp_path):
    create_trackers((), tmp_path / "nowhere", {}).log(ROW)
    assert not (tmp_path / "nowhere").exists()
    train(config, Progress())
    assert not wandb.begun


def test_only_what_is_known_is_told(wandb, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracker = create_trackers(["wandb"], tmp_path, {})
        tracker.log(ROW)
        tracker.log(replace(ROW, step=4, val_loss=3.5))
        tracker.close()
    assert wandb.heard == [
        (3, {"loss/step": 4.0, "lr": 1e-3, "gradient_norm": 2.0, "tokens_per_s": 100.0}),
        (4, {"loss/step": 4.0, "loss/val": 3.5, "lr": 1e-3, "gradient_norm": 2.0, "tokens_per_s": 100.0}),
    ]


def test_the_flag_may_be_given_several_times():
    argv = ["--log_to", "wandb", "--log_to", "tensorboard"]
    assert parse_config(RunConfig, argv, prog="twingrad train").log_to == ("wandb", "tensorboard")


def test_on_the_command_line(config, tmp_path):
    """A wandb of which the network goes away stands first on the path."""
    (tmp_path / "wandb.py").write_text(
        "class Run:\n"
        "    def log(self, numbers, step):\n"
        "        if step == 2: raise ConnectionError('gone')\n"
        "    def finish(self): pass\n"
        "def init(**settings): return Run()\n"
    )
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from gpt.cli import main; sys.exit(main(sys.argv[1:]))"
    flags = ["--data", config.data, "--preset", "bytes-tiny", "--engine", "numpy", "--steps", "4", "--stride", "8"]
    flags += ["--model.context_length", "16", "--out", config.out, "--log_to", "wandb"]
    done = subprocess.run([sys.executable, "-c", code, "train", *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "warning: wandb failed, and the run goes on without it (ConnectionError: gone)\n"
    assert len(read_log(config.out)["step"]) == 4
