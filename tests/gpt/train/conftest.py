"""A trainer small enough to be run many times in a test."""

import importlib
import importlib.util

import numpy as np
import pytest

from gpt.data.windows import WindowLoader
from gpt.engine import OptimizerConfig, create_engine
from gpt.train.config import TrainConfig
from gpt.train.trainer import Trainer
from reference.config import GPTConfig
from reference.init import initialize
from reference.torch_rng import Generator

CONFIG = GPTConfig(29, 8, 12, 2, 3, emb_dropout=0.1, shortcut_dropout=0.1, attn_dropout=0.1)
# A text that can be learnt: the numbers below 29, in steps of 3, with a little noise.
TOKENS = (np.arange(250) * 3 + np.random.default_rng(0).integers(0, 2, 250)) % 29


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    """Encoded texts stay out of the user's cache."""
    monkeypatch.setenv("TWINGRAD_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def one_thread():
    """For PyTorch, to which threads cost more than arrays this small; afterwards it has them again."""
    if not importlib.util.find_spec("torch"):
        yield
        return
    torch = importlib.import_module("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_trainer(tmp_path, one_thread):
    def make(engine="numpy", run_dir=tmp_path / "run", dtype="float32", config=CONFIG, optimizer=None, **options):
        passed_on = {name: options.pop(name) for name in ("sample", "progress", "tokenizer") if name in options}
        precision = options.pop("precision", "full")
        settings = TrainConfig(**{"eval_every": 5, "eval_batches": 2, **options})
        optimizer = optimizer or OptimizerConfig(lr=1e-2)
        generator = Generator(settings.seed)
        params = initialize(config, generator, "book")
        loaders = [
            WindowLoader(ids, 4, 8, 4, shuffle, shuffle, generator)
            for ids, shuffle in ((TOKENS[:200], True), (TOKENS[200:], False))
        ]
        model = create_engine(engine, config, params, optimizer, dtype, precision=precision)
        return Trainer(model, settings, *loaders, lr=optimizer.lr, generator=generator, run_dir=run_dir, **passed_on)

    return make
