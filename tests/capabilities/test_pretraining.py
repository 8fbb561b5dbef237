"""Chapter 5 of the book and its notes at a small size: train, watch, decode, save, go on elsewhere."""

import math
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from gpt import tokenizers
from gpt.data import load_text
from gpt.data.random_batches import RandomBatches
from gpt.data.windows import WindowLoader
from gpt.engine import Batch, OptimizerConfig, create_engine
from gpt.generate import Sampling, generate, next_token, sample_probabilities
from gpt.train.checkpoint import load_checkpoint, save_checkpoint
from gpt.train.config import TrainConfig
from gpt.train.trainer import Trainer, evaluate
from gpt.weights.load import load
from gpt.weights.native import save_model
from reference import PRESETS
from reference.init import initialize
from reference.torch_rng import Generator
from tests.capabilities import demonstrations
from tests.figures.chapter5 import LOGITS, WORDS

ROOT = Path(__file__).parents[2]
BYTES = tokenizers.load("bytes")
TINY = PRESETS["bytes-tiny"].replace(context_length=32)
PARAGRAPH = (
    "A paragraph to be learnt by heart: the quick brown fox jumps over the lazy dog, while five boxing wizards, "
    "vexed by such a daft waltz, quietly pack my box with a dozen liquor jugs; sphinxes of black quartz judge my vow. "
)
needs_data = pytest.mark.skipif("TWINGRAD_DATA" not in os.environ, reason="TWINGRAD_DATA names no folder of texts")


@pytest.fixture(params=["numpy", "torch"])
def name(request):
    if request.param == "torch":
        pytest.importorskip("torch")
    return request.param


def small_engine(name, lr=3e-3, seed=123):
    params = initialize(TINY, Generator(seed), "gpt2")
    return create_engine(name, TINY, params, OptimizerConfig(lr=lr, weight_decay=0.0))


def ask(engine, text, n=40, **settings):
    """The text and n more bytes."""
    return BYTES.decode(generate(engine, np.array([BYTES.encode(text)]), Sampling(n, **settings))[0])


def learn_by_heart(engine, epochs):
    generator = Generator(1)
    loader = WindowLoader(BYTES.encode(PARAGRAPH), 4, 32, 8, shuffle=True, drop_last=True, generator=generator)
    config = TrainConfig(epochs=epochs, eval_every=0, schedule="constant")
    return Trainer(engine, config, loader, lr=3e-3, generator=generator).run(), loader


def test_overfitting_a_paragraph_ends_in_reciting_it(name):
    engine, beginning = small_engine(name), PARAGRAPH[40:56]
    assert ask(engine, beginning, 16) not in PARAGRAPH
    result, loader = learn_by_heart(engine, epochs=60)
    assert evaluate(engine, loader) < 0.2
    assert ask(engine, beginning, 16) in PARAGRAPH
    assert result.tokens == 60 * len(loader) * 4 * 32


def test_greedy_texts_are_the_same_again_and_again(name):
    engine = small_engine(name)
    assert len({ask(engine, "a") for _ in range(3)}) == 1
    assert len({ask(engine, "a", temperature=1.5, top_k=1, seed=seed) for seed in range(3)} | {ask(engine, "a")}) == 1


@needs_data
def test_a_story_is_learnt_better_than_chance(name):
    text = load_text("tiny-shakespeare")[:200_000]
    generator = Generator(1)
    train, validation = (
        RandomBatches(BYTES.encode(part), 16, 32, generator, 40) for part in (text[:180_000], text[180_000:])
    )
    engine = small_engine(name)
    before = evaluate(engine, validation, 4)
    assert before == pytest.approx(math.log(257), abs=0.1)
    Trainer(engine, TrainConfig(steps=40, eval_every=0), train, lr=3e-3, generator=generator).run()
    assert evaluate(engine, validation, 4) < before - 1.5


def test_an_evaluation_takes_as_many_batches_as_it_is_told_and_nan_says_there_were_none():
    class Counting:
        def __init__(self):
            self.seen = 0

        def loss(self, batch):
            self.seen += 1
            return float(batch.inputs[0, 0])

    loader = WindowLoader(np.arange(101), 1, 10, 10, shuffle=False, drop_last=True)
    engine = Counting()
    assert evaluate(engine, loader, 3) == (0 + 10 + 20) / 3
    assert engine.seen == 3
    assert evaluate(engine, loader, 99) == 45
    loader.epoch = lambda: iter(())
    assert math.isnan(evaluate(engine, loader))


def test_saved_parameters_give_the_same_bits_and_the_same_text(name, tmp_path):
    engine = small_engine(name)
    save_model(tmp_path / "model.safetensors", engine.parameters(), TINY, BYTES.spec())
    saved = load(tmp_path / "model.safetensors")
    again = create_engine(name, saved.config, saved.params)
    tokens = np.array([BYTES.encode("once more")])
    np.testing.assert_array_equal(again.logits(tokens), engine.logits(tokens))
    settings = {"temperature": 1.2, "top_k": 40, "seed": 9}
    assert ask(again, "once more", **settings) == ask(engine, "once more", **settings)


def test_saved_model_and_optimizer_take_the_same_next_step(name, tmp_path):
    def step(engine, seed):
        tokens = np.random.default_rng(seed).integers(0, 257, (2, 33))
        engine.accumulate(Batch(tokens[:, :-1], tokens[:, 1:]))
        engine.step(1e-3)

    engine = small_engine(name)
    for seed in range(3):
        step(engine, seed)
    save_checkpoint(tmp_path, "last", {"step": 3}, engine.parameters(), TINY, None, engine.optimizer_state())
    saved = load_checkpoint(tmp_path)
    again = create_engine(name, TINY, saved.model.params, OptimizerConfig(weight_decay=0.0))
    again.load_optimizer_state(saved.optimizer)
    for both in (engine, again):
        step(both, 3)
    for parameter, array in engine.parameters().items():
        np.testing.assert_array_equal(again.parameters()[parameter], array, err_msg=parameter)


CONTINUE = """
import sys
from tests.capabilities.test_pretraining import continued
continued(*sys.argv[1:])
"""


def continued(name, folder, stop):
    """Train up to `stop` steps of 8, from the folder's checkpoint if there is one."""
    generator = Generator(1)
    loader = WindowLoader(BYTES.encode(PARAGRAPH), 4, 32, 8, shuffle=True, drop_last=True, generator=generator)
    config = TrainConfig(steps=int(stop), eval_every=0, schedule="constant")
    trainer = Trainer(small_engine(name), config, loader, lr=3e-3, generator=generator, run_dir=folder)
    if any(Path(folder).glob("last-*")):
        trainer.resume()
    trainer.run()


def test_a_new_process_continues_bit_for_bit(name, tmp_path):
    continued(name, tmp_path / "whole", 8)
    continued(name, tmp_path / "parts", 5)
    command = [sys.executable, "-c", CONTINUE, name, str(tmp_path / "parts"), "8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole, parts = (load(tmp_path / folder).params for folder in ("whole", "parts"))
    for parameter, array in whole.items():
        np.testing.assert_array_equal(parts[parameter], array, err_msg=parameter)


def test_a_low_temperature_concentrates_on_the_most_probable_word():
    generator, sampling = Generator(123), Sampling(temperature=0.1)
    words = [WORDS[next_token(LOGITS, sampling, generator)] for _ in range(1000)]
    assert words.count("forward") > 950
    assert set(words) == {"forward", "toward"}


@pytest.mark.parametrize("temperature, probability", [(5.0, 0.0430), (1.0, 1.0e-4), (0.1, 0.0)])
def test_how_probable_pizza_is(temperature, probability):
    p = sample_probabilities(LOGITS, temperature)[WORDS.index("pizza")]
    assert p == pytest.approx(probability, abs=5e-5 if temperature > 1 else 5e-6)


def test_temperatures_are_plotted_as_bars(tmp_path):
    figure = demonstrations.plot_temperatures(tmp_path / "temperatures.pdf")
    (axes,) = figure.axes
    assert len(axes.containers) == 3
    assert [label.get_text() for label in axes.get_xticklabels()] == WORDS
    for bars in axes.containers:
        assert sum(bar.get_height() for bar in bars) == pytest.approx(1)
    assert (tmp_path / "temperatures.pdf").stat().st_size > 1000


def test_random_batches_of_a_text():
    loader = RandomBatches(np.arange(5000) % 4096, 4, 512, Generator(7))
    inputs, targets = next(iter(loader))
    assert inputs.shape == targets.shape == (4, 512)
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
    first, second = (list(islice(iter(RandomBatches(np.arange(900), 2, 8, Generator(7))), 3)) for _ in range(2))
    np.testing.assert_array_equal([batch.inputs for batch in first], [batch.inputs for batch in second])
