"""What every tokenizer keeps: ids in range, exact bytes back, a specification that restores it."""

import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt import tokenizers
from gpt.errors import UserError
from gpt.tokenizers import END_OF_TEXT

SENTENCE = "It's the last he painted, you know," + '" Mrs. Gisburn said -- with pardonable pride: yes; no?'
needs_gpt2 = pytest.mark.skipif(
    "TIKTOKEN_CACHE_DIR" not in os.environ, reason="TIKTOKEN_CACHE_DIR names no folder with GPT-2's vocabulary"
)
gpt2_and_bytes = pytest.mark.parametrize("name", [pytest.param("gpt2", marks=needs_gpt2), "bytes"])
every = pytest.mark.parametrize("name", [pytest.param("gpt2", marks=needs_gpt2), "bytes", "simple-v1", "simple-v2"])
well_formed = st.text(st.characters(exclude_categories=["Cs"]))


@every
def test_specification_restores_the_tokenizer(name):
    tokenizer = tokenizers.load(name, SENTENCE)
    restored = tokenizers.from_spec(json.loads(json.dumps(tokenizer.spec())))
    assert restored.spec() == tokenizer.spec()
    assert (restored.name, restored.n_vocab, restored.eot) == (name, tokenizer.n_vocab, tokenizer.eot)
    ids = tokenizer.encode(SENTENCE)
    assert restored.encode(SENTENCE) == ids
    assert restored.decode(ids) == tokenizer.decode(ids)
    assert max(ids) < tokenizer.n_vocab


@every
def test_the_special_tokens_that_it_names_may_be_allowed(name):
    tokenizer = tokenizers.load(name, SENTENCE)
    end = {END_OF_TEXT} if tokenizer.eot is not None else set()
    ids = tokenizer.encode(SENTENCE, allowed_special=end.union(tokenizer.special))
    assert tokenizer.decode(ids) == tokenizer.decode(tokenizer.encode(SENTENCE))
    assert list(tokenizer.begin) == []


@every
@pytest.mark.parametrize("wrong", [-1, "n_vocab", 2**40])
def test_an_id_outside_the_vocabulary_is_named(name, wrong):
    tokenizer = tokenizers.load(name, SENTENCE)
    wrong = tokenizer.n_vocab if wrong == "n_vocab" else wrong
    with pytest.raises(UserError, match=rf"token id {wrong} is outside the vocabulary of {tokenizer.n_vocab}"):
        tokenizer.decode([0, wrong])


@every
def test_ids_may_be_an_array_but_not_fractions_or_a_batch(name):
    tokenizer = tokenizers.load(name, SENTENCE)
    ids = tokenizer.encode("the last")
    assert tokenizer.decode(np.array(ids, np.uint16)) == "the last"
    assert tokenizer.decode([]) == ""
    for wrong in ([0.5], [[0, 1]]):
        with pytest.raises(UserError, match="one row of integers"):
            tokenizer.decode(wrong)


@pytest.fixture(scope="module")
def loaded():
    return {
        name: tokenizers.load(name)
        for name in ("gpt2", "bytes")
        if name == "bytes" or "TIKTOKEN_CACHE_DIR" in os.environ
    }


@gpt2_and_bytes
@given(text=well_formed)
def test_any_text_comes_back(loaded, name, text):
    tokenizer = loaded[name]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.eot not in ids
    assert b"".join(tokenizer.decode_bytes([i]) for i in ids) == text.encode()


@gpt2_and_bytes
def test_end_of_text_is_a_token_only_where_it_is_allowed(name):
    tokenizer = tokenizers.load(name)
    text = f"one{END_OF_TEXT}two{END_OF_TEXT}"
    ids = tokenizer.encode(text, allowed_special={END_OF_TEXT})
    assert ids == [*tokenizer.encode("one"), tokenizer.eot, *tokenizer.encode("two"), tokenizer.eot]
    assert tokenizer.decode(ids) == text
    plain = tokenizer.encode(text)
    assert tokenizer.eot not in plain
    assert tokenizer.decode(plain) == text
    with pytest.raises(UserError, match="pad"):
        tokenizer.encode(text, allowed_special={"<|pad|>"})


@gpt2_and_bytes
def test_a_lone_surrogate_is_refused(name):
    with pytest.raises(UserError, match=r"character 2 of the text is the lone surrogate U\+D800"):
        tokenizers.load(name).encode("ab\ud800")


@gpt2_and_bytes
def test_half_a_character_decodes_to_the_replacement_character(name):
    tokenizer = tokenizers.load(name)
    ids = tokenizer.encode("☃")
    assert len(ids) > 1
    assert "\ufffd" in tokenizer.decode(ids[:1])


def test_bytes_are_their_own_ids():
    tokenizer = tokenizers.load("bytes")
    assert tokenizer.encode("hé") == [104, 195, 169]
    assert (tokenizer.n_vocab, tokenizer.eot) == (257, 256)


@needs_gpt2
def test_gpt2_ids():
    tokenizer = tokenizers.load("gpt2")
    text = "Hello, do you like tea? <|endoftext|> In the sunlit terraces of someunknownPlace."
    ids = [
        15496,
        11,
        466,
        345,
        588,
        8887,
        30,
        220,
        50256,
        554,
        262,
        4252,
        18250,
        8812,
        2114,
        286,
        617,
        34680,
        27271,
        13,
    ]
    assert tokenizer.encode(text, allowed_special={END_OF_TEXT}) == ids
    assert tokenizer.decode(ids) == text
    assert (tokenizer.n_vocab, tokenizer.eot) == (50257, 50256)


def test_gpt2_without_network_or_cache_says_what_to_set(monkeypatch):
    import tiktoken

    def offline(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR") as caught:
        tokenizers.load("gpt2")
    assert "\n" not in str(caught.value)


@needs_gpt2
def test_a_folder_with_gpt2_s_files_needs_neither_network_nor_cache(monkeypatch, tmp_path):
    import tiktoken

    for name, text in tokenizers.huggingface_files({"name": "gpt2"}, 16).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert tokenizers.huggingface_spec(tmp_path) == {"name": "gpt2"}
    ids = tokenizers.load("gpt2").encode(SENTENCE)

    def offline(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    ours = tokenizers.from_spec(tokenizers.huggingface_spec(tmp_path))
    assert (ours.n_vocab, ours.eot, ours.encode(SENTENCE)) == (50257, 50256, ids)


def test_unknown_and_incomplete_names():
    with pytest.raises(UserError, match=r"unknown tokenizer 'gpt4': expected one of gpt2, bytes, simple-v1, simple-v2"):
        tokenizers.load("gpt4")
    with pytest.raises(UserError, match="simple-v2 builds its vocabulary from a text"):
        tokenizers.load("simple-v2")
    with pytest.raises(UserError, match="unknown tokenizer 'None'"):
        tokenizers.from_spec({})
    with pytest.raises(UserError, match="simple-v1 lacks 'vocabulary'"):
        tokenizers.from_spec({"name": "simple-v1"})
