"""Text from tokens: any text, cut into tokens anywhere, comes out whole and in pieces that are whole characters."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt.errors import UserError
from gpt.text_stream import TextStream
from gpt.tokenizers import ByteTokenizer, SimpleTokenizerV2

BYTES = ByteTokenizer()


def pieces_of(ids, prompt=(), stop=(), tokenizer=BYTES):
    stream = TextStream(tokenizer, prompt, stop)
    pieces = [stream.push(token) for token in ids]
    return [*pieces, stream.close()], stream


@given(st.text(), st.text())
def test_pieces_join_to_the_text_and_none_has_half_a_character(prompt, text):
    pieces, _ = pieces_of(text.encode(), list(prompt.encode()))
    assert "".join(pieces) == text
    assert not any("�" in piece for piece in pieces) or "�" in text


@given(st.text(alphabet="ab€", max_size=30), st.lists(st.text(alphabet="ab€", min_size=1, max_size=4), max_size=3))
def test_a_text_ends_before_the_first_stop_string(text, stop):
    pieces, stream = pieces_of(text.encode(), stop=stop)
    # The stop string that is complete first ends the text; of those that are complete at once, the longest.
    ends = [(text.find(word) + len(word), text.find(word)) for word in stop if word in text]
    assert "".join(pieces) == (text[: min(ends)[1]] if ends else text)
    assert stream.ended == bool(ends)


def test_the_beginning_of_a_stop_string_waits_and_is_given_when_it_was_none():
    stream = TextStream(BYTES, stop=["END"])
    assert [stream.push(ord(letter)) for letter in "a EN"] == ["a", " ", "", ""]
    assert stream.push(ord("E")) == "EN"
    assert [stream.push(ord(letter)) for letter in "ND."] == ["", "", ""]
    assert stream.ended
    assert stream.close() == ""


def test_a_character_whose_end_never_comes_is_dropped_and_bytes_that_are_none_are_marked():
    pieces, _ = pieces_of("a€".encode()[:-1])
    assert "".join(pieces) == "a"
    pieces, _ = pieces_of([0xFF, ord("b"), 0xE2, ord("c")])
    assert "".join(pieces) == "�b�c"


def test_words_are_joined_as_in_the_whole_text():
    tokenizer = SimpleTokenizerV2.from_text("Hello , world ! it is here")
    ids = tokenizer.encode("Hello, world! it is here")
    pieces, _ = pieces_of(ids[1:], ids[:1], tokenizer=tokenizer)
    assert "Hello" + "".join(pieces) == tokenizer.decode(ids)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UserError, match="stop: expected a text"):
        TextStream(BYTES, stop=["x", ""])
