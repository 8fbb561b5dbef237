"""Sampling against hand-made logits, and continuations on a scripted engine and on both real ones."""

from itertools import pairwise

import numpy as np
import pytest

from gpt.engine import create_engine
from gpt.errors import UserError
from gpt.generate import Sampling, Writer, generate, next_token, sample_probabilities, stream, until
from reference.config import GPTConfig
from reference.init import initialize
from reference.torch_rng import Generator

CONFIG = GPTConfig(31, 6, 24, 2, 3)
LOGITS = np.array([4.51, 0.89, -1.90, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79])  # the book's nine words


class Scripted:
    """An engine whose next token is a function of the tokens that it is shown, and of those it has in its cache."""

    class Cache:
        def __init__(self, rows):
            self.texts, self.lengths = [[] for _ in range(rows)], np.zeros(rows, int)

        def select(self, rows):
            self.texts, self.lengths = [self.texts[row] for row in rows], self.lengths[rows]

    def __init__(self, next_token, vocab_size=10, context_length=4):
        self.config = GPTConfig(vocab_size, context_length, 4, 1, 1)
        self.next_token, self.shown = next_token, []

    def new_cache(self, rows, capacity):
        assert capacity <= self.config.context_length
        return self.Cache(rows)

    def logits(self, tokens, cache=None, counts=None):
        self.shown.append(tokens.copy())
        counts = [tokens.shape[1]] * len(tokens) if counts is None else counts
        texts = [row[:n].tolist() for row, n in zip(tokens, counts, strict=True)]
        if cache is not None:
            cache.texts = texts = [old + new for old, new in zip(cache.texts, texts, strict=True)]
            cache.lengths = np.array(list(map(len, texts)))
            assert cache.lengths.max() <= self.config.context_length
        return np.eye(self.config.vocab_size)[[self.next_token(text) for text in texts]]


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
    draws = [next_token(LOGITS, sampling, generator) for _ in range(1000)]
    assert np.bincount(draws, minlength=9).tolist() == [73, 0, 0, 582, 2, 0, 0, 343, 0]


def test_draws_are_those_of_torch_multinomial():
    torch = pytest.importorskip("torch")
    logits = np.random.default_rng(1).normal(size=57).astype(np.float32)
    theirs, ours = torch.Generator().manual_seed(9), Generator(9)
    for _ in range(50):
        p = torch.softmax(torch.from_numpy(logits) / 1.4, dim=-1)
        expected = torch.multinomial(p, 1, generator=theirs).item()
        assert next_token(logits, Sampling(temperature=1.4), ours) == expected


def test_continuation_is_appended_to_the_whole_prompt_and_the_model_sees_its_context():
    engine = Scripted(lambda row: (row[-1] + 1) % 10)
    prompt = np.array([[9, 8, 7, 6, 5, 4], [0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(
        generate(engine, prompt, Sampling(max_new_tokens=3)), [[9, 8, 7, 6, 5, 4, 5, 6, 7], [0, 0, 0, 0, 0, 0, 1, 2, 3]]
    )
    assert [shown[0].tolist() for shown in engine.shown] == [[7, 6, 5, 4], [6, 5, 4, 5], [5, 4, 5, 6]]


def test_what_a_model_has_read_it_is_not_shown_again():
    engine = Scripted(lambda row: (row[-1] + 1) % 10, context_length=6)
    assert generate(engine, np.array([[1, 2, 3]]), Sampling(max_new_tokens=5)).tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert [shown[0].tolist() for shown in engine.shown] == [[1, 2, 3], [4], [5], [6], [2, 3, 4, 5, 6, 7]]


def test_a_row_that_has_ended_is_not_computed_any_more():
    engine = Scripted(lambda row: row[-1] - 1, context_length=20)
    out = generate(engine, np.array([[3], [6], [5]]), Sampling(max_new_tokens=50, stop_token=1))
    np.testing.assert_array_equal(out, [[3, 2, 1, 1, 1], [6, 5, 4, 3, 2], [5, 4, 3, 2, 1]])
    assert [len(shown) for shown in engine.shown] == [3, 3, 2, 2, 1]


def test_each_row_stops_for_itself():
    engine = Scripted(lambda row: row[-1] - 1)
    out = generate(engine, np.array([[3], [6], [5]]), Sampling(max_new_tokens=50, stop_token=1))
    np.testing.assert_array_equal(out, [[3, 2, 1, 1, 1], [6, 5, 4, 3, 2], [5, 4, 3, 2, 1]])


def test_a_stop_token_in_the_prompt_stops_nothing():
    engine = Scripted(lambda row: row[-1] - 1)
    np.testing.assert_array_equal(generate(engine, np.array([[5, 4]]), Sampling(2, stop_token=5)), [[5, 4, 3, 2]])


def test_a_row_that_stops_at_once_comes_back_as_it_was():
    engine = Scripted(lambda row: 7)
    np.testing.assert_array_equal(generate(engine, np.array([[1, 2]]), Sampling(stop_token=7)), [[1, 2]])


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
        ({"min_p": -0.1}, "min_p: .*-0.1"),
        ({"min_p": 1.5}, "min_p: .*1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: .*0.0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty: .*nan"),
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
        (np.array([[3]]), 10, "stop_token: id 10"),
    ],
)
def test_impossible_prompts_are_refused_before_the_first_token(tokens, stop, message):
    with pytest.raises(UserError, match=message):
        stream(Scripted(lambda row: 0), tokens, Sampling(stop_token=stop))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=40),
        Sampling(max_new_tokens=40, temperature=1.0, seed=1),
        Sampling(max_new_tokens=40, temperature=1.7, top_k=12, top_p=0.9, seed=2),
        Sampling(max_new_tokens=40, temperature=0.8, stop_token=3, seed=3),
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


@pytest.mark.parametrize("engine", ["numpy", "torch"])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=40),
        Sampling(max_new_tokens=40, temperature=1.3, top_k=20, top_p=0.95, min_p=0.01, repetition_penalty=1.2),
    ],
)
def test_with_and_without_a_cache_texts_are_the_same_also_beyond_the_context(engine, sampling):
    pytest.importorskip("torch")
    config = GPTConfig(31, 24, 24, 2, 4, n_kv_heads=2)
    engine = create_engine(engine, config, random_parameters(config))
    prompts = [np.arange(n) % 31 for n in (1, 7, 23, 24, 30)]
    texts = [write(Writer(engine, prompts, sampling, cached=cached)) for cached in (True, False)]
    assert texts[0] == texts[1]
    assert max(map(len, texts[0])) == 70


@pytest.mark.parametrize("engine", ["numpy", "torch"])
def test_what_is_written_for_a_prompt_does_not_depend_on_the_prompts_beside_it(engine):
    pytest.importorskip("torch")
    config = GPTConfig(31, 40, 24, 2, 4, n_kv_heads=2)
    engine = create_engine(engine, config, random_parameters(config), dtype="float64")
    sampling = Sampling(60, temperature=1.5, stop_token=3)
    prompts = [np.arange(n) % 29 for n in (5, 1, 17, 39, 40)]
    together = write(Writer(engine, prompts, sampling, [Generator(seed) for seed in (9, 4, 9, 1, 2)]))
    alone = [
        write(Writer(engine, [prompt], sampling, [Generator(seed)]))[0]
        for prompt, seed in zip(prompts, (9, 4, 9, 1, 2), strict=True)
    ]
    assert together == alone
    assert len({len(text) - len(prompt) for text, prompt in zip(alone, prompts, strict=True)}) > 1  # some ended early


def test_logits_with_a_cache_are_those_without():
    pytest.importorskip("torch")
    tokens = np.random.default_rng(0).integers(0, 31, (3, 6))
    for engine in engines("float64"):
        cache = engine.new_cache(3, 6)
        first = engine.logits(tokens[:, :4], cache, np.array([4, 2, 3]))
        for row, count in enumerate((4, 2, 3)):
            np.testing.assert_allclose(first[row], engine.logits(tokens[row : row + 1, :count])[0], atol=1e-12)
        second = engine.logits(tokens[:, 4:5], cache)
        whole = np.concatenate([tokens[1, :2], tokens[1, 4:5]])[None]
        np.testing.assert_allclose(second[1], engine.logits(whole)[0], atol=1e-12)
        cache.select(np.array([2, 0]))
        third = engine.logits(tokens[[2, 0], 5:], cache)
        np.testing.assert_allclose(third[1], engine.logits(tokens[:1])[0], atol=1e-12)
        with pytest.raises(UserError, match="expected 1 to 0 positions, got 1"):
            engine.logits(tokens[:2, :1], cache)


def random_parameters(config):
    rng = np.random.default_rng(3)
    return {name: rng.normal(0, 0.3, shape) for name, shape in config.parameter_shapes().items()}


def write(writer):
    while writer.running:
        writer.step()
    return writer.texts


def warped(logits, text, **settings):
    """What transformers makes of logits with the same settings, as probabilities."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    chain = transformers.generation.LogitsProcessorList()
    if "repetition_penalty" in settings:
        chain.append(transformers.generation.RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"]))
    chain.append(transformers.generation.TemperatureLogitsWarper(settings.get("temperature", 1.0)))
    if "top_k" in settings:
        chain.append(transformers.generation.TopKLogitsWarper(settings["top_k"]))
    if "top_p" in settings:
        chain.append(transformers.generation.TopPLogitsWarper(settings["top_p"]))
    if "min_p" in settings:
        chain.append(transformers.generation.MinPLogitsWarper(settings["min_p"]))
    scores = chain(torch.tensor([text]), torch.from_numpy(logits)[None].double())
    return torch.softmax(scores, dim=-1)[0].numpy()


class Fixed:
    """Records the probabilities that it is asked to draw from."""

    def multinomial(self, p):
        self.p = p
        return np.array([p.argmax()])


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6, "temperature": 1.4},
        {"repetition_penalty": 1.3, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    ],
)
def test_probabilities_are_those_of_transformers(settings):
    rng = np.random.default_rng(5)
    for _ in range(20):
        logits, text = 2 * rng.normal(size=61), rng.integers(0, 61, 9).tolist()
        drawn = Fixed()
        next_token(logits, Sampling(**{"temperature": 1.0, **settings}), drawn, text)
        np.testing.assert_allclose(drawn.p, warped(logits, text, **settings), atol=1e-12)


def test_a_repetition_penalty_counts_for_greedy_too():
    assert next_token(np.array([1.0, 0.9, -5.0]), Sampling(repetition_penalty=1.2), None, [0]) == 1
    assert next_token(np.array([-1.0, -1.1, -5.0]), Sampling(repetition_penalty=1.2), None, [0, 0]) == 1
