"""The cache of encoded texts: what is found in it, what is made anew, and what becomes of damage."""

import os

import numpy as np
import pytest

from gpt.data import encoded, split_text
from gpt.data.encoded import encode_split, encoded_folder
from gpt.errors import UserError
from gpt.tokenizers import ByteTokenizer, SimpleTokenizerV2

TEXT = "the quick brown fox jumps over the lazy dog, and the dog does not mind. " * 5


class Counting:
    """A tokenizer that counts how often it is asked to encode."""

    def __init__(self, tokenizer):
        self.name, self.n_vocab, self.calls = tokenizer.name, tokenizer.n_vocab, 0
        self.spec, self._encode = tokenizer.spec, tokenizer.encode

    def encode(self, text):
        self.calls += 1
        return self._encode(text)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TWINGRAD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tokenizer():
    return Counting(SimpleTokenizerV2.from_text(TEXT))


def files():
    return sorted(encoded_folder().iterdir())


def test_a_text_is_encoded_once(tokenizer):
    first = encode_split(TEXT, tokenizer, 0.9)
    assert tokenizer.calls == 2  # both splits
    again = encode_split(TEXT, tokenizer, 0.9)
    assert tokenizer.calls == 2
    assert len(files()) == 1
    for made, found, part in zip(first, again, split_text(TEXT, 0.9), strict=True):
        assert made.dtype == found.dtype == np.int64
        assert made.tolist() == found.tolist() == tokenizer.encode(part)


@pytest.mark.parametrize(
    "text, words, fraction", [(TEXT + "the", TEXT, 0.9), (TEXT, TEXT + " more words", 0.9), (TEXT, TEXT, 0.8)]
)
def test_another_text_tokenizer_or_fraction_is_encoded(tokenizer, text, words, fraction):
    encode_split(TEXT, tokenizer, 0.9)
    other = Counting(SimpleTokenizerV2.from_text(words))
    ids = encode_split(text, other, fraction)
    assert other.calls == 2
    assert [part.tolist() for part in ids] == [other.encode(part) for part in split_text(text, fraction)]
    assert len(files()) == 2


def test_bytes_are_not_cached():
    encode_split(TEXT, ByteTokenizer(), 0.9)
    assert not encoded_folder().exists()


def test_a_vocabulary_larger_than_a_byte(tokenizer):
    text = " ".join(f"w{i}" for i in range(700))
    tokenizer = Counting(SimpleTokenizerV2.from_text(text))
    first, again = encode_split(text, tokenizer, 0.5), encode_split(text, tokenizer, 0.5)
    assert tokenizer.calls == 2
    assert [part.tolist() for part in first] == [part.tolist() for part in again]


def save(path, **arrays):
    with open(path, "wb") as file:
        np.savez(file, **arrays)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"no archive at all"),
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(path.read_bytes().replace(b"descr", b"rcsed")),
        lambda path: save(path, training=np.arange(3, dtype=np.uint8)),
        lambda path: save(path, training=np.array([999], np.uint16), validation=np.arange(3, dtype=np.uint8)),
        lambda path: save(path, training=np.array([{}], object), validation=np.arange(3, dtype=np.uint8)),
        lambda path: save(path, training=np.zeros(3), validation=np.zeros(3)),
        lambda path: save(path, training=np.zeros((2, 2), np.uint8), validation=np.arange(3, dtype=np.uint8)),
    ],
)
def test_a_damaged_file_is_replaced(tokenizer, damage):
    good = [part.tolist() for part in encode_split(TEXT, tokenizer, 0.9)]
    (path,) = files()
    whole = path.read_bytes()
    damage(path)
    assert path.read_bytes() != whole
    assert [part.tolist() for part in encode_split(TEXT, tokenizer, 0.9)] == good
    assert tokenizer.calls == 4
    encode_split(TEXT, tokenizer, 0.9)
    assert tokenizer.calls == 4
    assert files() == [path]


def test_no_single_changed_byte_changes_the_ids(tokenizer):
    good = [part.tolist() for part in encode_split(TEXT, tokenizer, 0.9)]
    (path,) = files()
    whole = path.read_bytes()
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 0x10]) + whole[i + 1 :])
        assert [part.tolist() for part in encode_split(TEXT, tokenizer, 0.9)] == good, i


def test_a_cache_that_cannot_be_written_stops_nobody(tokenizer, cache):
    cache.write_text("a file where the folder should be")
    assert [len(part) for part in encode_split(TEXT, tokenizer, 0.9)] == [
        len(tokenizer.encode(part)) for part in split_text(TEXT, 0.9)
    ]


def test_the_files_used_last_are_kept(tokenizer):
    fractions = [(i + 1) / 100 for i in range(10, 10 + encoded.KEPT)]
    for i, fraction in enumerate(fractions):
        before = set(encoded_folder().iterdir()) if i else set()
        encode_split(TEXT, tokenizer, fraction)
        (path,) = set(encoded_folder().iterdir()) - before
        os.utime(path, (i, i))  # their order is beyond doubt
    assert len(files()) == encoded.KEPT
    encode_split(TEXT, tokenizer, fractions[0])  # the oldest, used again
    encode_split(TEXT, tokenizer, 0.5)
    assert len(files()) == encoded.KEPT
    calls = tokenizer.calls
    encode_split(TEXT, tokenizer, fractions[0])
    assert tokenizer.calls == calls
    encode_split(TEXT, tokenizer, fractions[1])
    assert tokenizer.calls == calls + 2


def test_an_empty_split_is_an_error_as_ever(tokenizer):
    with pytest.raises(UserError, match="the training split is empty"):
        encode_split("d", tokenizer, 0.9)
    assert tokenizer.calls == 0
