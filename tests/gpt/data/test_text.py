"""Text files: UTF-8 or a clear refusal, and the split."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt.data import load_text, split_text, split_tokens, text
from gpt.data.text import read_blocks, read_text
from gpt.errors import UserError


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(text, "BLOCK", 4)


def test_blocks_join_to_the_text_though_characters_are_cut(tmp_path, small_blocks):
    path, content = tmp_path / "text", "aé☃😀\r\n" * 5 + "\ufeff"
    path.write_bytes(content.encode())
    assert "".join(read_blocks(path)) == content == read_text(path)


@pytest.mark.parametrize("content", ["", "x", "\ufeff", "aé\ufeff" * 5])
def test_a_byte_order_mark_before_a_text_is_none_of_it(tmp_path, small_blocks, content):
    path = tmp_path / "text"
    path.write_text(content, encoding="utf-8-sig")
    assert read_text(path) == content


def test_a_range_of_bytes_is_read_and_its_length_told(tmp_path, small_blocks):
    path, content = tmp_path / "text", bytes(range(40))
    path.write_bytes(content)
    for begin, end in ((0, None), (3, 21), (5, 5), (38, 40)):
        seen = []
        assert b"".join(text.read_bytes(path, begin, end, seen.append)) == content[begin:end]
        assert sum(seen) == len(content[begin:end])
        assert all(0 < length <= 4 for length in seen)


@pytest.mark.parametrize("offset", range(8))
@pytest.mark.parametrize("broken", [b"\xff", b"\xe2\x98", b"\xed\xa0\x80"])
def test_the_first_wrong_byte_is_named(tmp_path, small_blocks, offset, broken):
    path = tmp_path / "latin"
    path.write_bytes(b"x" * offset + broken + b"yyy")
    with pytest.raises(UserError, match=f"latin is not UTF-8: byte {offset}$"):
        read_text(path)


def test_a_character_cut_at_the_end_is_named(tmp_path, small_blocks):
    path = tmp_path / "cut"
    path.write_bytes(b"abc" + "☃".encode()[:2])
    with pytest.raises(UserError, match=r"byte 3$"):
        read_text(path)


def test_load_text_takes_a_path_or_a_name(tmp_path, monkeypatch):
    path = tmp_path / "mine.txt"
    path.write_text("mine", encoding="utf-8")
    assert load_text(path) == load_text(str(path)) == "mine"
    assert "def " in load_text("python-stdlib")


@pytest.mark.parametrize("name", ["tiny_shakespeare", "tiny-shakespear", "Tiny-Shakespeare", "tiny-shakespeare.txt"])
def test_a_wrong_name_suggests_the_near_one(name):
    with pytest.raises(UserError, match=f"'{name}' is neither a file nor a data set .*did you mean 'tiny-shakespeare'"):
        load_text(name)


def test_what_is_no_readable_file_is_named(tmp_path):
    with pytest.raises(UserError, match="neither a file nor a data set") as caught:
        load_text(tmp_path / "zzz")
    assert "did you mean" not in str(caught.value)
    with pytest.raises(UserError, match=f"cannot read {tmp_path}"):
        load_text(tmp_path)


@given(st.text(max_size=60), st.floats(0.01, 0.99))
def test_splits_part_the_whole_or_say_what_is_empty(content, fraction):
    ids, cut = np.arange(len(content)), int(fraction * len(content))
    if not 0 < cut < len(content):
        for split, whole in ((split_text, content), (split_tokens, ids)):
            with pytest.raises(UserError, match=r"the (training|validation) split is empty"):
                split(whole, fraction)
        return
    assert split_text(content, fraction) == (content[:cut], content[cut:])
    train, validation = split_tokens(ids, fraction)
    assert (len(train), len(validation)) == (cut, len(content) - cut)
    assert np.shares_memory(train, ids)


def test_ninety_of_a_hundred_train():
    assert [len(part) for part in split_text("x" * 20479)] == [18431, 2048]
    for fraction in (0, 1, -0.5, 1.5):
        with pytest.raises(UserError, match="between 0 and 1"):
            split_text("abc", fraction)
