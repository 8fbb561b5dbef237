"""Token files: what goes in comes out, piecewise encoding equals whole encoding, damage is noticed."""

import errno
import hashlib
import json
import os
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt import tokenizers
from gpt.data import WindowLoader, is_token_file, loader, open_tokens, prepare, text, tokenfile
from gpt.data.tokenfile import write_tokens
from gpt.errors import UserError
from reference.torch_rng import Generator

BYTES = tokenizers.load("bytes")
needs_gpt2 = pytest.mark.skipif(
    "TIKTOKEN_CACHE_DIR" not in os.environ, reason="TIKTOKEN_CACHE_DIR names no folder with GPT-2's vocabulary"
)
reuses_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


class WideTokenizer(tokenizers.ByteTokenizer):
    """One id more than uint16 holds."""

    n_vocab = 65537


@reuses_folder
@given(ids=st.lists(st.lists(st.integers(0, 256), max_size=20), max_size=6), wide=st.booleans())
def test_round_trip(tmp_path, ids, wide):
    path, tokenizer = tmp_path / "tokens", WideTokenizer() if wide else BYTES
    flat = [i for piece in ids for i in piece]
    if not flat:
        with pytest.raises(UserError, match="no text"):
            write_tokens(path, ids, tokenizer)
        return
    write_tokens(path, ids, tokenizer)
    opened = open_tokens(path, tokenizer)
    assert opened.ids.tolist() == flat
    assert opened.ids.dtype == (np.uint32 if wide else np.uint16)
    assert (opened.n_vocab, opened.tokenizer) == (tokenizer.n_vocab, tokenizer.spec())
    assert not opened.ids.flags.writeable


def test_uint16_holds_65536_tokens_and_uint32_more(tmp_path):
    tokenizer = tokenizers.ByteTokenizer()
    for n_vocab, dtype in ((65536, np.uint16), (65537, np.uint32)):
        tokenizer.n_vocab = n_vocab
        write_tokens(tmp_path / "tokens", [[n_vocab - 1]], tokenizer)
        opened = open_tokens(tmp_path / "tokens")
        assert (opened.ids.dtype, opened.ids[0]) == (dtype, n_vocab - 1)


@pytest.mark.parametrize("name", [pytest.param("gpt2", marks=needs_gpt2), "bytes", "simple-v1", "simple-v2"])
@reuses_folder
@given(
    content=st.text(
        st.one_of(st.sampled_from(" \n\t\r'abs1,.-\u00a0\u2003\x1c☃"), st.characters(exclude_categories=["Cs"])),
        max_size=80,
    ),
    block=st.integers(1, 9),
)
def test_encoding_in_pieces_equals_encoding_whole(tmp_path, name, content, block):
    path, tokenizer = tmp_path / "text", tokenizers.load(name, content)
    path.write_bytes(content.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "BLOCK", block)
        ids = [i for piece in tokenfile._encoded(text.read_blocks(path), tokenizer) for i in piece]
    assert ids == tokenizer.encode(content)


def test_a_file_is_its_tokens_and_its_digest(tmp_path):
    (tmp_path / "a.txt").write_bytes("snow ☃".encode())
    opened = prepare(tmp_path / "a.txt", tmp_path / "out" / "a.tokens", BYTES)
    assert opened.ids.tolist() == BYTES.encode("snow ☃")
    (source,) = opened.sources
    assert (source.name, source.bytes) == ("a.txt", 8)
    assert source.sha256 == hashlib.sha256("snow ☃".encode()).hexdigest()


def test_documents_of_a_folder_are_separated_by_the_end_token(tmp_path):
    for name, content in {"b.txt": "two", "a.txt": "one", "empty.txt": "", "sub/c.txt": "3", "other.md": "no"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    opened = prepare(tmp_path, tmp_path / "out.tokens", BYTES)
    assert BYTES.decode(opened.ids) == "one<|endoftext|>two<|endoftext|>3"
    assert [source.name for source in opened.sources] == ["a.txt", "b.txt", "empty.txt", "sub/c.txt"]
    assert BYTES.decode(prepare(tmp_path, tmp_path / "out.tokens", BYTES, pattern="*.md").ids) == "no"
    with pytest.raises(UserError, match=r"holds no file that matches '\*.rst'"):
        prepare(tmp_path, tmp_path / "out.tokens", BYTES, pattern="*.rst")
    with pytest.raises(UserError, match="simple-v1 has no end token to separate 4 documents"):
        prepare(tmp_path, tmp_path / "out.tokens", tokenizers.load("simple-v1", "one two 3"))


def test_the_end_token_in_a_text_is_text(tmp_path):
    (tmp_path / "a.txt").write_text("a<|endoftext|>b", encoding="utf-8")
    assert 256 not in prepare(tmp_path / "a.txt", tmp_path / "out", BYTES).ids


def test_a_failed_preparation_leaves_what_was_there(tmp_path):
    (tmp_path / "a.txt").write_text("good", encoding="utf-8")
    target = tmp_path / "out.tokens"
    prepare(tmp_path / "a.txt", target, BYTES)
    (tmp_path / "b.txt").write_bytes(b"bad \xff")
    with pytest.raises(UserError, match=r"b\.txt is not UTF-8: byte 4"):
        prepare(tmp_path, target, BYTES)
    with pytest.raises(UserError, match=r"cannot read .*absent"):
        prepare(tmp_path / "absent", target, BYTES)
    assert BYTES.decode(open_tokens(target).ids) == "good"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.txt", "out.tokens"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*tokens: No space left on device"):
        write_tokens(tmp_path / "tokens", [[1, 2]], BYTES)
    assert list(tmp_path.iterdir()) == []


def test_a_corpus_is_prepared_in_bounded_memory(tmp_path, monkeypatch):
    """Eight times as much text needs no more memory, and far less than its tokens take."""
    monkeypatch.setattr(text, "BLOCK", 1 << 12)
    monkeypatch.setattr(loader, "PIECE", 1 << 12)
    peaks = []
    for repeats in (5_000, 40_000):
        path = tmp_path / "corpus.txt"
        path.write_text("ten letters " * repeats, encoding="utf-8")
        tracemalloc.start()
        opened = prepare(path, tmp_path / "corpus.tokens", BYTES)
        batches = iter(WindowLoader(opened.ids, 4, 16, 1024, True, False, Generator(0), opened.n_vocab))
        assert next(batches).inputs.shape == (4, 16)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(opened.ids) == 12 * repeats
    assert peaks[1] < 1.2 * peaks[0] < 12 * 40_000 / 2


@pytest.fixture
def written(tmp_path):
    write_tokens(tmp_path / "tokens", [[1, 2, 3]], BYTES)
    return tmp_path / "tokens"


@reuses_folder
@given(position=st.integers(0, 10**6), flip=st.integers(1, 255))
def test_a_damaged_head_or_footer_is_refused(written, position, flip):
    data = bytearray(written.read_bytes())
    position %= len(data) - 6
    position += 6 if position >= 32 else 0  # not the three tokens, which are not covered
    data[position] ^= flip
    damaged = written.with_name("damaged")
    damaged.write_bytes(data)
    with pytest.raises(UserError):
        open_tokens(damaged)


@pytest.mark.parametrize("kept", [0, 1, 8, 31, 32, 37, 38, 39, -1])
def test_a_truncated_file_is_refused(written, kept):
    written.write_bytes(written.read_bytes()[:kept])
    with pytest.raises(UserError, match="truncated" if kept else "no token file"):
        open_tokens(written)


def test_other_files_are_refused(written, tmp_path):
    written.write_bytes(written.read_bytes() + b"x")
    with pytest.raises(UserError, match=r"damaged: .* bytes instead of"):
        open_tokens(written)
    (tmp_path / "text").write_text("TWIN PEAKS, a text", encoding="utf-8")
    with pytest.raises(UserError, match="text is no token file"):
        open_tokens(tmp_path / "text")
    for missing in (tmp_path / "absent", tmp_path):
        with pytest.raises(UserError, match=f"cannot read {missing}"):
            open_tokens(missing)


def test_a_token_file_is_told_from_a_text(written, tmp_path):
    (tmp_path / "text").write_text("TWIN", encoding="utf-8")
    assert is_token_file(written)
    assert not any(map(is_token_file, [tmp_path / "text", tmp_path, tmp_path / "absent"]))


def test_a_newer_format_is_named(written):
    data = bytearray(written.read_bytes())
    data[8:12] = struct.pack("<I", 2)
    written.write_bytes(data)
    with pytest.raises(UserError, match="format version 2, and this twingrad reads up to 1"):
        open_tokens(written)


def test_another_tokenizer_is_named(written, tmp_path):
    other = tokenizers.load("simple-v2", "a b")
    with pytest.raises(UserError, match="prepared with tokenizer bytes, not simple-v2"):
        open_tokens(written, other)
    write_tokens(tmp_path / "words", [[0, 1]], other)
    with pytest.raises(UserError, match="another vocabulary of simple-v2"):
        open_tokens(tmp_path / "words", tokenizers.load("simple-v2", "a c"))
    spec = open_tokens(tmp_path / "words", other).tokenizer
    assert tokenizers.from_spec(json.loads(json.dumps(spec))).encode("a x") == other.encode("a x")
