"""Cuts: a document encoded in pieces, wherever they are made, has the tokens of the document encoded whole."""

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt import tokenizers
from gpt.data import cuts
from gpt.data.cuts import line_end

needs_gpt2 = pytest.mark.skipif(
    "TIKTOKEN_CACHE_DIR" not in os.environ, reason="TIKTOKEN_CACHE_DIR names no folder with GPT-2's vocabulary"
)
reuses_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXTS = st.text(
    st.one_of(
        st.sampled_from(" \n\t\r'abs1,.-\u00a0\u2003\x1c☃é"),
        st.sampled_from("  the Gift !?\n"),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=120,
)
WORDS = "it is what it was, and was what it is: once upon a time 12 twists. " * 40


def pieces():
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    return tokenizers.train_pieces(WORDS, 300)


def huggingface():
    """Llama 3's kind: punctuation joins the line ends behind it, and so no cut may come between them."""
    library = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    model = library.Tokenizer(library.models.BPE())
    pattern = library.Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    split = library.pre_tokenizers.Split(pattern, behavior="isolated")
    bytes_ = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = library.pre_tokenizers.Sequence([split, bytes_])
    model.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator([WORDS.replace(". ", ".\n\n")], trainer)
    return tokenizers.HuggingFaceTokenizer(model.to_str())


def bpe():
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    return tokenizers.train_bpe(WORDS, 280)


MADE = {"bpe": bpe, "sentencepiece": pieces, "huggingface": huggingface}


@pytest.fixture(scope="module")
def made():
    return {}


def tokenizer_of(name, content, made):
    if name not in MADE:
        return tokenizers.load(name, content)
    if name not in made:
        made[name] = MADE[name]()
    return made[name]


NAMES = [pytest.param("gpt2", marks=needs_gpt2), "bytes", "simple-v1", "simple-v2", "bpe", "sentencepiece"]


@pytest.mark.parametrize("name", NAMES)
@reuses_folder
@given(content=TEXTS, block=st.integers(1, 9), piece=st.integers(1, 30))
def test_encoding_in_pieces_equals_encoding_whole(made, name, content, block, piece):
    tokenizer = tokenizer_of(name, content, made)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuts, "PIECE", piece)
        blocks = [content[i : i + block] for i in range(0, len(content), block)]
        ids = [i for piece in cuts.encoded(blocks, tokenizer) for i in piece]
    assert ids == tokenizer.encode(content)


@pytest.mark.parametrize("name", NAMES)
@reuses_folder
@given(content=TEXTS, offset=st.integers(0, 200), window=st.sampled_from([4, 7, 1 << 16]))
def test_a_file_may_be_cut_at_a_word_s_end(tmp_path, made, name, content, offset, window):
    path, data = tmp_path / "text", content.encode()
    path.write_bytes(data)
    tokenizer = tokenizer_of(name, content, made)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuts, "WINDOW", window)
        cut = cuts.word_end(path, min(offset, len(data)))
    assert min(offset, len(data)) <= cut <= len(data)
    ids = [
        *(i for piece in cuts.encoded([data[:cut].decode()], tokenizer) for i in piece),
        *(i for piece in cuts.encoded([data[cut:].decode()], tokenizer, continued=cut > 0) for i in piece),
    ]
    assert ids == tokenizer.encode(content)


def test_a_tokenizer_that_joins_line_ends_is_cut_between_words(tmp_path, made):
    tokenizer = tokenizer_of("huggingface", "", made)
    content = ("it was.\n\nOnce upon 12 twists.\n\n" * 60)[:-2]
    whole = tokenizer.encode(content)
    assert tokenizer.encode("a.") + tokenizer.encode("\n\nb") != tokenizer.encode("a.\n\nb")
    (tmp_path / "text").write_text(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuts, "PIECE", 64)
        blocks = [content[i : i + 7] for i in range(0, len(content), 7)]
        made_of = list(cuts.encoded(blocks, tokenizer))
    assert len(made_of) > 10
    assert [i for piece in made_of for i in piece] == whole
    for offset in range(0, len(content), 11):
        cut = cuts.word_end(tmp_path / "text", offset)
        assert tokenizer.encode(content[:cut]) + tokenizer.encode(content[cut:]) == whole


def test_what_has_no_space_is_cut_where_it_must_be():
    tokenizer = tokenizers.load("bytes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuts, "PIECE", 10)
        patch.setattr(cuts, "LONGEST", 50)
        lengths = [len(ids) for ids in cuts.encoded(["x"] * 120, tokenizer)]
    assert lengths == [50, 50, 20]


@reuses_folder
@given(lines=st.lists(st.text(st.sampled_from("ab é"), max_size=6), max_size=8), offset=st.integers(0, 60))
def test_lines_are_cut_between(tmp_path, lines, offset):
    path, data = tmp_path / "lines", "\n".join(lines).encode()
    path.write_bytes(data)
    offset = min(offset, len(data))
    cut = line_end(path, offset)
    assert cut == len(data) or (data[cut - 1 : cut] == b"\n" and b"\n" not in data[offset : cut - 1])
