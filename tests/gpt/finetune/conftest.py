"""Tokenizers, data sets and small runs that the tests of finetuning share."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt import tokenizers
from gpt.cli import main
from gpt.train.checkpoint import load_checkpoint
from gpt.train.log import read_log
from gpt.train.progress import Progress
from gpt.weights.native import save_model
from reference import PRESETS
from reference.init import initialize
from reference.torch_rng import Generator

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def data_folder():
    if "TWINGRAD_DATA" not in os.environ:
        pytest.skip("TWINGRAD_DATA names no folder with the data sets")
    return Path(os.environ["TWINGRAD_DATA"])


@pytest.fixture(scope="session")
def gpt2():
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        pytest.skip("TIKTOKEN_CACHE_DIR names no folder with GPT-2's vocabulary")
    return tokenizers.load("gpt2")


@pytest.fixture(scope="session")
def bytes_tokenizer():
    return tokenizers.load("bytes")


@pytest.fixture(params=["numpy", "torch"])
def engine(request):
    if request.param == "torch":
        pytest.importorskip("torch", reason="PyTorch is not installed")
    return request.param


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A file of weights to begin with, of a small model that was never trained."""
    path = tmp_path_factory.mktemp("base") / "small.safetensors"
    config = PRESETS["bytes-tiny"].replace(emb_dim=24, n_heads=2)
    save_model(path, initialize(config, Generator(5), "gpt2"), config, tokenizers.load("bytes").spec())
    return path


@pytest.fixture
def labelled(tmp_path):
    """A file of texts that one word tells apart."""
    rng = np.random.default_rng(0)
    path = tmp_path / "texts.tsv"
    words = ["apple", "bread", "cloud", "door", "earth", "fish", "green", "house", "ink", "jam"]
    rows = []
    for i in range(120):
        text = " ".join([*rng.choice(words, 2), ("WIN", "tea")[i % 2], *rng.choice(words, rng.integers(3))])
        rows.append(f"{('spam', 'ham')[i % 2]}\t{text}\n")
    path.write_text("".join(rows))
    return path


@pytest.fixture
def instructions(tmp_path):
    """A file of instructions to repeat a word."""
    words = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen", "ibex", "jay", "kite", "lion", "mole", "newt"]
    path = tmp_path / "instructions.json"
    entries = [{"instruction": f"Say {word}.", "input": "", "output": word} for word in words * 3]
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture
def pairs(tmp_path):
    """A file of answers, of which the polite one is chosen."""
    path = tmp_path / "pairs.json"
    entries = [
        {
            "instruction": f"Add 1 to {i}.",
            "chosen": f"Gladly: {i + 1}",
            "rejected": f"No. {i + 1}",
            "source": "ab"[i % 2],
        }
        for i in range(24)
    ]
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture
def twingrad(capsys):
    """Runs a command in this process and returns what it prints; one that ends in an error fails the test."""

    def run(*arguments):
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert status == 0, printed.err
        return printed.out

    return run


@pytest.fixture
def refused(capsys):
    """Runs a command that must end with status 2 and one line, which is returned."""

    def run(*arguments):
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        line = capsys.readouterr().err
        assert re.fullmatch(r"error: [^\n]+\n", line), line
        return line.removeprefix("error: ").rstrip("\n")

    return run


@pytest.fixture(scope="session")
def small():
    """Flags of a run that takes a second: a small model, with the engine to be named behind them."""
    sizes = ("--model.emb_dim", "24", "--model.n_heads", "2")
    return ("--preset", "bytes-tiny", *sizes, "--batch_size", "4", "--eval_every", "5", "--engine")


class InterruptAfter(Progress):
    """Sends this process Ctrl-C after a step."""

    def __init__(self, step):
        self.at, self.lines = step, []

    def step(self, row):
        if row.step == self.at:
            signal.raise_signal(signal.SIGINT)

    def line(self, text):
        self.lines.append(text)


@pytest.fixture
def interrupted_after():
    return InterruptAfter


@pytest.fixture(scope="session")
def assert_same_run():
    """Same last checkpoint, and same log but for the times."""

    def check(one, other):
        a, b = load_checkpoint(one), load_checkpoint(other)
        assert a.path.name == b.path.name
        assert a.state == b.state
        times = ("tokens_per_s", "seconds")
        logs = [{k: v for k, v in read_log(run).items() if k not in times} for run in (one, other)]
        for mine, theirs in ((a.model.params, b.model.params), (a.optimizer, b.optimizer), logs):
            assert mine.keys() == theirs.keys()
            for name in mine:
                np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)

    return check


@pytest.fixture
def command():
    """Starts a command in a process of its own, which is stopped when its `with` block is left."""

    @contextlib.contextmanager
    def start(*arguments):
        # One thread: the last bits of a product depend on how many share it.
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        argv = [sys.executable, "-m", "gpt", *map(str, arguments)]
        settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(argv, cwd=ROOT, env=environment, **settings) as process:
            try:
                yield process
            finally:
                process.kill()

    return start
