"""Where an answer begins, for every kind of tokenizer; rows kept in one array."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt import tokenizers
from gpt.errors import UserError
from gpt.finetune.answers import Answered, EncodedEntries, Rows, encode_answered
from gpt.tokenizers import encode_special

TEXT = "It was the best of times, it was the worst of times; the épochs of belief…\n\n  we'll see 1775\n" * 5
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.text(" \n\t the'se1<|>", max_size=20)
KINDS = ["gpt2", "bytes", "bpe", "sentencepiece", "simple-v2"]


@pytest.fixture(scope="module")
def tokenizer_of(request):
    made = {}

    def load(kind):
        if kind == "gpt2":
            return request.getfixturevalue("gpt2")
        if kind not in made:
            if kind == "bpe":
                pytest.importorskip("tokenizers")
                made[kind] = tokenizers.train_bpe(TEXT, 300)
            elif kind == "sentencepiece":
                pytest.importorskip("sentencepiece")
                made[kind] = tokenizers.train_pieces(TEXT, 320)
            else:
                made[kind] = tokenizers.load(kind, TEXT)
        return made[kind]

    return load


@pytest.mark.parametrize("kind", KINDS[:-1])
@given(prompt=text, answer=text)
def test_the_prompts_tokens_lie_within_its_bytes_and_the_next_does_not(tokenizer_of, kind, prompt, answer):
    tokenizer = tokenizer_of(kind)
    ids, length = encode_answered(tokenizer, prompt, answer)
    assert ids.tolist() == encode_special(tokenizer, prompt + answer)
    end = len(prompt.encode())
    assert len(tokenizer.decode_bytes(ids[:length])) <= end
    if length < len(ids):
        assert len(tokenizer.decode_bytes(ids[: length + 1])) > end


@given(prompt=text, answer=text)
def test_of_a_tokenizer_of_words_it_is_what_both_encodings_begin_with(tokenizer_of, prompt, answer):
    tokenizer = tokenizer_of("simple-v2")
    ids, length = encode_answered(tokenizer, prompt, answer)
    alone = tokenizer.encode(prompt)
    assert ids.tolist() == tokenizer.encode(prompt + answer)
    assert alone[:length] == ids[:length].tolist()
    assert length in (len(alone), len(ids)) or alone[length] != ids[length]


def test_a_token_across_the_border_belongs_to_the_answer(gpt2):
    prompt, answer = "Say hel", "lo\n"
    ids, length = encode_answered(gpt2, prompt, answer)
    assert [gpt2.decode([id]) for id in ids] == ["Say", " hello", "\n"]
    assert length == 1
    ids, length = encode_answered(gpt2, "Response:\n", "\n\nYes")
    assert gpt2.decode(ids[:length]) == "Response:"
    assert encode_answered(gpt2, "", "Yes").prompt_length == 0
    assert encode_answered(gpt2, "Yes", "").prompt_length == 1


def test_an_end_token_in_a_text_is_one_token(gpt2):
    ids, length = encode_answered(gpt2, "a<|endoftext|>", "b<|endoftext|>")
    assert ids.tolist() == [64, 50256, 65, 50256]
    assert length == 2


def test_what_a_tokenizer_wants_before_each_text_comes_first_and_once(bytes_tokenizer):
    class Beginning(type(bytes_tokenizer)):
        begin = [7, 8]  # noqa: RUF012

    ids, length = encode_answered(Beginning(), "ab", "c")
    assert (ids.tolist(), length) == ([7, 8, 97, 98, 99], 4)
    ids, length = encode_answered(Beginning(), "\7\10ab", "c")
    assert (ids.tolist(), length) == ([7, 8, 97, 98, 99], 4)


@given(rows=st.lists(st.tuples(st.lists(st.integers(0, 50_000), max_size=9), st.integers(0, 9)), max_size=6))
def test_rows_come_back(rows):
    kept = Rows()
    for ids, length in rows:
        kept.append(Answered(np.array(ids, np.int32), length))
    assert [(row.ids.tolist(), row.prompt_length) for row in map(kept.__getitem__, range(len(kept)))] == rows


def test_rows_take_four_bytes_a_token():
    rows, row = Rows(), Answered(np.arange(100, dtype=np.int32), 3)
    tracemalloc.start()
    for _ in range(10_000):
        rows.append(row)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 1.2 * (4 * 1_000_000 + 12 * 10_000)


def test_an_error_while_encoding_names_the_entry(tmp_path):
    def encode_entry(i):
        raise UserError("the lone surrogate")

    with pytest.raises(UserError, match="^entry 1: the lone surrogate$"):
        EncodedEntries([{}], encode_entry, 1, True)
