"""Training on token files of different lengths in processes of their own: what they need of memory is the same.

What is measured is memory that is the process's own (RssAnon): pages mapped from a file are the system's, which takes
them back when it wants them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt import tokenizers
from gpt.data.tokenfile import write_tokens

ROOT = Path(__file__).parents[3]
MIB = 1 << 20
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads how much memory a process has from /proc")

TRAIN = """
import json, sys
from gpt.train.config import LoaderConfig, RunConfig, TrainConfig
from gpt.train.progress import Progress
from gpt.train.run import build

def own():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon"))

class Watch(Progress):
    peak = 0
    def step(self, row):
        self.peak = max(self.peak, own())

watch = Watch()
model = {"emb_dim": 16, "n_layers": 1, "n_heads": 2, "context_length": 64}
trainer, corpus = build(RunConfig(
    data=sys.argv[1], preset="bytes-tiny", model=model, engine="numpy", out=sys.argv[2],
    loader=LoaderConfig(batch_size=64), train=TrainConfig(steps=40, eval_every=10, sample_every=0, save_best=False),
), watch)
first = own()
result = trainer.run()
windows = trainer.train_loader.n_windows
print(json.dumps({"peak": watch.peak, "built": first, "windows": windows, "tokens": result.tokens}))
"""


def train(tmp_path, n_tokens):
    """Train 40 steps on that many tokens, and say how much memory that took."""
    path = tmp_path / f"{n_tokens}.tokens"
    piece = np.random.default_rng(0).integers(0, 256, 1 << 20)
    pieces = (piece[: min(len(piece), n_tokens - at)] for at in range(0, n_tokens, len(piece)))
    write_tokens(path, pieces, tokenizers.load("bytes"))
    assert path.stat().st_size > 2 * n_tokens
    command = [sys.executable, "-c", TRAIN, str(path), str(tmp_path / f"run{n_tokens}")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path.unlink()
    return json.loads(done.stdout)


def check(small, large):
    assert large["tokens"] == small["tokens"] == 40 * 64 * 64
    assert large["peak"] < small["peak"] + 16 * MIB
    assert large["built"] < small["built"] + 4 * MIB


def test_a_file_of_200_mb_takes_no_more_memory_than_one_of_2_mb(tmp_path):
    small, large = train(tmp_path, 10**6), train(tmp_path, 10**8)
    assert large["windows"] > 1 << 20  # more than the order of which is drawn whole
    check(small, large)


@pytest.mark.slow
def test_a_billion_tokens_take_no_more_memory_than_a_million(tmp_path):
    check(train(tmp_path, 10**6), train(tmp_path, 10**9))
