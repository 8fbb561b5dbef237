"""SentencePiece: what is trained, exact round trips, models that are damaged."""

import json
import os
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt import tokenizers
from gpt.data import load_text, open_tokens, prepare
from gpt.errors import UserError
from gpt.text_stream import TextStream
from gpt.tokenizers import END_OF_TEXT, SentencePieceTokenizer, train_pieces

sentencepiece = pytest.importorskip("sentencepiece")

TEXT = (
    "It was the best of times, it was the worst of times,\nit was the age of wisdom, it was the age of foolishness,\n"
    "  it was the epoch of belief,    it was 1775; été.\n\nthe winter of despair\n"
) * 3
needs_shakespeare = pytest.mark.skipif("TWINGRAD_DATA" not in os.environ, reason="TWINGRAD_DATA names no folder")
well_formed = st.text(st.characters(exclude_categories=["Cs"])) | st.text(" \n\t▁€é<>/sthe|0", max_size=30)


def assert_one_line(error):
    assert str(error)
    assert "\n" not in str(error)


@pytest.fixture(scope="module")
def trained():
    return train_pieces(TEXT, 320)


@pytest.fixture(scope="module")
def library():
    """The library's own reading of a tokenizer's model."""
    return lambda tokenizer: sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model())


@settings(max_examples=300)
@given(text=well_formed)
def test_any_text_comes_back(trained, text):
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert trained.decode_bytes(ids) == text.encode()
    assert trained.eot not in ids


@pytest.mark.parametrize(
    "text",
    ["", " ", "  two", "€", "\n", "\n\n a\r\n\tb ", "▁", "▁ a", " ▁", "a▁▁b ▁", "\0", "<s></s><0x41>", "⁇", "e\u0301"],
)
def test_what_sentencepiece_treats_specially_comes_back(trained, text):
    assert trained.decode(trained.encode(text)) == text
    assert not {0, 1, 2} & set(trained.encode(text))


@given(text=well_formed)
def test_the_library_gives_the_same_ids_and_text(trained, library, text):
    text = text.replace("▁", "")
    assert trained.encode(text) == library(trained).encode(text)
    assert trained.decode(trained.encode(text)) == library(trained).decode(trained.encode(text))


@given(first=well_formed, second=well_formed)
def test_a_text_may_be_encoded_part_by_part(trained, first, second):
    ids = [*trained.encode("a" + first), *trained.encode_continued(second)]
    assert trained.decode(ids) == "a" + first + second


@given(text=well_formed)
def test_a_stream_gives_the_text_token_by_token(trained, text):
    prompt, ids = trained.encode("it was"), trained.encode_continued(text)
    stream = TextStream(trained, prompt)
    assert "".join([*map(stream.push, ids), stream.close()]) == text


def test_a_text_of_two_blocks_has_one_prefix(trained, tmp_path):
    text = "it was the best of times, it was été\n" * 30000  # more than 1 MiB, which is encoded in pieces
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    file = prepare(tmp_path / "text.txt", tmp_path / "text.tokens", trained)
    assert trained.decode(file.ids) == text
    assert file.ids.tolist() == trained.encode(text)
    assert open_tokens(file.path, tokenizers.from_spec(trained.spec())).n_vocab == 320


def test_the_end_of_a_text_is_a_token_only_where_it_is_allowed(trained):
    text = f"it was{END_OF_TEXT}the age{END_OF_TEXT}"
    ids = trained.encode(text, allowed_special={END_OF_TEXT})
    assert ids == [*trained.encode("it was"), 2, *trained.encode("the age"), 2]
    assert trained.decode(ids) == text
    assert trained.eot not in trained.encode(text)
    with pytest.raises(UserError, match="</s>"):
        trained.encode(text, allowed_special={"</s>"})


def test_specification_and_file_restore_the_tokenizer(trained, tmp_path):
    (tmp_path / "a.model").write_bytes(trained.model())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    for restored in (
        tokenizers.from_spec(json.loads(json.dumps(trained.spec()))),
        tokenizers.load(str(tmp_path / "a.model")),
        tokenizers.from_spec(tokenizers.huggingface_spec(rename(tmp_path, "a.model", "tokenizer.model"))),
    ):
        assert restored.spec() == trained.spec()
        assert (restored.n_vocab, restored.eot) == (320, 2)
        assert restored.encode(TEXT) == trained.encode(TEXT)


@pytest.mark.parametrize("says", [True, False])
def test_a_text_of_llama_begins_as_its_folder_says(trained, tmp_path, says):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "tokenizer.model").write_bytes(trained.model())
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": says}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    spec = json.loads(json.dumps(tokenizers.huggingface_spec(tmp_path)))
    ours = tokenizers.from_spec(spec)
    assert ours.spec() == spec
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizers.begun(ours, ours.encode("it was")) == theirs.encode("it was")
    (tmp_path / "tokenizer_config.json").unlink()
    assert tokenizers.huggingface_spec(tmp_path)["begins"] is True  # as Meta's own folders, which say nothing


def rename(folder, before, after):
    (folder / before).rename(folder / after)
    (folder / before).write_bytes((folder / after).read_bytes())
    return folder


def test_ids_are_checked_and_a_surrogate_is_refused(trained):
    with pytest.raises(UserError, match="token id 320 is outside the vocabulary of 320"):
        trained.decode([320])
    with pytest.raises(UserError, match=r"lone surrogate U\+D800"):
        trained.encode("ab\ud800")
    assert trained.decode([1, *trained.encode("it was")]) == "it was"


@pytest.mark.parametrize(
    "text, size, message",
    [
        ("", 300, "there is no text"),
        ("\n\n", 300, "there is no text"),
        (TEXT, 4096, r"vocab_size: the text gives \d+ pieces at most, got 4096"),
        (TEXT, 100, r"vocab_size: the text's characters and the bytes alone are \d+ pieces, got 100"),
        (TEXT, 0, "vocab_size: expected at least 1, got 0"),
        ("ab\ud800", 300, "lone surrogate"),
    ],
)
def test_what_cannot_be_trained_is_said_in_a_line(text, size, message):
    with pytest.raises(UserError, match=message) as caught:
        train_pieces(text, size)
    assert "\n" not in str(caught.value)


def test_a_line_longer_than_the_librarys_limit_counts():
    assert train_pieces("it was the best of times " * 400, 280).n_vocab == 280


@settings(max_examples=60)
@given(data=st.data())
def test_a_damaged_model_is_read_or_refused_in_a_line(trained, data):
    model = bytearray(trained.model())
    for _ in range(data.draw(st.integers(0, 3))):
        model[data.draw(st.integers(0, len(model) - 1))] = data.draw(st.integers(0, 255))
    model = model[: data.draw(st.integers(0, len(model)) | st.just(len(model)))]
    try:
        tokenizer = SentencePieceTokenizer(bytes(model))
    except UserError as error:
        assert_one_line(error)
    else:
        assert tokenizer.n_vocab


@pytest.mark.parametrize("content", [b"", b"no model", "Übung".encode(), b"\x00" * 100])
def test_a_file_that_is_no_model_is_named(content, tmp_path):
    path = tmp_path / "x.model"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.model: not a SentencePiece model") as caught:
        tokenizers.load(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="missing.model: could not be read"):
        tokenizers.load(tmp_path / "missing.model")


def test_a_damaged_specification_is_refused():
    for model in ({}, {"model": 3}, {"model": "é"}, {"model": ""}):
        with pytest.raises(UserError):
            tokenizers.from_spec({"name": "sentencepiece", **model})


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match=r"pip install 'twingrad\[sentencepiece\]'"):
        train_pieces(TEXT, 300)


@needs_shakespeare
def test_tiny_shakespeare_with_4096_pieces(library):
    """385,594 tokens where spaces are dropped; the text has 16 more spaces than that keeps, each a token of ours."""
    text = load_text("tiny-shakespeare")
    ours, default = train_pieces(text, 4096), train_pieces(text, 4096, remove_extra_whitespaces=True)
    theirs = library(ours)
    assert (theirs.unk_id(), theirs.bos_id(), theirs.eos_id(), theirs.pad_id()) == (0, 1, 2, -1)
    assert ours.n_vocab == 4096
    assert ours.decode(ours.encode(text)) == text
    assert len(default.encode(text)) == 385_594
    assert len(ours.encode(text)) == 385_594 + 16
    assert [theirs.id_to_piece(id) for id in range(4096)] == [library(default).id_to_piece(id) for id in range(4096)]
