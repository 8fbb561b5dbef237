"""Text from tokens: any text, cut into tokens anywhere, comes out whole and in pieces that are whole characters."""

import codecs
import itertools
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt import tokenizers
from gpt.errors import UserError
from gpt.text_stream import TextStream
from gpt.tokenizers import (
    END_OF_TEXT,
    ByteTokenizer,
    HuggingFaceTokenizer,
    SimpleTokenizerV1,
    SimpleTokenizerV2,
    train_bpe,
    train_pieces,
)

BYTES = ByteTokenizer()
TEXT = (
    "It was the best of times, it was the worst of times;\n\n  it was the épochs of belief…\n"
    f"{' ' * 40}1775 ('été')!\t\t€ 🎉🎉🎉 日本語のテキスト .\n"
    f"{END_OF_TEXT}  It was the age of wisdom, {' ' * 12}we'll see.\n"
) * 20
KINDS = (
    "bytes", "gpt2", "simple-v1", "simple-v1 whitespace", "simple-v2", "bpe", "pieces", "pieces dropping spaces",
    "like llama2", "like llama3", "word pieces", "metaspace",
)  # fmt: skip


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


@pytest.fixture(scope="module")
def make():
    """The tokenizer of a kind, made once."""
    made = {}

    def of_kind(kind):
        if kind not in made:
            made[kind] = _make(kind)
        return made[kind]

    return of_kind


def _make(kind):
    if kind == "gpt2" and "TIKTOKEN_CACHE_DIR" not in os.environ:
        pytest.skip("TIKTOKEN_CACHE_DIR names no folder with GPT-2's vocabulary")
    if kind.startswith("simple-v1"):
        return SimpleTokenizerV1.from_text(TEXT, keep_whitespace=kind.endswith("whitespace"))
    if kind.startswith("pieces"):
        pytest.importorskip("sentencepiece")
        return train_pieces(TEXT, 340, remove_extra_whitespaces=kind.endswith("spaces"))
    if kind == "bpe":
        pytest.importorskip("tokenizers")
        return train_bpe(TEXT, 320)
    if kind.startswith("like"):
        pytest.importorskip("tokenizers")
        from tests.gpt.tokenizers import test_huggingface as files

        return HuggingFaceTokenizer(
            {"like llama2": files.like_llama2, "like llama3": files.like_llama3}[kind]().to_str()
        )
    if kind in ("word pieces", "metaspace"):
        return _decoded_by_the_library(kind)
    return tokenizers.load(kind, TEXT)


def _decoded_by_the_library(kind):
    """Tokenizers whose tokens' text depends on the tokens before them."""
    library = pytest.importorskip("tokenizers")
    names = ["[UNK]", "It", "was", "best", ",", "!", "▁It", "▁was", "▁best", "▁", "t", "##he", "##s", "##t", "1775"]
    made = library.Tokenizer(library.models.WordLevel({name: id for id, name in enumerate(names)}, unk_token="[UNK]"))
    made.pre_tokenizer = library.pre_tokenizers.Whitespace()
    made.decoder = library.decoders.WordPiece() if kind == "word pieces" else library.decoders.Metaspace()
    return HuggingFaceTokenizer(made.to_str())


def text_after(tokenizer, prompt, ids):
    """What the whole text, decoded at once, has after the prompt, without a character that is cut at its end."""
    data = tokenizer.decode_bytes([*prompt, *ids])[len(tokenizer.decode_bytes(prompt)) :]
    return codecs.getincrementaldecoder("utf-8")(errors="replace").decode(data)


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_is_streamed_as_it_is_decoded_at_once(make, kind):
    tokenizer = make(kind)
    ids = tokenizer.encode(TEXT, allowed_special={END_OF_TEXT})
    assert len(ids) > 600
    for start in (0, 1, 5, 300):
        pieces, _ = pieces_of(ids[start:], ids[:start], tokenizer=tokenizer)
        assert "".join(pieces) == text_after(tokenizer, ids[:start], ids[start:])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_tokens_are_streamed_as_they_are_decoded_at_once(make, kind, data):
    """Also those that no text is encoded as: what writes nothing, one space after another, halves of characters."""
    tokenizer = make(kind)
    common = tokenizer.encode(f"the \n{' ' * 9}€" if "simple" not in kind else "It , the")
    id = st.integers(0, tokenizer.n_vocab - 1) | st.integers(0, min(3, tokenizer.n_vocab - 1)) | st.sampled_from(common)
    parts = st.lists(st.lists(id, max_size=4) | st.builds(lambda one, n: [one] * n, id, st.integers(1, 20)), max_size=6)
    prompt, ids = (list(itertools.chain(*data.draw(parts))) for _ in range(2))
    pieces, _ = pieces_of(ids, prompt, tokenizer=tokenizer)
    assert "".join(pieces) == text_after(tokenizer, prompt, ids)


def test_no_token_is_decoded_with_more_than_a_few_others():
    class Counting(ByteTokenizer):
        def decode_bytes(self, ids):
            decoded.append(len(ids))
            return super().decode_bytes(ids)

    decoded = []
    ids = list(TEXT.encode())
    pieces, _ = pieces_of(ids[1000:], ids[:1000], tokenizer=Counting())
    assert "".join(pieces) == TEXT.encode()[1000:].decode()
    assert max(decoded) < 12
