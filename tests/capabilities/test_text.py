"""From text to batches, as a reader of the book's chapter 2 and of the workshop does it."""

import os

import numpy as np
import pytest

from gpt import tokenizers
from gpt.data import load_text
from gpt.data.windows import WindowLoader
from gpt.engine import create_engine
from gpt.errors import UserError
from gpt.generate import Sampling, generate
from gpt.tokenizers.simple import PUNCTUATION, SimpleTokenizerV1, SimpleTokenizerV2, build_vocabulary, split
from reference import GPTConfig, embedding
from reference.init import initialize
from reference.torch_rng import Generator

needs_verdict = pytest.mark.skipif("TWINGRAD_DATA" not in os.environ, reason="TWINGRAD_DATA names no folder of texts")
needs_gpt2 = pytest.mark.skipif(
    "TIKTOKEN_CACHE_DIR" not in os.environ, reason="TIKTOKEN_CACHE_DIR names no folder with GPT-2's vocabulary"
)


@needs_verdict
@pytest.mark.parametrize("keep_whitespace, n_tokens, n_distinct", [(False, 4690, 1130), (True, 8405, 1132)])
def test_words_of_a_story(keep_whitespace, n_tokens, n_distinct):
    words = split(load_text("the-verdict"), PUNCTUATION, keep_whitespace)
    assert len(words) == n_tokens
    vocabulary = build_vocabulary(words)
    assert len(vocabulary) == n_distinct
    assert list(vocabulary.values()) == list(range(n_distinct))
    assert list(vocabulary) == sorted(vocabulary)


@needs_verdict
def test_unknown_words_of_a_question():
    story = load_text("the-verdict")
    with pytest.raises(KeyError, match="Hello"):
        SimpleTokenizerV1.from_text(story).encode("Hello, do you like tea?")
    tokenizer = SimpleTokenizerV2.from_text(story)
    text = "Hello, do you like tea? <|endoftext|> In the sunlit terraces of the palace."
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == "<|unk|>, do you like tea? <|endoftext|> In the sunlit terraces of the <|unk|>."
    assert ids.count(tokenizer.eot) == 1


@needs_gpt2
def test_a_made_up_word_is_made_of_known_pieces():
    tokenizer = tokenizers.load("gpt2")
    ids = tokenizer.encode("Akwirw ier")
    assert [tokenizer.decode([i]) for i in ids] == ["Ak", "w", "ir", "w", " ", "ier"]
    assert tokenizer.decode(ids) == "Akwirw ier"
    assert tokenizer.decode(tokenizer.encode("Moodeng deng oohlala")) == "Moodeng deng oohlala"


@needs_verdict
@needs_gpt2
def test_targets_are_the_inputs_shifted_by_one():
    ids = tokenizers.load("gpt2").encode(load_text("the-verdict"))
    assert len(ids) == 5145
    batch = next(iter(WindowLoader(ids[50:], 1, 4, 1, shuffle=False, drop_last=True)))
    assert batch.inputs.tolist() == [[290, 4920, 2241, 287]]
    assert batch.targets.tolist() == [[4920, 2241, 287, 257]]


@pytest.mark.parametrize(
    "max_length, stride, inputs",
    [(2, 2, [[0, 1], [2, 3], [4, 5], [6, 7]]), (8, 2, [list(range(i, i + 8)) for i in (0, 2, 4, 6)])],
)
def test_strides_without_and_with_overlap(max_length, stride, inputs):
    batch = next(iter(WindowLoader(np.arange(40), 4, max_length, stride, shuffle=False, drop_last=True)))
    assert batch.inputs.tolist() == inputs


@needs_verdict
@needs_gpt2
def test_a_story_makes_nine_training_batches_and_one_for_validation():
    from tests.figures.chapter5 import loaders

    train, validation = (list(loader) for loader in loaders(Generator(123)))
    assert (len(train), len(validation)) == (9, 1)
    assert sum(batch.counted for batch in train) == 4608
    assert sum(batch.counted for batch in validation) == 512
    # Shuffled and without its last, smaller batch, the validation part still makes one.
    ids = tokenizers.load("gpt2").encode(load_text("the-verdict")[18431:])
    assert len(WindowLoader(ids, 2, 256, 256, shuffle=True, drop_last=True, generator=Generator(123))) == 1


def test_an_embedding_is_a_product_with_one_hot_rows():
    weight, ids = Generator(123).normal((6, 3)), np.array([2, 3, 5, 1])
    y, saved = embedding.forward(ids, weight)
    one_hot = np.eye(6, dtype=np.float32)[ids]
    np.testing.assert_array_equal(y, one_hot @ weight)
    np.testing.assert_array_equal(y[1], weight[3])
    dy = np.arange(12.0).reshape(4, 3)
    np.testing.assert_array_equal(embedding.backward(dy, saved), one_hot.T @ dy)
    twice = embedding.backward(dy, embedding.forward(np.array([4, 4, 0, 4]), weight)[1])
    np.testing.assert_array_equal(twice[4], dy[0] + dy[1] + dy[3])


def test_token_and_position_embeddings_add_up():
    tokens = np.arange(32).reshape(8, 4)
    config = GPTConfig(50, 4, 256, 1, 4)
    params = initialize(config, Generator(123))
    tok, _ = embedding.forward(tokens, params["tok_emb.weight"])
    pos, _ = embedding.forward(np.arange(4), params["pos_emb.weight"])
    assert (tok.shape, pos.shape, (tok + pos).shape) == ((8, 4, 256), (4, 256), (8, 4, 256))


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_a_text_longer_than_the_context_is_refused_by_the_model_and_cropped_by_the_generator(name):
    if name == "torch":
        pytest.importorskip("torch")
    config = GPTConfig(50, 4, 8, 1, 2)
    engine = create_engine(name, config, initialize(config, Generator(123)))
    with pytest.raises(UserError, match="1 to 4 positions, got 5"):
        engine.logits(np.arange(5)[None])
    out = generate(engine, np.arange(9)[None], Sampling(max_new_tokens=3))
    assert out.shape == (1, 12)
    np.testing.assert_array_equal(out[0, 9:], generate(engine, np.arange(5, 9)[None], Sampling(3))[0, 4:])


@needs_gpt2
def test_text_to_ids_to_text_through_a_model():
    tokenizer = tokenizers.load("gpt2")
    config = GPTConfig(tokenizer.n_vocab, 16, 8, 1, 2)
    engine = create_engine("numpy", config, initialize(config, Generator(123)))
    prompt = np.array(tokenizer.encode("After a year of working hard"))[None]
    assert prompt.shape == (1, 6)
    out = generate(engine, prompt, Sampling(max_new_tokens=20))
    assert out.shape == (1, 26)
    assert tokenizer.decode(out[0]).startswith("After a year of working hard")
