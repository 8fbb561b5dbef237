"""Likelihoods against transformers' GPT-2, in both engines, and what must hold for any text."""

import io
import math
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt import tokenizers
from gpt.engine import create_engine
from gpt.errors import UserError
from gpt.evaluate.likelihood import Likelihood, continuation_logps, perplexity, rolling_logps, windows
from gpt.evaluate.progress import Bar, Lines, create_progress
from gpt.llm import LLM
from gpt.tokenizers import ByteTokenizer
from reference.config import GPTConfig
from reference.init import initialize
from reference.torch_rng import Generator
from tests.gpt.evaluate.fakes import Thinks, thinks

CONTEXT = 24  # of the model in conftest.py
EOT = 256
TEXT = "No one could have believed, in the last years of the nineteenth century, that this world was watched."
LINES = st.text("abc é\n", max_size=40)
same_model = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)


def close(found, expected):
    return found == pytest.approx(expected, rel=1e-6, abs=1e-6)


def expected_logp(peer_logps, ids, count):
    """What transformers has for the last `count` of ids, after the last CONTEXT ones before each."""
    window = ids[-(CONTEXT + 1) :]
    table = peer_logps(window[:-1])
    scores = table[np.arange(len(window) - 1), window[1:]][-count:]
    return scores.sum(), bool((table.argmax(axis=1) == window[1:])[-count:].all())


@pytest.mark.parametrize(
    "context, continuation",
    [
        ("The answer is", " yes"),
        ("The answer is ", "yes"),  # the space belongs to the answer
        ("", "alone"),
        (" \n", "after white space"),
        ("a context that is much longer than the model can read", " end"),
        ("é", "ü€"),
    ],
)
def test_a_continuation_has_the_likelihood_that_transformers_gives_it(llm, peer_logps, context, continuation):
    (found,) = continuation_logps(llm, [(context, continuation)])
    before = context.rstrip()
    ids = list((context + continuation).encode())
    scored = len(ids) - len(before.encode())
    logp, greedy = expected_logp(peer_logps, ids if before else [EOT, *ids], scored)
    assert close(found.logp, logp)
    assert found[1:] == (scored, len(continuation.encode()), greedy)


def test_one_token_after_the_same_context_is_scored_as_in_a_batch_of_its_own(llm, peer_logps):
    pairs = [(context, letter) for context in ("What?", "A longer question?") for letter in "ABCD"]
    found = continuation_logps(llm, pairs, batch_size=3)
    for (context, letter), score in zip(pairs, found, strict=True):
        logp, greedy = expected_logp(peer_logps, list((context + letter).encode()), 1)
        assert close(score.logp, logp)
        assert score[1:] == (1, 1, greedy)
    best = chr(peer_logps(list(b"What?"))[-1][:128].argmax())
    most = peer_logps(list(b"What?"))[-1].argmax()
    assert [score.greedy for score in continuation_logps(llm, [("What?", best), ("What?", "~")])] == [
        most == ord(best),
        most == ord("~"),
    ]


def test_the_letters_behind_a_question_cost_one_reading():
    llm = thinks(lambda ids: np.eye(257)[65])
    found = continuation_logps(llm, [("Q", letter) for letter in "ABCDE"])
    assert llm.engine.rows == 1
    assert [score.greedy for score in found] == [True, False, False, False, False]
    total = math.log(math.e + 256)
    assert [score.logp for score in found] == pytest.approx([1 - total, *[-total] * 4])


def test_a_continuation_longer_than_the_context_is_read_in_windows(llm, peer_logps):
    (found,) = continuation_logps(llm, [("Why", TEXT)])
    assert found.n_tokens == found.n_bytes == len(TEXT)
    ids = list(("Why" + TEXT).encode())
    total = sum(expected_logp(peer_logps, ids[:end], end - start)[0] for _, start, end in windows(len(ids), 3, CONTEXT))
    assert close(found.logp, total)


def test_a_text_that_brings_the_token_before_it_needs_no_other(llm):
    brought, alone, end = continuation_logps(llm, [("", "<|endoftext|>abc"), ("", "abc"), ("", "<|endoftext|>")])
    assert (brought.logp, brought.n_tokens) == (pytest.approx(alone.logp, rel=1e-9), 3)
    assert end.n_tokens == 1  # itself, behind another one


def test_an_empty_continuation_is_certain(llm):
    assert continuation_logps(llm, [("a", ""), ("", ""), ("a ", "")]) == [Likelihood(0.0, 0, 0, True)] * 3
    assert continuation_logps(llm, []) == []


@same_model
@given(pairs=st.lists(st.tuples(LINES, LINES), max_size=6), batch_size=st.integers(1, 5))
def test_neither_the_batch_size_nor_the_neighbours_matter(llm, pairs, batch_size):
    together = continuation_logps(llm, pairs, batch_size)
    alone = [continuation_logps(llm, [pair], 1)[0] for pair in pairs]
    assert [score[1:] for score in together] == [score[1:] for score in alone]
    assert [score.logp for score in together] == pytest.approx([score.logp for score in alone], rel=1e-9)


@same_model
@given(texts=st.lists(LINES, max_size=4), batch_size=st.integers(1, 5))
def test_the_batch_size_does_not_matter_to_whole_texts(llm, texts, batch_size):
    together = rolling_logps(llm, texts, batch_size)
    assert [score.n_tokens for score in together] == [len(text.encode()) for text in texts]
    alone = [rolling_logps(llm, [text], 1)[0].logp for text in texts]
    assert [score.logp for score in together] == pytest.approx(alone, rel=1e-9)


@given(st.integers(0, 200), st.integers(1, 20), st.integers(1, 30), st.data())
def test_windows_predict_each_token_once_with_all_the_context_there_is(length, first, width, data):
    stride = data.draw(st.none() | st.integers(1, width))
    found = list(windows(length, first, width, stride))
    assert [i for _, predicted, end in found for i in range(predicted, end)] == list(range(first, length))
    for number, (begin, predicted, end) in enumerate(found):
        assert 0 <= begin < predicted < end <= length
        assert end - begin - 1 == min(width, end - 1)  # as much context as fits
        assert end - predicted <= (width if number == 0 or stride is None else stride)


def test_a_text_by_itself_is_read_as_transformers_reads_it(llm, peer_logps):
    ids = [EOT, *TEXT.encode()]
    total = sum(expected_logp(peer_logps, ids[:c], c - b)[0] for _, b, c in windows(len(ids), 1, CONTEXT))
    (found, empty) = rolling_logps(llm, [TEXT, ""])
    assert close(found.logp, total)
    assert found[1:3] == (len(TEXT), len(TEXT))
    assert empty == Likelihood(0.0, 0, 0, True)


def test_the_perplexity_is_that_of_the_text_by_itself(llm):
    (whole,) = rolling_logps(llm, [TEXT])
    found = perplexity(llm, TEXT, batch_size=2)
    assert (found.tokens, found.bytes) == (len(TEXT), len(TEXT))
    assert found.perplexity == pytest.approx(math.exp(-whole.logp / len(TEXT)), rel=1e-9)
    assert found.bits_per_byte == pytest.approx(-whole.logp / len(TEXT) / math.log(2), rel=1e-9)


@pytest.mark.parametrize("stride", [1, 5, 23, 24])
def test_a_stride_gives_each_window_context(llm, peer_logps, stride):
    ids, total, done = [EOT, *TEXT.encode()], 0.0, 1
    while done < len(ids):  # the loop of Hugging Face's guide, counted from the end of each window
        end = min(len(ids), CONTEXT + 1 if done == 1 else done + stride)
        total += expected_logp(peer_logps, ids[:end], end - done)[0]
        done = end
    assert close(perplexity(llm, TEXT, stride).nats_per_token, -total / len(TEXT))


def test_a_file_has_the_perplexity_of_its_text(llm, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    assert perplexity(llm, path) == perplexity(llm, TEXT)


def test_uniform_logits_have_the_vocabulary_as_perplexity():
    llm = thinks(lambda ids: np.zeros(257), context=7)
    found = perplexity(llm, "é" * 50)
    assert found.perplexity == pytest.approx(257)
    assert found.bits_per_byte == pytest.approx(math.log2(257))
    assert (found.tokens, found.bytes) == (100, 100)


def test_an_impossible_text_has_an_infinite_perplexity():
    barely = thinks(lambda ids: np.eye(257)[0] * 2000)
    found = perplexity(barely, "abc")
    assert (found.perplexity, found.nats_per_token) == (math.inf, pytest.approx(2000))
    never = thinks(lambda ids: np.where(np.arange(257) == 0, 0, -np.inf))
    assert perplexity(never, "abc").bits_per_byte == math.inf


def test_what_is_not_a_number_is_refused():
    llm = thinks(lambda ids: np.full(257, np.nan))
    for ask in (
        lambda: perplexity(llm, "abc"),
        lambda: rolling_logps(llm, ["abc"]),
        lambda: continuation_logps(llm, [("a", "b")]),
        lambda: continuation_logps(llm, [("a", "b"), ("a", "c")]),
    ):
        with pytest.raises(UserError, match="not a number; the model's parameters are broken"):
            ask()


class NoEnd(ByteTokenizer):
    """Bytes without a token that ends a text."""

    n_vocab, eot = 256, None

    def encode(self, text, allowed_special=()):
        return list(text.encode())


def test_without_a_token_that_begins_a_text_the_first_is_not_predicted():
    llm = LLM(Thinks(lambda ids: np.zeros(256), vocab_size=256), NoEnd())
    assert rolling_logps(llm, ["abcd"])[0] == (pytest.approx(-3 * math.log(256)), 3, 3, True)
    assert perplexity(llm, "abcd").tokens == 3
    with pytest.raises(UserError, match="context: expected a text, got an empty one"):
        continuation_logps(llm, [("", "a")])
    with pytest.raises(UserError, match="at least one token to predict"):
        perplexity(llm, "a")


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="TIKTOKEN_CACHE_DIR names no folder with GPT-2's")
def test_a_token_over_the_seam_is_predicted():
    tokenizer = tokenizers.load("gpt2")
    config = GPTConfig(tokenizer.n_vocab, 16, 8, 1, 1)
    llm = LLM(create_engine("numpy", config, initialize(config, Generator(1), "gpt2"), dtype="float64"), tokenizer)
    assert len(tokenizer.encode("the cat")) == len(tokenizer.encode("the ca")) == 2
    found = continuation_logps(llm, [("the ca", "t"), ("the", " cat"), ("ca", "t"), ("", "cat")])
    assert [score.n_tokens for score in found] == [1, 1, 1, 1]
    assert found[0].logp == pytest.approx(found[1].logp)
    assert found[2].logp == pytest.approx(found[3].logp)
    # The space that ends a context is part of the next word's token.
    (moved,) = continuation_logps(llm, [("the ", "cat")])
    assert moved == (pytest.approx(found[1].logp), 1, 3, found[1].greedy)


@pytest.mark.parametrize("stride", [0, -1, CONTEXT + 1])
def test_an_impossible_stride_is_refused(llm, stride):
    with pytest.raises(UserError, match=f"stride: expected from 1 to the model's context length {CONTEXT}"):
        perplexity(llm, "abc", stride)


def test_bad_input_is_one_clear_line(llm, tmp_path):
    with pytest.raises(UserError, match="batch_size: expected at least 1, got 0"):
        rolling_logps(llm, ["a"], batch_size=0)
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(UserError, match=r"empty\.txt: expected at least one token"):
        perplexity(llm, empty)
    with pytest.raises(UserError, match="cannot read"):
        perplexity(llm, tmp_path / "none.txt")


def test_progress_is_lines_where_there_is_no_terminal(llm):
    out = io.StringIO()
    perplexity(llm, TEXT * 3, batch_size=1, progress=create_progress("tokens", out))
    lines = out.getvalue().splitlines()
    total = math.ceil(len(TEXT) * 3 / CONTEXT) * CONTEXT  # the last window begins in the one before it
    assert 2 <= len(lines) <= 10
    assert lines[-1].startswith(f"{total:,} of {total:,} tokens  (")
    assert lines[-1].endswith(" tokens/s, 0:00 left)")
    assert isinstance(create_progress("tokens", out), Lines)


def test_progress_is_a_bar_on_a_terminal(llm):
    from rich.console import Console

    out = io.StringIO()
    perplexity(llm, TEXT * 3, progress=Bar(Console(file=out, force_terminal=True, width=100), "tokens"))
    assert "tokens/s" in out.getvalue()
