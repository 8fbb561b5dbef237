"""Sampling against hand-made logits, and continuations on a scripted engine and on both real ones."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from gpt.cli import main
from gpt.engine import create_engine
from gpt.errors import UserError
from gpt.generate import (
    GenerateConfig,
    Sampling,
    generate,
    generate_text,
    next_tokens,
    sample_probabilities,
    stream,
    until,
)
from gpt.tokenizers import ByteTokenizer
from gpt.train.checkpoint import save_parameters
from reference.config import PRESETS, GPTConfig
from reference.init import initialize
from reference.torch_rng import Generator

ROOT = Path(__file__).parents[2]
CONFIG = GPTConfig(31, 6, 24, 2, 3)
LOGITS = np.array([4.51, 0.89, -1.90, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79])  # the book's nine words


class Scripted:
    """An engine whose next token is a function of the tokens that it is shown."""

    def __init__(self, next_token, vocab_size=10, context_length=4):
        self.config = GPTConfig(vocab_size, context_length, 4, 1, 1)
        self.next_token, self.shown = next_token, []

    def logits(self, tokens):
        self.shown.append(tokens.copy())
        return np.eye(self.config.vocab_size)[[self.next_token(row) for row in tokens]]


def engines(dtype="float32"):
    params = initialize(CONFIG, Generator(5))
    return [create_engine(name, CONFIG, params, dtype=dtype) for name in ("numpy", "torch")]


def softmax(x):
    p = np.exp(x - x.max())
    return p / p.sum()


def test_temperature_scales_the_logits():
    for temperature in (0.1, 1.0, 5.0):
        np.testing.assert_allclose(sample_probabilities(LOGITS, temperature), softmax(LOGITS / temperature), rtol=1e-13)


def test_temperature_zero_is_the_largest_logit():
    np.testing.assert_array_equal(sample_probabilities(LOGITS, 0.0), np.eye(9)[3])


def test_a_vanishing_temperature_is_greedy_too():
    np.testing.assert_array_equal(sample_probabilities(LOGITS, 1e-308), np.eye(9)[3])


def test_top_k_keeps_exactly_k_with_ties():
    p = sample_probabilities(np.array([1.0, 3.0, 3.0, 3.0, 0.0]), top_k=2)
    np.testing.assert_array_equal(p, [0, 0.5, 0.5, 0, 0])


def test_of_many_ties_the_lowest_ids_are_kept():
    p = sample_probabilities(np.arange(5000) % 7, top_k=3)
    assert np.flatnonzero(p).tolist() == [6, 13, 20]


def test_top_k_beyond_the_vocabulary_keeps_all():
    np.testing.assert_array_equal(sample_probabilities(LOGITS, top_k=100), sample_probabilities(LOGITS))


def test_top_p_keeps_the_fewest_tokens_that_reach_p():
    logits = np.log([0.1, 0.4, 0.2, 0.3])
    np.testing.assert_allclose(sample_probabilities(logits, top_p=0.65), [0, 4 / 7, 0, 3 / 7])
    np.testing.assert_allclose(sample_probabilities(logits, top_p=0.75), [0, 4 / 9, 2 / 9, 3 / 9])
    np.testing.assert_allclose(sample_probabilities(logits, top_p=1e-9), [0, 1, 0, 0])
    np.testing.assert_array_equal(sample_probabilities(logits, top_p=1.0), sample_probabilities(logits))


def test_top_p_counts_what_top_k_leaves():
    logits = np.log([0.1, 0.4, 0.2, 0.3])
    np.testing.assert_allclose(sample_probabilities(logits, top_k=2, top_p=0.5), [0, 1, 0, 0])


def test_rows_are_independent():
    rows = np.stack([LOGITS, LOGITS[::-1]])
    together = sample_probabilities(rows, 1.3, top_k=4, top_p=0.8)
    np.testing.assert_array_equal(together[0], sample_probabilities(LOGITS, 1.3, 4, 0.8))
    np.testing.assert_array_equal(together[1], together[0][::-1])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_logits_are_refused(value):
    with pytest.raises(UserError, match="logits: not finite"):
        sample_probabilities(np.array([0.0, value]))


def test_a_thousand_draws_fall_as_the_book_prints_them():
    generator, sampling = Generator(123), Sampling(temperature=1.0)
    draws = [next_tokens(LOGITS[None], sampling, generator)[0] for _ in range(1000)]
    assert np.bincount(draws, minlength=9).tolist() == [73, 0, 0, 582, 2, 0, 0, 343, 0]


def test_draws_are_those_of_torch_multinomial():
    torch = pytest.importorskip("torch")
    logits = np.random.default_rng(1).normal(size=(3, 57)).astype(np.float32)
    theirs, ours = torch.Generator().manual_seed(9), Generator(9)
    for _ in range(20):
        p = torch.softmax(torch.from_numpy(logits) / 1.4, dim=-1)
        expected = torch.multinomial(p, 1, generator=theirs)[:, 0].numpy()
        np.testing.assert_array_equal(next_tokens(logits, Sampling(temperature=1.4), ours), expected)


def test_continuation_is_appended_to_the_whole_prompt_and_the_model_sees_its_context():
    engine = Scripted(lambda row: (row[-1] + 1) % 10)
    prompt = np.array([[9, 8, 7, 6, 5, 4], [0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(
        generate(engine, prompt, Sampling(max_new_tokens=3)), [[9, 8, 7, 6, 5, 4, 5, 6, 7], [0, 0, 0, 0, 0, 0, 1, 2, 3]]
    )
    assert [shown[0].tolist() for shown in engine.shown] == [[7, 6, 5, 4], [6, 5, 4, 5], [5, 4, 5, 6]]


def test_each_row_stops_for_itself():
    engine = Scripted(lambda row: row[-1] - 1)
    out = generate(engine, np.array([[3], [6], [5]]), Sampling(max_new_tokens=50, stop=1))
    np.testing.assert_array_equal(out, [[3, 2, 1, 1, 1], [6, 5, 4, 3, 2], [5, 4, 3, 2, 1]])


def test_a_stop_token_in_the_prompt_stops_nothing():
    engine = Scripted(lambda row: row[-1] - 1)
    np.testing.assert_array_equal(generate(engine, np.array([[5, 4]]), Sampling(2, stop=5)), [[5, 4, 3, 2]])


def test_a_row_that_stops_at_once_comes_back_as_it_was():
    engine = Scripted(lambda row: 7)
    np.testing.assert_array_equal(generate(engine, np.array([[1, 2]]), Sampling(stop=7)), [[1, 2]])


def test_no_new_tokens_gives_the_prompt():
    engine = Scripted(lambda row: 7)
    np.testing.assert_array_equal(generate(engine, np.array([[1, 2]]), Sampling(max_new_tokens=0)), [[1, 2]])
    assert not engine.shown


def test_tokens_come_one_by_one():
    engine = Scripted(lambda row: row[-1] + 1)
    tokens = stream(engine, np.array([[0], [2]]), Sampling(max_new_tokens=4))
    assert not engine.shown
    assert next(tokens).tolist() == [1, 3]
    assert len(engine.shown) == 1
    assert [new.tolist() for new in tokens] == [[2, 4], [3, 5], [4, 6]]


def test_until_cuts_at_the_first_stop():
    assert until(np.array([3, 1, 2, 1]), 1).tolist() == [3]
    assert until(np.array([3, 2]), 1).tolist() == [3, 2]
    assert until(np.array([3, 2]), None).tolist() == [3, 2]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"temperature": -0.1}, "temperature: .*-0.1"),
        ({"temperature": float("nan")}, "temperature: .*nan"),
        ({"temperature": float("inf")}, "temperature: .*inf"),
        ({"top_k": 0}, "top_k: .*0"),
        ({"top_p": 0.0}, "top_p: .*0.0"),
        ({"top_p": 1.1}, "top_p: .*1.1"),
        ({"max_new_tokens": -1}, "max_new_tokens: .*-1"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Sampling(**settings)


@pytest.mark.parametrize(
    "tokens, stop, message",
    [
        (np.zeros((1, 0), int), None, "at least one token"),
        (np.zeros(3, int), None, "shape"),
        (np.array([[3, 10]]), None, "id 10 is outside the vocabulary"),
        (np.array([[-1, 1, 1, 1, 1, 1, 1, 1, 1]]), None, "id -1 is outside the vocabulary"),
        (np.array([[0.5]]), None, "integers"),
        (np.array([[3]]), 10, "stop: id 10"),
    ],
)
def test_impossible_prompts_are_refused_before_the_first_token(tokens, stop, message):
    with pytest.raises(UserError, match=message):
        stream(Scripted(lambda row: 0), tokens, Sampling(stop=stop))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=40),
        Sampling(max_new_tokens=40, temperature=1.0, seed=1),
        Sampling(max_new_tokens=40, temperature=1.7, top_k=12, top_p=0.9, seed=2),
        Sampling(max_new_tokens=40, temperature=0.8, stop=3, seed=3),
    ],
)
def test_both_engines_write_the_same(sampling):
    pytest.importorskip("torch")
    prompt = np.arange(8).reshape(4, 2)
    ours, theirs = (generate(engine, prompt, sampling) for engine in engines())
    np.testing.assert_array_equal(ours, theirs)
    assert ours.shape[1] > 10


def test_the_seed_decides():
    numpy_engine = create_engine("numpy", CONFIG, initialize(CONFIG, Generator(5)))
    texts = [
        generate(numpy_engine, np.array([[1]]), Sampling(20, temperature=1.0, seed=seed)).tolist() for seed in (7, 7, 8)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_one_candidate_is_greedy_at_any_temperature():
    engine = create_engine("numpy", CONFIG, initialize(CONFIG, Generator(5)))
    prompt = np.array([[1, 2], [3, 4]])
    greedy = generate(engine, prompt, Sampling(12))
    np.testing.assert_array_equal(generate(engine, prompt, Sampling(12, temperature=1.5, top_k=1)), greedy)
    np.testing.assert_array_equal(generate(engine, prompt, Sampling(12)), greedy)


def test_a_higher_temperature_writes_more_varied_texts():
    engine = create_engine("numpy", CONFIG, initialize(CONFIG, Generator(5)))
    rows = np.ones((16, 1), int)

    def distinct_pairs(temperature):
        text = generate(engine, rows, Sampling(20, temperature))[:, 1:]
        return len({pair for row in text.tolist() for pair in pairwise(row)})

    distinct = [distinct_pairs(temperature) for temperature in (0.0, 0.3, 1.0, 3.0)]
    assert distinct == sorted(set(distinct))


@pytest.fixture
def checkpoint(tmp_path):
    config = PRESETS["bytes-tiny"]
    path = tmp_path / "model.safetensors"
    save_parameters(path, initialize(config, Generator(1)), config, ByteTokenizer().spec())
    return str(path)


def test_command_prints_the_same_text_on_both_engines(checkpoint, capsys):
    pytest.importorskip("torch")
    printed = []
    for engine in ("numpy", "torch"):
        options = [
            "--prompt",
            "def f",
            "--engine",
            engine,
            "--max_new_tokens",
            "30",
            "--temperature",
            "1",
            "--seed",
            "4",
        ]
        assert main(["generate", "--checkpoint", checkpoint, *options]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert printed[0].startswith("def f")
    assert len(printed[0]) > 20


def test_command_in_a_new_process_prints_what_the_library_gives(checkpoint):
    config = GenerateConfig(checkpoint, "x = ", "numpy", sampling=Sampling(20))
    options = ["--checkpoint", checkpoint, "--prompt", "x = ", "--max_new_tokens", "20", "--engine", "numpy"]
    command = [sys.executable, "-m", "gpt", "generate", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    assert done.stdout == (generate_text(config)[0] + "\n").encode(), done.stderr


def test_command_prints_several_samples(checkpoint, capsys):
    options = ["--prompt", "a", "--engine", "numpy", "--temperature", "2", "--samples", "3", "--max_new_tokens", "40"]
    assert main(["generate", "--checkpoint", checkpoint, *options]) == 0
    config = GenerateConfig(checkpoint, "a", "numpy", 3, Sampling(40, temperature=2.0))
    texts = generate_text(config)
    assert capsys.readouterr().out == "\n\n".join(texts) + "\n"
    assert len(set(texts)) == 3


def test_command_stops_where_the_model_ends_the_text(checkpoint):
    config = GenerateConfig(checkpoint, "a", "numpy", 8, Sampling(300, temperature=5.0, top_k=None))
    texts = [text.encode() for text in generate_text(config)]
    assert not any(b"<|endoftext|>" in text for text in texts)
    assert len({len(text) for text in texts}) > 1


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "prompt: "),
        (["--prompt", ""], "prompt: "),
        (["--prompt", "a", "--temperature", "-1"], "temperature: "),
        (["--prompt", "a", "--top_k", "0"], "top_k: "),
        (["--prompt", "a", "--top_p", "2"], "top_p: "),
        (["--prompt", "a", "--samples", "0"], "samples: "),
        (["--prompt", "a", "--checkpoint", "no/such/run"], "no/such/run"),
        (["--prompt", "a", "--temprature", "1"], "did you mean --temperature"),
    ],
)
def test_command_says_in_one_line_what_is_wrong(options, message, checkpoint, capsys):
    assert main(["generate", "--checkpoint", checkpoint, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
