"""The word tokenizers: three ways to split, vocabularies, unknown words."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt.errors import UserError
from gpt.tokenizers.simple import (
    COMMA_AND_PERIOD,
    PUNCTUATION,
    WHITESPACE,
    SimpleTokenizerV1,
    SimpleTokenizerV2,
    UnknownWordError,
    build_vocabulary,
    split,
)

TEXT = '"It\'s here," he said: yes; no -- (perhaps) why_not?'


@pytest.mark.parametrize(
    "pattern, text, tokens",
    [
        (WHITESPACE, "Hello, world. This.", ["Hello,", "world.", "This."]),
        (COMMA_AND_PERIOD, "Hello, world. This.", ["Hello", ",", "world", ".", "This", "."]),
        ("([,.])", "Hello, big world. ", ["Hello", ",", "big world", "."]),
        (PUNCTUATION, "Is this-- a test?", ["Is", "this", "--", "a", "test", "?"]),
        (PUNCTUATION, "a_b(c)'d';e:f", ["a", "_", "b", "(", "c", ")", "'", "d", "'", ";", "e", ":", "f"]),
        (r"""([,.?_!"()']|--|\s)""", "e:f; g", ["e:f;", "g"]),
    ],
)
def test_split(pattern, text, tokens):
    assert split(text, pattern) == tokens


@given(st.text(), st.sampled_from([WHITESPACE, COMMA_AND_PERIOD, PUNCTUATION]))
def test_split_that_keeps_whitespace_loses_nothing(text, pattern):
    kept = split(text, pattern, keep_whitespace=True)
    assert "".join(kept) == text
    assert all(kept)
    assert split(text, pattern) == [token.strip() for token in kept if token.strip()]


@pytest.mark.parametrize("pattern", ["(", r"\s", r"(\s)|(,)"])
def test_a_pattern_without_one_group_is_refused(pattern):
    with pytest.raises(UserError, match="pattern"):
        split("a b", pattern)
    with pytest.raises(UserError, match="pattern"):
        SimpleTokenizerV1({"a": 0}, pattern)


def test_vocabulary_is_sorted_and_ends_with_the_special_tokens():
    vocabulary = build_vocabulary(["b", "a", "<|unk|>", "b", "B"], special=["<|endoftext|>", "<|unk|>"])
    assert list(vocabulary.items()) == [("B", 0), ("a", 1), ("b", 2), ("<|endoftext|>", 3), ("<|unk|>", 4)]


def test_v1_joins_words_without_the_space_before_punctuation():
    tokenizer = SimpleTokenizerV1.from_text(TEXT)
    ids = tokenizer.encode(TEXT)
    assert [tokenizer.words[i] for i in ids] == split(TEXT)
    assert tokenizer.decode(tokenizer.encode("he said -- yes, perhaps?")) == "he said -- yes, perhaps?"
    assert tokenizer.eot is None


def test_v1_names_the_unknown_word():
    tokenizer = SimpleTokenizerV1.from_text(TEXT)
    with pytest.raises(KeyError) as caught:
        tokenizer.encode("he said Hello, yes")
    error = caught.value
    assert isinstance(error, UserError)
    assert error.args == ("Hello",)
    assert str(error).startswith("'Hello' is not in the vocabulary")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert isinstance(error, UnknownWordError)


def test_v2_has_an_unknown_word_and_an_end():
    tokenizer = SimpleTokenizerV2.from_text(TEXT)
    assert tokenizer.n_vocab == SimpleTokenizerV1.from_text(TEXT).n_vocab + 2
    ids = tokenizer.encode("Hello, he said <|endoftext|> yes: no")
    assert tokenizer.decode(ids) == "<|unk|>, he said <|endoftext|> yes: no"
    assert ids.count(tokenizer.eot) == 1
    assert tokenizer.eot == tokenizer.n_vocab - 2


@given(st.text())
def test_kept_whitespace_makes_decoding_exact(text):
    tokenizer = SimpleTokenizerV1.from_text(text, keep_whitespace=True)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("vocabulary", [{"a": 1}, {"a": 0, "b": 0}, {"a": 0, "b": 2}])
def test_a_vocabulary_with_holes_is_refused(vocabulary):
    with pytest.raises(UserError, match="ids 0 to"):
        SimpleTokenizerV1(vocabulary)


def test_v2_needs_its_special_tokens():
    with pytest.raises(UserError, match=r"<\|unk\|>"):
        SimpleTokenizerV2({"a": 0, "<|endoftext|>": 1})
