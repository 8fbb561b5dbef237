"""Token files: what goes in comes out, damage is noticed, what does not fit is refused."""

import errno
import json
import os
import struct
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt import tokenizers
from gpt.data import is_token_file, open_tokens
from gpt.data.tokenfile import write_tokens
from gpt.errors import UserError

BYTES = tokenizers.load("bytes")
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


@pytest.mark.parametrize("id", [-1, 257, 65535, 65536, 2**40, 2**70])
def test_an_id_outside_the_vocabulary_is_refused(tmp_path, id):
    with pytest.raises(UserError, match=f"bytes gave the id {id}, outside its vocabulary of 257"):
        write_tokens(tmp_path / "tokens", [[1, id, 2]], BYTES)
    assert list(tmp_path.iterdir()) == []


def test_a_vocabulary_beyond_32_bits_is_refused(tmp_path):
    tokenizer = tokenizers.ByteTokenizer()
    tokenizer.n_vocab = 2**32 + 1
    with pytest.raises(UserError, match="at most 32 bits, and a vocabulary of 4,294,967,297 needs more"):
        write_tokens(tmp_path / "tokens", [[1]], tokenizer)


def test_a_fingerprint_tells_tokens_apart(tmp_path):
    def written(name, ids):
        write_tokens(tmp_path / name, [ids], BYTES)
        return open_tokens(tmp_path / name).fingerprint

    assert written("a", [1, 2, 3]) == written("b", [1, 2, 3])
    assert len({written("c", ids) for ids in ([1, 2, 3], [1, 2, 4], [2, 1, 3], [1, 2])}) == 4


def test_a_file_from_before_checksums_were_kept_is_read(tmp_path):
    write_tokens(tmp_path / "a", [[1, 2, 3]], BYTES)
    data = (tmp_path / "a").read_bytes()
    facts = json.loads(data[38:])
    del facts["crc32"]
    footer = json.dumps(facts).encode()
    head = data[:12] + struct.pack("<IQQ", zlib.crc32(footer), 6, len(footer))
    (tmp_path / "b").write_bytes(head + data[32:38] + footer)
    opened = open_tokens(tmp_path / "b")
    assert opened.ids.tolist() == [1, 2, 3]
    assert opened.fingerprint == "3 tokens"


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*tokens: No space left on device"):
        write_tokens(tmp_path / "tokens", [[1, 2]], BYTES)
    assert list(tmp_path.iterdir()) == []


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
