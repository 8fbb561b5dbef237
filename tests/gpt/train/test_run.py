"""Whole runs from a RunConfig: every kind of data, the run's folder, resuming, and what bad settings get."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gpt import tokenizers
from gpt.data import prepare
from gpt.errors import UserError
from gpt.options import from_dict, read_yaml, to_dict
from gpt.train import run
from gpt.train.checkpoint import find_checkpoint
from gpt.train.config import LoaderConfig, OptimizerConfig, RunConfig, TrainConfig
from gpt.train.log import read_log
from gpt.train.plot import plot_losses
from gpt.train.progress import Progress
from gpt.train.run import load_corpus, train
from gpt.train.trainer import Trainer
from gpt.weights.load import load

TEXT = "the quick brown fox jumps over the lazy dog, and the dog does not mind. " * 20
SMALL = {"emb_dim": 12, "n_layers": 1, "n_heads": 2, "context_length": 16}
ROOT = Path(__file__).parents[3]


class Heard(Progress):
    def __init__(self):
        self.lines, self.rows = [], []

    def line(self, text):
        self.lines.append(text)

    def step(self, row):
        self.rows.append(row)


@pytest.fixture
def config(tmp_path):
    (tmp_path / "fox.txt").write_text(TEXT)
    return RunConfig(
        data=str(tmp_path / "fox.txt"),
        preset="bytes-tiny",
        model=dict(SMALL),
        engine="numpy",
        out=str(tmp_path / "run"),
        loader=LoaderConfig(batch_size=4),
        optimizer=OptimizerConfig(lr=1e-2),
        train=TrainConfig(steps=30, eval_every=10),
    )


def test_a_run_leaves_its_folder(config, tmp_path):
    heard = Heard()
    result = train(config, heard)
    assert result.step == 30
    assert result.loss < 4.0  # of ln 257 = 5.5
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "best-00000021",
        "config.yaml",
        "last-00000030",
        "log.csv",
        "loss.pdf",
        "loss.png",
    ]
    assert from_dict(RunConfig, read_yaml(tmp_path / "run" / "config.yaml")) == config
    saved = load(tmp_path / "run")
    assert saved.config.vocab_size == 257
    assert tokenizers.from_spec(saved.tokenizer).name == "bytes"
    assert "1,440 tokens (bytes)" in heard.lines[0]
    assert len(heard.lines) == 1 + result.step // 20  # the head, and a sample for each epoch of 20 steps


def test_overfits_a_text_and_recites_it(config):
    """As the book's small run does: the text is learnt by heart, and a sample is found in it word for word."""
    heard = Heard()
    config = replace(
        config,
        model={**SMALL, "emb_dim": 32, "n_layers": 2},
        loader=LoaderConfig(batch_size=4, stride=5),
        optimizer=OptimizerConfig(lr=5e-3),
        train=TrainConfig(steps=200, eval_every=199, sample_every=200),
    )
    result = train(config, heard)
    assert result.train_loss < 0.5
    sample = heard.lines[-1]
    assert len(sample) > config.sample_tokens
    assert sample in TEXT


@pytest.mark.parametrize("kind", ["tokens", "folder", "random", "simple-v2", "gpt2"])
def test_every_kind_of_data(config, tmp_path, kind):
    if kind == "gpt2" and "TIKTOKEN_CACHE_DIR" not in os.environ:
        pytest.skip("needs GPT-2's BPE files in TIKTOKEN_CACHE_DIR")
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("a.txt", "b.txt"):
        (texts / name).write_text(TEXT)
    if kind == "tokens":
        prepare(texts, tmp_path / "corpus.tokens", tokenizers.load("bytes"))
        config = replace(config, data=str(tmp_path / "corpus.tokens"))
    elif kind == "folder":
        config = replace(config, data=str(texts))
    elif kind == "random":
        config = replace(config, loader=LoaderConfig(sampling="random", batch_size=4))
    else:
        config = replace(config, tokenizer=kind)
    heard = Heard()
    result = train(config, heard)
    assert result.step == 30
    assert not math.isnan(result.val_loss)
    expected = {"tokens": "2,881 tokens (bytes)", "folder": "2,881 tokens (bytes)", "random": "1,440 tokens (bytes)"}
    assert expected.get(kind, f"tokens ({kind})") in heard.lines[0]


def test_a_text_is_encoded_once(config, monkeypatch):
    config = replace(config, tokenizer="simple-v2")
    first = load_corpus(config)
    monkeypatch.setattr(tokenizers.SimpleTokenizerV2, "encode", None)
    second = load_corpus(config)
    assert second.tokenizer.spec() == first.tokenizer.spec()
    for split in ("train_ids", "validation_ids"):
        np.testing.assert_array_equal(getattr(first, split), getattr(second, split))
    with pytest.raises(TypeError):
        load_corpus(replace(config, loader=LoaderConfig(train_fraction=0.8)))
    Path(config.data).write_text(TEXT + "fox")
    with pytest.raises(TypeError):
        load_corpus(config)


def test_resumes_only_what_it_was(config, tmp_path):
    shorter = replace(config, train=replace(config.train, steps=7))
    train(shorter, Heard())
    with pytest.raises(UserError, match=r"run already holds a run: .*--resume"):
        train(config, Heard())
    for change, name in (
        ({"data": str(tmp_path / "other.txt")}, "data"),
        ({"model": {**SMALL, "n_layers": 2}}, "model"),
        ({"loader": LoaderConfig(batch_size=2)}, "loader"),
        ({"train": replace(config.train, seed=1)}, "train.seed"),
    ):
        with pytest.raises(UserError, match=f"^resume: {name} of the run in .* is "):
            train(replace(config, resume=True, **change), Heard())
    with pytest.raises(UserError, match=r"^resume: .*holds no run"):
        train(replace(config, resume=True, out=str(tmp_path / "elsewhere")), Heard())
    heard = Heard()
    assert train(replace(config, resume=True), heard).step == 30
    assert [row.step for row in heard.rows] == list(range(7, 30))
    assert heard.lines[1] == "Goes on after step 7 of 30"
    assert not from_dict(RunConfig, read_yaml(tmp_path / "run" / "config.yaml")).resume


@pytest.mark.parametrize("kind", ["token file", "text"])
def test_data_that_has_changed_is_not_resumed_on(config, tmp_path, kind):
    text = Path(config.data)
    if kind == "token file":
        config = replace(config, data=str(tmp_path / "fox.tokens"))
        prepare(text, Path(config.data), tokenizers.load("bytes"))
    train(replace(config, train=replace(config.train, steps=7)), Heard())
    text.write_text(TEXT.replace("mind", "care"))  # as long as it was
    if kind == "token file":
        prepare(text, Path(config.data), tokenizers.load("bytes"))
    expected = r"^cannot continue: the data has changed since the checkpoint, it was 1,440 tokens with .*, and is 1,440"
    with pytest.raises(UserError, match=expected) as error:
        train(replace(config, resume=True), Heard())
    assert "\n" not in str(error.value)


def test_a_run_killed_before_its_first_checkpoint_begins_again(config, tmp_path):
    train(replace(config, train=replace(config.train, steps=3)), Heard())
    folder = find_checkpoint(tmp_path / "run", "last")
    folder.rename(tmp_path / "moved")
    assert train(replace(config, resume=True), Heard()).step == 30
    assert read_log(tmp_path / "run")["step"].tolist() == list(range(30))


def test_what_ends_a_run_is_said_where_no_plot_can_be_written_either(config, tmp_path, monkeypatch):
    """On a full disk nothing can: the checkpoint is what the user must hear of."""

    def fail(what):
        raise UserError(f"cannot write {what}")

    monkeypatch.setattr(Trainer, "_save", lambda trainer: fail("checkpoint"))
    monkeypatch.setattr(run, "_plot", lambda out, metrics: fail("plot"))
    with pytest.raises(UserError, match="cannot write checkpoint"):
        train(config, Progress())
    monkeypatch.undo()
    monkeypatch.setattr(run, "_plot", lambda out, metrics: fail("plot"))
    with pytest.raises(UserError, match="cannot write plot"):
        train(replace(config, resume=True), Progress())


def test_both_engines_draw_one_curve(config, tmp_path):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    model = {**SMALL, "drop_rate": 0.1}
    for engine in ("numpy", "torch"):
        train(replace(config, engine=engine, model=model, dtype="float64", out=str(tmp_path / engine)), Heard())
    logs = {engine: read_log(tmp_path / engine) for engine in ("numpy", "torch")}
    np.testing.assert_allclose(logs["numpy"]["loss"], logs["torch"]["loss"], rtol=1e-9)
    plot_losses(logs)


def test_a_model_trains_without_torch(config, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_dict(config)))
    code = f"""
import json, sys
sys.modules["torch"] = None
from gpt.options import from_dict
from gpt.train.config import RunConfig
from gpt.train.run import train
assert train(from_dict(RunConfig, json.load(open({str(path)!r})))).step == 30
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"preset": "bytes-tinny"}, r"preset: 'bytes-tinny' is not one of .*did you mean bytes-tiny"),
        ({"data": "the-verdigt"}, "the-verdict"),
        ({"tokenizer": "gpt3"}, "unknown tokenizer 'gpt3'"),
        ({"model": {"n_heads": 5}}, "model: n_heads: 5 does not divide"),
        ({"model": {"n_head": 2}}, "model: n_head: no such field.*n_heads"),
        ({"model": {"vocab_size": 100}}, "vocab_size: the tokenizer has 257 tokens, and the model only 100"),
        ({"model": {"context_length": 2000}}, "training split: the text has 1296 tokens, but a window of 2000"),
        ({"model": {"context_length": 256}}, "validation split: the text has 144 tokens, but a window of 256"),
        ({"loader": LoaderConfig(train_fraction=0.9999)}, "validation split: the text has 1 tokens"),
        ({"loader": LoaderConfig(max_length=65)}, "max_length: expected at most the model's context_length 64, got 65"),
        ({"loader": LoaderConfig(batch_size=2000)}, "training split: drop_last leaves no batch"),
    ],
)
def test_bad_settings_get_one_line_and_leave_nothing(config, tmp_path, change, message):
    config = replace(config, model={}, **{k: v for k, v in change.items() if k != "model"})
    with pytest.raises(UserError, match=message) as error:
        train(replace(config, model=change.get("model", {})), Heard())
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_file_where_the_run_s_folder_should_be_is_left_alone(config, tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UserError, match="out: .*run is a file, expected a folder"):
        train(config, Heard())
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize(
    "group, option, value, expected",
    [
        (TrainConfig, "epochs", -1, "at least 0"),
        (TrainConfig, "accumulation", 0, "at least 1"),
        (TrainConfig, "max_norm", 0, "more than 0"),
        (TrainConfig, "eval_batches", 0, "at least 1"),
        (TrainConfig, "min_lr", -1e-4, "at least 0"),
        (TrainConfig, "initial_lr", 1e-4, "0, where there are no warmup_steps"),
        (TrainConfig, "seed", 2**64, r"less than 2\*\*64"),
        (TrainConfig, "schedule", "linear", "constant or cosine"),
        (TrainConfig, "first_eval", "two", "zero or one"),
        (LoaderConfig, "batch_size", 0, "at least 1"),
        (LoaderConfig, "train_fraction", 1.0, "between 0 and 1"),
        (LoaderConfig, "sampling", "all", "windows or random"),
        (RunConfig, "engine", "jax", "auto or numpy or torch or triton"),
        (RunConfig, "out", "", "the name of a folder"),
        (RunConfig, "data", "", "a name or a path"),
        (RunConfig, "timeout", math.inf, "more than 0, at most 1e9"),
    ],
)
def test_impossible_options_are_named(group, option, value, expected):
    with pytest.raises(UserError, match=f"^{option}: expected {expected}, got {value!r}$"):
        group(**{option: value})
    with pytest.raises(UserError, match="epochs or steps, not both"):
        TrainConfig(epochs=1, steps=1)
    with pytest.raises(UserError, match="min_lr: expected none, where the schedule is constant, got 0.001"):
        TrainConfig(schedule="constant", min_lr=1e-3)


def data_folder() -> Path:
    if "TWINGRAD_DATA" not in os.environ or "TIKTOKEN_CACHE_DIR" not in os.environ:
        pytest.skip("needs the-verdict.txt in TWINGRAD_DATA and GPT-2's BPE files in TIKTOKEN_CACHE_DIR")
    return Path(os.environ["TWINGRAD_DATA"])


def book_run(tmp_path, engine, **changes):
    """The book's training of GPT-2 124M on The Verdict: one stream for initialization, order and dropout."""
    data_folder()
    if engine == "torch" and importlib.util.find_spec("torch") is None:
        pytest.skip("PyTorch is not installed")
    options = TrainConfig(seed=123, dropout_source="torch", sample_every=0, save_every=0, save_best=False, **changes)
    lr = 1e-3 if "warmup_steps" in changes else 4e-4
    config = RunConfig(
        data="the-verdict",
        tokenizer="gpt2",
        preset="book-124m",
        model={"context_length": 256},
        init="book",
        engine=engine,
        out=str(tmp_path / "run"),
        optimizer=OptimizerConfig(lr=lr, weight_decay=0.1),
        train=options,
    )
    heard = Heard()
    from gpt.train.run import build

    build(config, heard)[0].run()
    return heard.rows


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "numpy"])
def test_the_books_first_evaluations(tmp_path, engine):
    rows = book_run(tmp_path, engine, steps=6, schedule="constant", max_norm=None, eval_every=5)
    steps = [10.999969, 9.857111, 9.318082, 9.268899, 8.963919, 8.603283]
    np.testing.assert_allclose([row.loss for row in rows], steps, atol=1e-3)
    evaluated = [(row.step, row.tokens, round(row.train_loss, 3), round(row.val_loss, 3)) for row in rows[::5]]
    assert evaluated == [(0, 512, 9.781, 9.933), (5, 3072, 8.111, 8.339)]


@pytest.mark.slow
def test_the_appendix_first_evaluations(tmp_path):
    """Warmup, cosine and clipping after the warmup only: as printed to three digits."""
    settings = {"warmup_steps": 10, "initial_lr": 1e-5, "min_lr": 1e-5, "max_norm": 1.0, "clip_from_step": 11}
    rows = book_run(tmp_path, "torch", epochs=1, eval_every=5, eval_batches=1, **settings)
    evaluated = [(row.step, round(row.train_loss, 3), round(row.val_loss, 3)) for row in rows if row.step % 5 == 0]
    assert evaluated == [(0, 10.934, 10.939), (5, 8.529, 8.843)]
